//! [`Blocking`]: a leaf queue used as [`Storage`], one request at a time, by spinning on it.
//!
//! For the control path only. Unaligned ranges become whole blocks around them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dma::Region;

use crate::{BlockQueue, Completions, Flags, Op, Request, Status, Storage, StorageError, Tag};

/// What a leaf can say and do about a unit besides requests: length and cutting of files.
pub trait LeafAccess: BlockQueue {
    /// Bytes that hold something: a file's length; a device's size.
    fn unit_len(&self, unit: u16) -> u64;

    /// Sets a file's length; nothing on a device.
    ///
    /// # Errors
    /// If the length cannot be changed.
    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status>;
}

/// Size of the bounce buffer, and so of one request.
const BOUNCE: usize = 1 << 20;

/// Most bytes of one command without data, so that none holds a device for long.
const STEP: u64 = 1 << 30;

/// Turns in which a healthy device has answered long since; afterwards each turn sleeps.
const PATIENCE: u32 = 10_000;
const PAUSE: Duration = Duration::from_micros(100);

/// A unit of a leaf queue, used blockingly. Holds the queue for itself, and tells it the time, so
/// that a command which the device lost has its deadline here too.
pub struct Blocking<L> {
    leaf: L,
    unit: u16,
    bounce: Arc<Region>,
    done: Completions,
    generation: u32,
    began: Instant,
}

impl<L: LeafAccess> Blocking<L> {
    /// Takes the queue over.
    ///
    /// # Errors
    /// If there is no memory for the bounce buffer or no such unit.
    pub fn new(mut leaf: L, unit: u16) -> Result<Blocking<L>, String> {
        if leaf.info(unit).is_none() {
            return Err(format!("the device has no unit {unit}"));
        }
        let bounce = Region::new_best(BOUNCE).map_err(|e| e.to_string())?;
        leaf.register(&bounce)?;
        let began = instant();
        Ok(Blocking { leaf, unit, bounce, done: Completions::new(), generation: 0, began })
    }

    /// Gives the queue back. Its next owner has a clock of its own, which begins anew.
    pub fn into_leaf(mut self) -> L {
        self.leaf.set_now(0);
        self.leaf
    }

    /// The unit of the queue.
    pub fn unit(&self) -> u16 {
        self.unit
    }

    /// The queue.
    pub fn leaf(&self) -> &L {
        &self.leaf
    }

    fn info(&self) -> &crate::DeviceInfo {
        self.leaf.info(self.unit).expect("the unit was there when this was made")
    }

    /// Sends one aligned request over the first `len` bytes of the bounce buffer and waits.
    fn run(
        &mut self,
        what: &'static str,
        op: Op,
        offset: u64,
        len: u64,
    ) -> Result<(), StorageError> {
        self.generation = self.generation.wrapping_add(1);
        let tag = Tag::new(u16::MAX, 0, self.generation);
        let seg = match op {
            Op::Read | Op::Write => u32::try_from(len).ok().and_then(|n| self.bounce.seg(0, n)),
            _ => None,
        };
        let request = Request {
            tag,
            op,
            flags: Flags::NONE,
            unit: self.unit,
            offset,
            len,
            segs: seg.as_slice(),
        };
        let fail = |status, detail| StorageError { what, offset, len, status, detail };
        while self.leaf.submit(&request).is_err() {
            self.turn();
        }
        let mut idle = 0u32;
        loop {
            self.turn();
            for c in self.done.iter() {
                if c.tag == tag {
                    return match c.status {
                        Status::Ok => Ok(()),
                        status => Err(fail(status, c.detail)),
                    };
                }
            }
            idle = idle.saturating_add(1);
            if idle > PATIENCE {
                std::thread::sleep(PAUSE);
            } else if self.leaf.arm() == crate::HasWork::Yes {
                std::thread::yield_now();
            }
        }
    }

    /// What a reactor does in each of its turns.
    fn turn(&mut self) {
        // Never 0, which says that nobody tells the time.
        self.leaf.set_now(self.began.elapsed().as_nanos() as u64 + 1);
        self.done.clear();
        self.leaf.poll(&mut self.done);
    }

