//! [`Reader`]: reads the disk of a chain, one blocking access at a time. Control path.

use block::Storage;

use crate::chain::{Chain, Kind, Layer};
use crate::map::{Cut, Load, Map, MapLayer, Source, Span, Step};
use crate::{Error, Result};

/// Reads through a chain.
pub struct Reader<S> {
    layers: Vec<Layer<S>>,
    map: Map,
    bitmap: Vec<u8>,
}

impl<S: Storage> Reader<S> {
    /// Takes the chain over.
    pub fn new(chain: Chain<S>) -> Reader<S> {
        let layer = |l: &Layer<S>| match &l.kind {
            Kind::Vhd(image) => MapLayer::Vhd(image.clone()),
            Kind::Raw(size) => MapLayer::Raw(*size),
        };
        let map = Map::new(chain.layers.iter().map(layer).collect());
        Reader { layers: chain.layers, map, bitmap: Vec::new() }
    }

    /// The layers; 0 is the top.
    pub fn layers(&self) -> &[Layer<S>] {
        &self.layers
    }

    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        self.map.size()
    }

    /// Where the guest's bytes from `start` on come from, at most `max` (not 0) of them. `None` at
    /// the disk's end. What lies behind may come from the same place.
    ///
    /// # Errors
    /// If a bitmap cannot be read, or the range should be in a file that does not have it.
    pub fn span(&mut self, start: u64, max: u64) -> Result<Option<Span>> {
        if start >= self.size() {
            return Ok(None);
        }
        // The map knows sectors.
        let before = start % 512;
        let sectors = (max.saturating_add(before) | 511).saturating_add(1) & !511;
        let mut walk = self.map.walk(start - before, sectors);
        loop {
            match self.map.step(&mut walk).map_err(|cut| self.cut(&cut))? {
                Step::Load(load) => self.load(&load)?,
                Step::Run(mut span) => {
                    span.start = start;
                    span.len = (span.len - before).min(max);
                    if let Source::Data(host) = &mut span.source {
                        *host += before;
                    }
                    return Ok(Some(span));
                }
            }
        }
    }

    fn cut(&self, cut: &Cut) -> Error {
        Error::refused(&self.layers[cut.layer].name, cut.to_string())
    }

    fn load(&mut self, load: &Load) -> Result<()> {
        let layer = &mut self.layers[load.layer];
        self.bitmap.resize(load.len as usize, 0);
        let io = Error::io(&layer.name, "bitmap of a block");
        layer.storage.read_at(load.offset, &mut self.bitmap).map_err(io)?;
        self.map.loaded(load, &self.bitmap);
        Ok(())
    }

    /// Fills `into` from guest offset `offset`; past the disk's end with zeroes.
    ///
    /// # Errors
    /// As [`Reader::span`], or if data cannot be read.
    pub fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.saturating_add(done as u64);
            let left = (into.len() - done) as u64;
            let Some(span) = self.span(at, left)? else {
                into[done..].fill(0);
                break;
            };
            let len = span.len.min(left) as usize;
            let part = &mut into[done..done + len];
            match span.source {
                Source::Unallocated => part.fill(0),
                Source::Data(host) => {
                    let layer = &mut self.layers[span.depth];
                    layer.storage.read_at(host, part).map_err(Error::io(&layer.name, "data"))?;
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Gives the chain back.
    pub fn into_chain(self) -> Chain<S> {
        Chain { layers: self.layers }
    }
}
