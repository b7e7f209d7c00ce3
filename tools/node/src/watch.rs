//! [`Watched`]: follows a running disk: gives whoever copies it all that it holds, and then what has
//! changed since. Guests go on, and are not waited for ([`qcow::run::Image::watch`]).

use std::sync::Arc;
use std::time::Duration;

use block::{Flags, Op, Status};
use dma::{PageSize, Region};
use reactor::{Clock, Portal, PortalRequest};

use crate::{Door, Error, ExtentSource, Image, ReactorCore};

/// Bytes that are read with one request, if the disk takes so many, and requests at a time.
const PIECE: u64 = 512 << 10;
const PIECES: usize = 8;
/// Bytes that are taken at a time.
const ROUND: u64 = 8 << 20;
/// Between two looks whether requests in flight have ended: the first, and at most.
const LOOK: Duration = Duration::from_micros(50);
const LOOK_MAX: Duration = Duration::from_millis(2);
/// How long that may take, in nanoseconds: longer than a device may for a command.
const PATIENCE_NS: u64 = 180_000_000_000;

/// What a part of the disk holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many zeroes.
    Zeroes(u64),
}

/// What a look at the disk has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Bytes that were handed on.
    pub bytes: u64,
    /// Where it goes on; 0 if the end of the disk was reached.
    pub at: u64,
}

/// Takes what was found, at a byte of the disk.
type Take<'a> = dyn FnMut(u64, Content<'_>) -> Result<(), String> + 'a;

/// See the module's text. To be dropped before the disk is closed.
pub struct Watched {
    door: Door,
    extents: ExtentSource,
    portal: Portal,
    region: Arc<Region>,
    buffer: Vec<u8>,
    piece: u64,
    at: u64,
    clock: Clock,
}

impl Watched {
    /// Begins to follow the disk behind `door`, whose requests may have `max_transfer` bytes. All of
    /// it counts as changed.
    ///
    /// # Errors
    /// If somebody else follows it, it is no QCOW2 image, or memory is short.
    pub fn begin(door: Door, max_transfer: u32, clock: Clock) -> Result<Watched, Error> {
        let piece = PIECE.min(u64::from(max_transfer) & !511).max(512);
        let region = Region::new(piece as usize * PIECES, PageSize::Small)
            .map_err(|e| Error::node(door.name(), e))?;
        let extents = ExtentSource::new(door.clone())?;
        let portal = door.open_home(PIECES as u16, vec![region.clone()])?;
        let begun = on_image(&door, |i| i.watch())?;
        begun.map_err(|e| Error::node(door.name(), e))?;
        let buffer = vec![0; piece as usize];
        Ok(Watched { door, extents, portal, region, buffer, piece, at: 0, clock })
    }

    /// Bytes that have changed and were not handed on, rounded up.
    ///
    /// # Errors
    /// If the disk has got another size, or its reactor has ended.
    pub fn changed(&self) -> Result<u64, Error> {
        on_image(&self.door, |i| i.changed())?.ok_or_else(|| self.lost())
    }

    fn lost(&self) -> Error {
        Error::node(self.door.name(), "its changes are not recorded any more: it has another size")
    }

    /// Hands on what has changed from where the last round ended, some MiB of it.
    ///
    /// # Errors
    /// If something cannot be read, `take` fails, requests in flight do not end, or as
    /// [`Watched::changed`]. What was taken and not handed on is lost: the copy cannot go on.
    pub fn round(
        &mut self,
        take: &mut dyn FnMut(u64, Content<'_>) -> Result<(), String>,
    ) -> Result<Round, Error> {
        let at = self.at;
        let taken = on_image(&self.door, move |i| i.take_changed(at, ROUND))?;
        let taken = taken.ok_or_else(|| self.lost())?;
        if !taken.parts.is_empty() {
            self.settle(taken.stamp)?;
        }
        let mut bytes = 0;
        for (start, len) in taken.parts {
            self.part(start, len, take)?;
            bytes += len;
        }
        self.at = taken.next.unwrap_or(0);
        Ok(Round { bytes, at: self.at })
    }

    /// Waits for what was in flight.
    fn settle(&self, stamp: u64) -> Result<(), Error> {
        let began = self.clock.now();
        let mut pause = LOOK;
        while !on_image(&self.door, move |i| i.has_settled(stamp))? {
            if self.clock.now().saturating_sub(began) > PATIENCE_NS {
                return Err(Error::node(self.door.name(), "requests in flight do not end"));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_MAX);
        }
        Ok(())
    }

    fn part(&mut self, start: u64, len: u64, take: &mut Take<'_>) -> Result<(), Error> {
        let (mut at, end) = (start, start + len);
        while at < end {
            let list = self.extents.status(at, end - at, 256);
            let list = list.map_err(|e| self.unread(at, e))?;
            for extent in list {
                let len = extent.len.min(end - at);
                match extent.zero {
                    true => self.hand_on(at, Content::Zeroes(len), take)?,
                    false => self.data(at, len, take)?,
                }
                at += len;
                if at == end {
                    break;
                }
            }
        }
        Ok(())
    }

    fn hand_on(&self, at: u64, what: Content<'_>, take: &mut Take<'_>) -> Result<(), Error> {
        take(at, what).map_err(|e| Error::node(self.door.name(), e))
    }

    fn unread(&self, at: u64, status: Status) -> Error {
        Error::node(self.door.name(), format!("cannot be read at {at}: {status}"))
    }

    /// Reads a range, several pieces at a time.
    fn data(&mut self, start: u64, len: u64, take: &mut Take<'_>) -> Result<(), Error> {
        let piece = self.piece;
        let pieces: Vec<(u64, u64)> = (0..len.div_ceil(piece))
            .map(|n| (start + n * piece, piece.min(len - n * piece)))
            .collect();
        for some in pieces.chunks(PIECES) {
            let mut failed = None;
            for (n, &(offset, len)) in some.iter().enumerate() {
                let seg = self.region.seg(n as u64 * piece, len as u32);
                let (op, flags) = (Op::Read, Flags::NONE);
                let request = PortalRequest { id: n as u64, op, flags, offset, len, seg };
                if self.portal.send(request).is_err() {
                    failed = Some((offset, Status::Gone));
                    break;
                }
            }
            // All of them end before the memory is used again.
            while self.portal.in_flight() > 0 {
                let reply = self.portal.wait();
                if !reply.status.is_ok() {
                    failed = Some((some[reply.id as usize % some.len()].0, reply.status));
                }
            }
            if let Some((at, status)) = failed {
                return Err(self.unread(at, status));
            }
            for (n, &(offset, len)) in some.iter().enumerate() {
                let mut buffer = std::mem::take(&mut self.buffer);
                self.region.read(n * piece as usize, &mut buffer[..len as usize]);
                let done = self.hand_on(offset, Content::Bytes(&buffer[..len as usize]), take);
                self.buffer = buffer;
                done?;
            }
        }
        Ok(())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // If its reactor has ended there is nothing to end.
        let _ = on_image(&self.door, |i| i.unwatch());
    }
}

fn on_image<T: Send + 'static>(
    door: &Door,
    f: impl FnOnce(&mut qcow::run::Image) -> T + Send + 'static,
) -> Result<T, Error> {
    let image = door.image();
    let done = door.ask(move |core: &mut ReactorCore| match core.image(image) {
        Some(Image::Qcow(i)) => Some(f(i)),
        _ => None,
    });
    let done = done.ok_or_else(|| Error::node(door.name(), "its reactor has ended"))?;
    done.ok_or_else(|| Error::node(door.name(), "only qcow2 images can be followed"))
}
