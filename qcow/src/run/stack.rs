//! [`Stack`]: an opened image with its backing files, as the datapath needs it.

use std::sync::Arc;

use block::{BlockQueue, Port, Storage};
use dma::Region;

use crate::bitmaps::{Tracked, prepare};
use crate::format::{Compression, Geometry, RefcountBlock, decode_refcount_table_entry};
use crate::open::{Chain, ImageMeta, LayerKind, MAX_DEPTH, MetadataSet};
use crate::{Error, Result};

/// Refcount blocks looked at, from the last one back, for the end of what is in use.
const END_BLOCKS: usize = 64;

/// The layers of an image.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Of the last layer, always QCOW2.
    pub(super) top: Top,
    /// At least one, at most [`MAX_DEPTH`]: from the bottom of the chain to the one that is written to.
    pub(super) layers: Vec<StackLayer>,
    /// The last layer may be written to.
    pub(super) writable: bool,
}

/// What only the layer that is written to has.
#[derive(Clone, Debug)]
pub(super) struct Top {
    pub(super) geometry: Geometry,
    pub(super) l1: Vec<u64>,
    pub(super) l1_offset: u64,
    pub(super) shape: u64,
    pub(super) refcount_table: Vec<u64>,
    pub(super) refcount_table_offset: u64,
    pub(super) metadata: MetadataSet,
    /// Bitmaps that record what is written.
    pub(super) bitmaps: Vec<Tracked>,
    /// First host byte behind everything that has a refcount.
    pub(super) end: u64,
    /// A file's length: what lies before it stays, counted or not. 0 for a device.
    pub(super) len: u64,
}

/// One image file of a stack.
#[derive(Clone, Debug)]
pub(super) struct StackLayer {
    pub(super) port: Port,
    pub(super) name: String,
    /// First byte behind the file or device when it was opened: nothing in it lies further on but
    /// what was allocated since.
    pub(super) end: u64,
    /// Bytes that its unit can be read up to; known when the image is attached.
    pub(super) capacity: u64,
    /// Where its external data file is, if it has one.
    pub(super) data: Option<Port>,
    /// Whether that is the guest's disk by itself.
    pub(super) raw_data: bool,
    pub(super) format: LayerFormat,
}

/// The format of a layer.
#[derive(Clone, Debug)]
pub(super) enum LayerFormat {
    Qcow { geometry: Geometry, compression: Compression, l1: Vec<u64> },
    Raw { size: u64 },
}

impl StackLayer {
    /// Size of the layer's guest disk in bytes.
    pub(super) fn size(&self) -> u64 {
        match &self.format {
            LayerFormat::Qcow { geometry, .. } => geometry.size(),
            LayerFormat::Raw { size } => *size,
        }
    }

    /// Where its guest clusters are.
    pub(super) fn data_port(&self) -> Port {
        self.data.unwrap_or(self.port)
    }
}

impl Stack {
    /// Has the leaf queues that it lies on, and no others, learn of memory.
    ///
    /// # Errors
    /// If one cannot reach it.
    pub(super) fn register<L: BlockQueue>(
        &self,
        leaves: &mut [L],
        region: &Arc<Region>,
    ) -> Result<(), String> {
        // A queue that has learnt of it already does nothing.
        for port in self.layers.iter().flat_map(|l| [l.port, l.data_port()]) {
            if let Some(leaf) = leaves.get_mut(usize::from(port.leaf)) {
                leaf.register(region)?;
            }
        }
        Ok(())
    }

