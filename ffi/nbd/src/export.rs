//! [`Export`]: what a server serves, and how it reaches the image: given by whoever binds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{DeviceInfo, Status};
use dma::Region;
use reactor::Portal;

use crate::contexts::Bitmaps;
use crate::listen::Error;
use crate::proto::{self, export_flag};

/// Gives a new connection its portal to the reactor that owns the image: `(depth, regions)` are
/// the arguments of [`Portal::new`]; the other end is to be attached to the image before this
/// returns. Called on the connection's thread once per client that enters transmission. The same
/// regions come again with later clients: registering them again with a device is a no-op.
pub type Attach = dyn Fn(u16, Vec<Arc<Region>>) -> Result<Portal, String> + Send + Sync;

/// What a server serves.
pub struct Export {
    /// The name that a client must ask for; `""` is the default export. At most 4096 bytes.
    pub name: String,
    /// For people; at most 4096 bytes.
    pub description: String,
    /// Refuse writes although the image could take them.
    pub read_only: bool,
    /// What the image is like.
    pub info: DeviceInfo,
    /// Connects a client to the image.
    pub attach: Box<Attach>,
    /// What is allocated in the image.
    pub extents: Box<dyn Extents>,
    /// Bitmaps of it that clients may ask for.
    pub bitmaps: Option<Box<dyn Bitmaps>>,
    /// Its size in bytes by now, for an image that is given others while it is served: clients that
    /// come see that one, those that are there keep theirs.
    pub size: Option<Arc<AtomicU64>>,
}

/// A range of the image of one kind (`base:allocation`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Length in bytes, a multiple of the image's block size.
    pub len: u64,
    /// Not allocated: a write may find no space.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// Tells which parts of an image are allocated or zero.
pub trait Extents: Send + Sync {
    /// The extents from `offset` on, one after the other, at most `limit` (at least 1) of them.
    /// They need not reach `offset + len`, and may reach beyond. Offset and length are multiples
    /// of the image's block size and lie in the image. Called on a connection's thread, whose
    /// other requests wait meanwhile; an implementation may ask the image's reactor.
    ///
    /// # Errors
    /// The status that the client's query is answered with.
    fn status(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, Status>;
}

/// Says that everything is allocated data, which is always a safe answer.
#[derive(Clone, Copy, Debug)]
pub struct AllData;

impl Extents for AllData {
    fn status(&self, _offset: u64, len: u64, _limit: usize) -> Result<Vec<Extent>, Status> {
        Ok(vec![Extent { len, hole: false, zero: false }])
    }
}

impl Export {
    /// Finds what makes no sense.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let long = self.name.len().max(self.description.len()) > proto::MAX_STRING;
        if long || self.name.contains('\0') || self.description.contains('\0') {
            return Err(Error::Export("name or description is too long or holds a NUL"));
        }
        let block = self.info.block_size;
        if !block.is_power_of_two() || !(512..=4096).contains(&block) {
            return Err(Error::Export("block size must be 512 to 4096 bytes, a power of two"));
        }
        let size = self.info.size;
        if !size.is_multiple_of(u64::from(block)) || size > i64::MAX as u64 {
            return Err(Error::Export("size is not whole blocks, or 8 EiB and more"));
        }
        // The protocol has a read of 64 KiB answered in one chunk, with the blocks around it.
        if self.info.max_transfer < 128 << 10 {
            return Err(Error::Export("longest transfer is below 128 KiB"));
        }
        Ok(())
    }

    /// The size that a client that comes now is told.
    pub(crate) fn size(&self) -> u64 {
        self.size.as_ref().map_or(self.info.size, |s| s.load(Ordering::Relaxed))
    }