    /// Calls `f(bounce offset, position in the caller's buffer, bytes)` for each part of the range,
    /// with whole blocks around it: (block-aligned offset, aligned length, skipped head, bytes).
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = Part> + use<L> {
        let block = u64::from(self.info().block_size);
        let most = (BOUNCE as u64).min(u64::from(self.info().max_transfer)) & !(block - 1);
        let end = offset.saturating_add(len);
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let from = at & !(block - 1);
            let to = end.min(from + most);
            let part = Part {
                from,
                len: (to - from).next_multiple_of(block),
                skip: (at - from) as usize,
                bytes: (to - at) as usize,
            };
            at = to;
            Some(part)
        })
    }
}

#[expect(clippy::disallowed_methods, reason = "control path: each look at it waits for a device")]
fn instant() -> Instant {
    Instant::now()
}

/// One request's worth of a range.
struct Part {
    from: u64,
    len: u64,
    skip: usize,
    bytes: usize,
}

impl Part {
    /// Whether the part is whole blocks.
    fn whole(&self) -> bool {
        self.bytes as u64 == self.len
    }
}

impl<L: LeafAccess> Storage for Blocking<L> {
    fn len(&self) -> u64 {
        self.leaf.unit_len(self.unit)
    }

    fn capacity(&self) -> u64 {
        self.info().size
    }