    /// Takes what the datapath needs (the tables, above all) out of an opened chain, whose files
    /// (each layer's, followed by its external data file if it has one) lie at `ports`, those of the
    /// layer that is written to first, and prepares the image for writing if it was opened for that.
    ///
    /// # Errors
    /// If the first layer is not QCOW2, its metadata overlaps, or it cannot be read.
    pub fn new<S: Storage>(chain: &mut Chain<S>, ports: &[Port]) -> Result<Stack> {
        let mut metadata = MetadataSet::default();
        let mut bitmaps = None;
        let first = &mut chain.layers[0];
        if let LayerKind::Qcow2(image) = &mut first.kind
            && image.mode == crate::Mode::Write
        {
            metadata = MetadataSet::with_snapshots(image, &mut first.storage)?;
            // What is read counts as durable from now on. Who wrote it may have been killed before
            // it was: then it is in a cache, and what is written on its account may outlive it.
            first.storage.flush().map_err(Error::io(&first.name, "flush"))?;
            // First, since tables may move for it.
            bitmaps = prepare(&mut first.storage, image, &mut metadata)?;
        }
        let mut layers = Vec::with_capacity(ports.len());
        let count = chain.layers.len();
        let mut rest = ports.iter().copied();
        for layer in &mut chain.layers {
            let Some(port) = rest.next() else { break };
            let data = layer.data.as_ref().and_then(|_| rest.next());
            let image = layer.image();
            if image.is_some_and(|i| i.geometry.data_file()) && data.is_none() {
                return Err(Error::refused(&layer.name, "its external data file is not open"));
            }
            let raw_data = image.is_some_and(|i| i.header.raw_data());
            let format = match &mut layer.kind {
                // Tables may be large: they are taken, not copied.
                LayerKind::Qcow2(image) => LayerFormat::Qcow {
                    geometry: image.geometry,
                    compression: image.header.compression,
                    l1: if layers.is_empty() { Vec::new() } else { std::mem::take(&mut image.l1) },
                },
                LayerKind::Raw(size) => LayerFormat::Raw { size: *size },
            };
            let (name, end) = (layer.name.clone(), layer.storage.len());
            let capacity = u64::MAX;
            layers.push(StackLayer { port, name, end, capacity, data, raw_data, format });
        }
        let first = &mut chain.layers[0];
        let name = first.name.clone();
        let LayerKind::Qcow2(image) = &mut first.kind else {
            return Err(Error::refused(&name, "is not a QCOW2 image"));
        };
        if rest.next().is_some() || layers.len() != count || layers.len() > MAX_DEPTH {
            return Err(Error::refused(&name, "has more layers than can be served"));
        }
        let writable = image.mode == crate::Mode::Write;
        let mut end = 0;
        if writable {
            end = image_end(image, &mut first.storage)?;
            // Last: an image that is refused stays as it is.
            image.prepare_write(&mut first.storage, bitmaps.is_some())?;
        }
        let len = match first.storage.len() {
            len if len < first.storage.capacity() => len,
            _ => 0,
        };
        layers.reverse();
        let top = Top {
            geometry: image.geometry,
            l1: std::mem::take(&mut image.l1),
            l1_offset: image.header.l1_table_offset,
            shape: image.shape(),
            refcount_table: std::mem::take(&mut image.refcount_table),
            refcount_table_offset: image.header.refcount_table_offset,
            metadata,
            bitmaps: bitmaps.unwrap_or_default(),
            end,
            len,
        };
        Ok(Stack { top, layers, writable })
    }

    /// Names of the layers, the one that is written to first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().rev().map(|l| l.name.as_str())
    }

    /// The number of the layer that is written to.
    pub(super) fn top_number(&self) -> u8 {
        // At most `MAX_DEPTH`, so eight bits do, and at least one.
        (self.layers.len() - 1) as u8
    }

    /// The layer that is written to.
    pub(super) fn top_layer(&self) -> &StackLayer {
        &self.layers[self.layers.len() - 1]
    }
}

/// The first host byte behind the last cluster with a refcount.
fn image_end(image: &ImageMeta, storage: &mut dyn Storage) -> Result<u64> {
    let g = &image.geometry;
    let mut block = RefcountBlock::new(g);
    let used = image.refcount_table.iter().enumerate().rev().filter(|&(_, &raw)| raw != 0);
    for (index, &raw) in used.take(END_BLOCKS) {
        let Ok(offset) = decode_refcount_table_entry(raw, g) else { continue };
        let read = storage.read_at(offset, block.bytes_mut());
        read.map_err(Error::io(&image.name, "refcount block"))?;
        let last = (0..g.refcount_block_entries()).rev().find(|&i| block.get(i) != 0);
        if let Some(last) = last {
            let cluster = ((index as u64) << g.refcount_block_bits()) + last as u64 + 1;
            return Ok(cluster << g.cluster_bits());
        }
    }
    // Nothing counted near the end: what lies behind it is free to take in any case.
    Ok(image.host_end(storage))
}