    /// Whether writes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only || self.info.read_only
    }

    /// The transmission flags. Several connections may be used as one: there is one image with one
    /// owner, so a flush covers what was answered on any of them.
    pub(crate) fn flags(&self, structured: bool) -> u16 {
        let mut flags = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::CAN_MULTI_CONN;
        if structured {
            flags |= export_flag::SEND_DF;
        }
        if self.is_read_only() {
            return flags | export_flag::READ_ONLY;
        }
        if self.info.discard {
            flags |= export_flag::SEND_TRIM;
        }
        flags | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO
    }

    /// Minimum, preferred and maximum block size as advertised.
    pub(crate) fn block_sizes(&self) -> [u32; 3] {
        let unit = self.info.physical_block_size.max(self.info.discard_granularity).max(4096);
        // The preferred size must be a power of two and no more than the maximum.
        let preferred = unit.checked_next_power_of_two().unwrap_or(4096).min(2 << 20);
        [self.info.block_size, preferred, proto::MAX_PAYLOAD]
    }

    /// The descriptors that answer a block-status query over a checked range: `(length, flags)`,
    /// neighbours of one kind merged, none empty, at least one, inside the range.
    pub(crate) fn descriptors(
        &self,
        offset: u64,
        len: u32,
        limit: usize,
    ) -> Result<Vec<(u32, u32)>, Status> {
        let block = self.info.block_size;
        let from = offset & !u64::from(block - 1);
        let around = proto::span(offset, u64::from(len), block);
        let extents = self.extents.status(from, around, limit)?;
        let mut skip = offset - from;
        let mut left = len;
        let mut out: Vec<(u32, u32)> = Vec::new();
        for extent in extents {
            let inside = extent.len.saturating_sub(skip);
            skip = skip.saturating_sub(extent.len);
            let n = u32::try_from(inside).unwrap_or(u32::MAX).min(left);
            let flags = u32::from(extent.hole) | u32::from(extent.zero) << 1;
            if n == 0 {
                continue;
            }
            let full = out.len() == limit;
            match out.last_mut() {
                Some(last) if last.1 == flags => last.0 += n,
                _ if full => break,
                _ => out.push((n, flags)),
            }
            left -= n;
        }
        if out.is_empty() {
            out.push((len, 0));
        }
        Ok(out)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    struct List(Vec<(u64, bool)>);

    impl Extents for List {
        fn status(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, Status> {
            Ok(self.0.iter().map(|&(len, hole)| Extent { len, hole, zero: hole }).collect())
        }
    }

    /// An export of 1 GiB that nobody can attach to.
    pub(crate) fn export(extents: Box<dyn Extents>) -> Export {
        Export {
            name: "disk".to_owned(),
            description: "a disk".to_owned(),
            read_only: false,
            info: DeviceInfo {
                size: 1 << 30,
                block_size: 512,
                physical_block_size: 4096,
                read_only: false,
                volatile_cache: false,
                write_zeroes: true,
                discard: true,
                discard_granularity: 65536,
                max_transfer: 1 << 20,
            },
            attach: Box::new(|_, _| Err("not here".to_owned())),
            size: None,
            bitmaps: None,
            extents,
        }
    }

    #[test]
    fn descriptors_are_merged_clipped_and_never_empty() {
        let parts = vec![(512, false), (0, true), (512, false), (1024, true), (1 << 40, false)];
        let e = export(Box::new(List(parts)));
        assert_eq!(e.descriptors(0, 4096, 10).unwrap(), [(1024, 0), (1024, 3), (2048, 0)]);
        assert_eq!(e.descriptors(100, 600, 10).unwrap(), [(600, 0)]);
        assert_eq!(e.descriptors(100, 1000, 10).unwrap(), [(924, 0), (76, 3)]);
        assert_eq!(e.descriptors(0, 4096, 1).unwrap(), [(1024, 0)]);
        assert_eq!(e.descriptors(0, 4096, 2).unwrap(), [(1024, 0), (1024, 3)]);
        assert_eq!(e.descriptors(0, u32::MAX, 9).unwrap()[2].0, u32::MAX - 2048);
        let none = export(Box::new(List(vec![])));
        assert_eq!(none.descriptors(0, 4096, 4).unwrap(), [(4096, 0)]);
        assert_eq!(export(Box::new(AllData)).descriptors(7, 9, 1).unwrap(), [(9, 0)]);
    }

    #[test]
    fn flags_follow_the_image() {
        let mut e = export(Box::new(AllData));
        assert_eq!(e.flags(false), 0x96d);
        assert_eq!(e.flags(true), 0x9ed);
        e.info.discard = false;
        assert_eq!(e.flags(false), 0x94d);
        e.read_only = true;
        assert_eq!(e.flags(true), 0x18f);
        assert_eq!(e.block_sizes(), [512, 65536, 32 << 20]);
    }

    #[test]
    fn nonsense_is_refused() {
        let e = export(Box::new(AllData));
        assert!(e.check().is_ok());
        let e = Export { name: "x".repeat(4097), ..e };
        assert!(e.check().is_err());
        let mut e = export(Box::new(AllData));
        e.info.size = 1000;
        assert!(e.check().is_err());
    }
}