    fn read_only(&self) -> bool {
        self.info().read_only
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let mut done = 0;
        for part in self.parts(offset, into.len() as u64) {
            self.run("read", Op::Read, part.from, part.len)?;
            self.bounce.read(part.skip, &mut into[done..done + part.bytes]);
            done += part.bytes;
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let mut done = 0;
        for part in self.parts(offset, from.len() as u64) {
            if !part.whole() {
                self.run("read", Op::Read, part.from, part.len)?;
            }
            self.bounce.write(part.skip, &from[done..done + part.bytes]);
            self.run("write", Op::Write, part.from, part.len)?;
            done += part.bytes;
        }
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        let block = u64::from(self.info().block_size);
        let mut done = 0;
        if self.info().write_zeroes && (offset | len) & (block - 1) == 0 {
            while done < len {
                let n = STEP.min(len - done);
                match self.run("write zeroes", Op::WriteZeroes, offset + done, n) {
                    Ok(()) => done += n,
                    // Some find out only when they are asked.
                    Err(e) if e.status == Status::Unsupported => break,
                    Err(e) => return Err(e),
                }
            }
        }
        for part in self.parts(offset + done, len - done) {
            if !part.whole() {
                self.run("read", Op::Read, part.from, part.len)?;
            }
            self.bounce.zero(part.skip, part.bytes);
            self.run("write", Op::Write, part.from, part.len)?;
        }
        Ok(())
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        let block = u64::from(self.info().block_size);
        // Whole blocks only: the others hold something else, too.
        let (mut at, end) =
            (offset.next_multiple_of(block), offset.saturating_add(len) & !(block - 1));
        while self.info().discard && at < end {
            let n = STEP.min(end - at);
            // It is a favour.
            if self.run("discard", Op::Discard, at, n).is_err() {
                return;
            }
            at += n;
        }
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.run("flush", Op::Flush, 0, 0)
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        self.leaf.set_unit_len(self.unit, len).map_err(|status| StorageError {
            what: "set length",
            offset: len,
            len: 0,
            status,
            detail: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemQueue;

    #[test]
    fn unaligned_ranges_read_back_and_spare_their_neighbours() {
        for block in [512, 4096] {
            let mut s = Blocking::new(MemQueue::new(4 << 20, block).unwrap(), 0).unwrap();
            s.write_at(0, &vec![0x11; 4 << 20]).unwrap();
            let data: Vec<u8> = (0..1_500_000u32).map(|i| (i % 251) as u8).collect();
            s.write_at(4097, &data).unwrap();
            let mut back = vec![0; data.len() + 2];
            s.read_at(4096, &mut back).unwrap();
            assert_eq!(back[0], 0x11);
            assert!(back[1..=data.len()] == data[..]);
            assert_eq!(back[data.len() + 1], 0x11);
            s.write_zeroes_at(100, 5000).unwrap();
            let mut z = vec![9; 5002];
            s.read_at(99, &mut z).unwrap();
            assert_eq!((z[0], z[5001]), (0x11, data[5100 - 4097]));
            assert!(z[1..5001].iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn whole_blocks_are_discarded() {
        let mut s = Blocking::new(MemQueue::new(1 << 20, 4096).unwrap(), 0).unwrap();
        s.write_at(0, &vec![0x11; 1 << 20]).unwrap();
        s.discard_at(4097, 4 * 4096);
        s.discard_at(0, 4095);
        s.discard_at(1 << 19, 0);
        let mut back = vec![0; 1 << 20];
        s.read_at(0, &mut back).unwrap();
        // Memory has zeroes then.
        for (at, byte) in back.iter().enumerate() {
            let gone = (2 * 4096..5 * 4096).contains(&at);
            assert_eq!(*byte, if gone { 0 } else { 0x11 }, "byte {at}");
        }
    }

    #[test]
    fn zeroes_are_written_where_the_device_cannot_zero_after_all() {
        let mut leaf = crate::FaultQueue::new(MemQueue::new(1 << 20, 512).unwrap());
        let refuse = crate::Fault::Error(Status::Unsupported);
        leaf.add(crate::Rule::all(refuse).op(Op::WriteZeroes));
        let mut s = Blocking::new(leaf, 0).unwrap();
        s.write_at(0, &[0x11; 8192]).unwrap();
        s.write_zeroes_at(512, 4096).unwrap();
        let mut back = [9; 8192];
        s.read_at(0, &mut back).unwrap();
        assert!(back[512..4608].iter().all(|&b| b == 0));
        assert_eq!((back[511], back[4608], s.leaf().struck()), (0x11, 0x11, 1));
    }

    /// Loses every request, and says so once its deadline is over.
    struct Deaf {
        mem: MemQueue,
        lost: Option<Tag>,
        now: u64,
    }

    impl crate::Submit for Deaf {
        fn info(&self, unit: u16) -> Option<&crate::DeviceInfo> {
            self.mem.info(unit)
        }
        fn room(&self) -> usize {
            usize::from(self.lost.is_none())
        }
        fn submit(&mut self, r: &Request<'_>) -> Result<(), crate::Full> {
            self.lost = Some(r.tag);
            Ok(())
        }
    }

    impl BlockQueue for Deaf {
        fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
            self.mem.register(region)
        }
        fn poll(&mut self, out: &mut Completions) -> usize {
            let Some(tag) = self.lost.take_if(|_| self.now > 3_000_000) else { return 0 };
            out.push(crate::Completion { tag, status: Status::Timeout, detail: 0 });
            1
        }
        fn in_flight(&self) -> usize {
            usize::from(self.lost.is_some())
        }
        fn arm(&mut self) -> crate::HasWork {
            crate::HasWork::Yes
        }
        fn set_now(&mut self, now: u64) {
            self.now = now;
        }
    }

    impl LeafAccess for Deaf {
        fn unit_len(&self, unit: u16) -> u64 {
            self.mem.unit_len(unit)
        }
        fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
            self.mem.set_unit_len(unit, len)
        }
    }

    #[test]
    fn a_lost_request_ends_at_its_deadline() {
        let leaf = Deaf { mem: MemQueue::new(1 << 20, 512).unwrap(), lost: None, now: 0 };
        let mut s = Blocking::new(leaf, 0).unwrap();
        let e = s.read_at(0, &mut [0; 512]).unwrap_err();
        assert_eq!(e.status, Status::Timeout);
        assert_eq!(s.into_leaf().now, 0, "the next owner's clock begins anew");
    }

    #[test]
    fn outside_is_an_error_that_says_where() {
        let mut s = Blocking::new(MemQueue::new(1 << 20, 512).unwrap(), 0).unwrap();
        let e = s.read_at(1 << 20, &mut [0; 512]).unwrap_err();
        assert_eq!(e.status, Status::Invalid);
        assert_eq!(e.to_string(), "read of 512 bytes at offset 0x100000: invalid request");
    }
}
