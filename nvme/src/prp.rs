//! PRP entries (§4.3): how a command names its data.
//!
//! A PRP names one memory page. The first may begin within its page, the last may end within its
//! page, and all between are whole pages. So a list of segments can be expressed if each begins on
//! a page where the one before it ended on one, or goes on exactly where that one ended. Anything
//! else is [`PrpError::Inexpressible`], and the queue pair bounces it.

use dma::{Region, Seg};

use crate::memory::{AddressTable, Place};

/// Entries of the list that each tracker has: with PRP1 enough for [`MAX_BYTES`] at any offset.
pub(crate) const LIST_ENTRIES: usize = 256;

/// Bytes of such a list. Lists are aligned to it, so that none crosses a page and no chaining of
/// lists is ever needed.
pub(crate) const LIST_BYTES: usize = LIST_ENTRIES * 8;

/// Most data of one command: 256 list entries, one page each, whatever PRP1's offset.
pub(crate) const MAX_BYTES: u32 = 1 << 20;

const _: () = assert!(MAX_BYTES as usize / 4096 == LIST_ENTRIES);

/// The data pointer of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Prps {
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
}

/// Why there is no data pointer for some segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PrpError {
    /// A segment of a region that the queue does not know.
    Unmapped,
    /// The segments do not meet at page boundaries, or begin at an odd byte.
    Inexpressible,
}

/// Where a PRP list is written: in which memory, and what the device calls it.
pub(crate) struct ListSlot<'a> {
    pub(crate) region: &'a Region,
    pub(crate) offset: usize,
    pub(crate) bus: u64,
}

/// The data pointer for `len` bytes of `segs`, from byte `skip` of the first one on.
///
/// `len` is at most [`MAX_BYTES`], and the segments hold that much after `skip`.
pub(crate) fn build(
    table: &AddressTable,
    page_shift: u32,
    segs: &[Seg],
    skip: u32,
    len: u32,
    list: &ListSlot<'_>,
) -> Result<Prps, PrpError> {
    let seg = segs.first().ok_or(PrpError::Inexpressible)?;
    // By far the most common: all of it in one segment that lies in one piece.
    if u64::from(seg.len()) >= u64::from(skip) + u64::from(len)
        && let Place::Run(bus) = table.place(seg).ok_or(PrpError::Unmapped)?
    {
        return one_run(bus + u64::from(skip), len, page_shift, list);
    }
    gather(table, page_shift, segs, skip, len, list)
}

/// The data pointer for one contiguous run within two pages; `None` if it is longer, or begins at
/// an odd byte.
#[inline]
fn without_list(bus: u64, len: u32, page: u64) -> Option<Prps> {
    // Bytes from the start of the first page.
    let end = (bus & (page - 1)) + u64::from(len);
    if end > 2 * page || bus & 3 != 0 {
        return None;
    }
    let second = (bus | (page - 1)) + 1;
    Some(Prps { prp1: bus, prp2: if end <= page { 0 } else { second } })
}

/// The data pointer for one contiguous run.
fn one_run(bus: u64, len: u32, page_shift: u32, list: &ListSlot<'_>) -> Result<Prps, PrpError> {
    if bus & 3 != 0 {
        return Err(PrpError::Inexpressible);
    }
    let page = 1u64 << page_shift;
    if let Some(prps) = without_list(bus, len, page) {
        return Ok(prps);
    }
    let in_first = page - (bus & (page - 1));
    let rest = u64::from(len) - in_first;
    let second = bus + in_first;
    let entries = (rest + page - 1) >> page_shift;
    if entries > LIST_ENTRIES as u64 {
        return Err(PrpError::Inexpressible);
    }
    let mut i = 0;
    // Eight entries at a time: one bounds check each. What is written past the last entry lies
    // within this list's own memory, and no device reads it.
    while i < entries {
        let words: [u64; 8] = std::array::from_fn(|k| second + ((i + k as u64) << page_shift));
        list.region.write_words(list.offset + i as usize * 8, &words);
        i += 8;
    }
    Ok(Prps { prp1: bus, prp2: list.bus })
}

/// Collects list entries and writes them eight at a time.
struct Entries<'a> {
    list: &'a ListSlot<'a>,
    pending: [u64; 8],
    count: usize,
}

impl Entries<'_> {
    fn push(&mut self, page: u64) -> Result<(), PrpError> {
        if self.count == LIST_ENTRIES {
            return Err(PrpError::Inexpressible);
        }
        self.pending[self.count % 8] = page;
        self.count += 1;
        if self.count.is_multiple_of(8) {
            self.flush(self.count - 8);
        }
        Ok(())
    }

    fn flush(&self, from: usize) {
        self.list.region.write_words(self.list.offset + from * 8, &self.pending);
    }

    /// What goes into PRP2.
    fn finish(self) -> u64 {
        match self.count {
            0 => 0,
            1 => self.pending[0],
            n => {
                if !n.is_multiple_of(8) {
                    self.flush(n & !7);
                }
                self.list.bus
            }
        }
    }
}

/// The data pointer for several segments, or for memory in scattered pages: page by page.
fn gather(
    table: &AddressTable,
    page_shift: u32,
    segs: &[Seg],
    skip: u32,
    len: u32,
    list: &ListSlot<'_>,
) -> Result<Prps, PrpError> {
    let mask = (1u64 << page_shift) - 1;
    let mut entries = Entries { list, pending: [0; 8], count: 0 };
    let mut prp1 = None;
    // Where the bytes so far ended; the next may go on there within the page.
    let mut end = 0;
    let mut skip = u64::from(skip);
    let mut left = u64::from(len);
    for seg in segs {
        let place = table.place(seg).ok_or(PrpError::Unmapped)?;
        let mut at = skip;
        let stop = u64::from(seg.len()).min(at.saturating_add(left));
        skip = skip.saturating_sub(u64::from(seg.len()));
        while at < stop {
            let bus = match place {
                Place::Run(base) => base + at,
                Place::Pages(pages, first) => {
                    let byte = first + at;
                    let page = pages.get((byte >> page_shift) as usize);
                    page.ok_or(PrpError::Unmapped)? + (byte & mask)
                }
            };
            let bytes = (stop - at).min(mask + 1 - (bus & mask));
            if prp1.is_none() {
                if bus & 3 != 0 {
                    return Err(PrpError::Inexpressible);
                }
                prp1 = Some(bus);
            } else if bus & mask != 0 {
                if bus != end {
                    return Err(PrpError::Inexpressible);
                }
            } else if end & mask == 0 {
                entries.push(bus)?;
            } else {
                return Err(PrpError::Inexpressible);
            }
            end = bus + bytes;
            at += bytes;
            left -= bytes;
        }
        if left == 0 {
            break;
        }
    }
    match prp1 {
        Some(prp1) if left == 0 => Ok(Prps { prp1, prp2: entries.finish() }),
        _ => Err(PrpError::Inexpressible),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::FakeMapper;
    use crate::memory::{DeviceMemory, IovaMap};
    use dma::PageSize;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    const LIST_BUS: u64 = 0x77_0000_0800;

    /// What the specification says a device reads: walks a data pointer byte by byte.
    fn walk(p: Prps, len: u64, shift: u32, list: &Region, list_at: usize) -> Vec<u64> {
        let page = 1u64 << shift;
        let mut bytes = Vec::new();
        let first = (page - p.prp1 % page).min(len);
        assert_eq!(p.prp1 % 4, 0, "PRP1 is a dword address");
        bytes.extend((0..first).map(|i| p.prp1 + i));
        let rest = len - first;
        let more: Vec<u64> = if rest == 0 {
            assert_eq!(p.prp2, 0, "an unused PRP2 is 0");
            vec![]
        } else if rest <= page {
            vec![p.prp2]
        } else {
            assert_eq!(p.prp2, LIST_BUS);
            let n = rest.div_ceil(page) as usize;
            (0..n).map(|i| list.load64(list_at + i * 8, Ordering::Relaxed)).collect()
        };
        let mut left = rest;
        for entry in more {
            assert_eq!(entry % page, 0, "only PRP1 has an offset");
            bytes.extend((0..left.min(page)).map(|i| entry + i));
            left -= left.min(page);
        }
        bytes
    }

    /// The plain reference: the bus address of every byte, or why they cannot be expressed.
    fn reference(bytes: &[u64], shift: u32) -> Option<()> {
        let page = 1u64 << shift;
        if !bytes[0].is_multiple_of(4) {
            return None;
        }
        for pair in bytes.windows(2) {
            // Neighbours within a page, or the end of one and the start of another.
            let goes_on = pair[1] == pair[0] + 1;
            let page_ends = (pair[0] + 1).is_multiple_of(page) && pair[1].is_multiple_of(page);
            if !goes_on && !page_ends {
                return None;
            }
        }
        Some(())
    }

    struct Fixture {
        table: AddressTable,
        list: Arc<Region>,
        data: Vec<(Arc<Region>, IovaMap)>,
        shift: u32,
    }

    impl Fixture {
        fn new(shift: u32, maps: Vec<IovaMap>, bytes: usize) -> Fixture {
            let regions: Vec<_> =
                maps.iter().map(|_| Region::new(bytes, PageSize::Small).unwrap()).collect();
            let data: Vec<_> = regions.into_iter().zip(maps).collect();
            let known: Vec<_> = data.iter().map(|(r, m)| (r.id(), m.clone())).collect();
            let mapper = FakeMapper::new(move |r| {
                known.iter().find(|k| k.0 == r.id()).map(|k| k.1.clone()).unwrap()
            });
            let mut table = AddressTable::new(DeviceMemory::new(mapper, shift));
            for (r, _) in &data {
                table.register(r).unwrap();
            }
            let list = Region::new(8192, PageSize::Small).unwrap();
            Fixture { table, list, data, shift }
        }

        fn bus(&self, region: usize, offset: u64) -> u64 {
            match &self.data[region].1 {
                IovaMap::Contiguous(b) => b + offset,
                IovaMap::Pages(p) => p[offset as usize / 4096] + offset % 4096,
            }
        }

        /// Builds and compares with the reference; `segs` are (region, offset, length).
        fn check(&self, segs: &[(usize, u64, u32)], skip: u32, len: u32) -> Result<Prps, PrpError> {
            let bytes: Vec<u64> = segs
                .iter()
                .flat_map(|&(r, o, l)| (o..o + u64::from(l)).map(move |b| (r, b)))
                .map(|(r, b)| self.bus(r, b))
                .skip(skip as usize)
                .take(len as usize)
                .collect();
            let list_at = 2048;
            self.list.write(0, &[0xee; 8192]);
            let list = ListSlot { region: &self.list, offset: list_at, bus: LIST_BUS };
            let segs: Vec<Seg> =
                segs.iter().map(|&(r, o, l)| self.data[r].0.seg(o, l).unwrap()).collect();
            let got = build(&self.table, self.shift, &segs, skip, len, &list);
            match (reference(&bytes, self.shift), got) {
                (Some(()), Ok(p)) => {
                    let seen = walk(p, u64::from(len), self.shift, &self.list, list_at);
                    assert!(seen == bytes, "{segs:?} {skip} {len}");
                }
                (None, Err(PrpError::Inexpressible)) => {}
                (want, got) => panic!("{segs:?} {skip} {len}: want {want:?}, got {got:?}"),
            }
            // Nothing but this list's own memory was written.
            let mut around = [0; 2048];
            self.list.read(0, &mut around);
            assert!(around.iter().all(|&b| b == 0xee));
            self.list.read(4096, &mut around);
            assert!(around.iter().all(|&b| b == 0xee));
            got
        }
    }

    #[test]
    fn the_three_forms() {
        let f = Fixture::new(12, vec![IovaMap::Contiguous(0x10_0000)], 1 << 20);
        let one = f.check(&[(0, 512, 3584)], 0, 3584).unwrap();
        assert_eq!(one, Prps { prp1: 0x10_0200, prp2: 0 });
        let two = f.check(&[(0, 512, 4096)], 0, 4096).unwrap();
        assert_eq!(two, Prps { prp1: 0x10_0200, prp2: 0x10_1000 });
        let list = f.check(&[(0, 512, 8192)], 0, 8192).unwrap();
        assert_eq!(list, Prps { prp1: 0x10_0200, prp2: LIST_BUS });
    }

    #[test]
    fn every_offset_and_length_of_one_run() {
        let f = Fixture::new(12, vec![IovaMap::Contiguous(0x10_0000)], 64 << 10);
        for offset in (0..4096).step_by(64).chain([4, 508, 516, 4092]) {
            for blocks in 1..=36 {
                f.check(&[(0, offset, blocks * 512)], 0, blocks * 512).unwrap();
            }
        }
        for odd in [1, 2, 3, 5, 4095] {
            assert_eq!(f.check(&[(0, odd, 512)], 0, 512), Err(PrpError::Inexpressible));
        }
    }

    #[test]
    fn the_longest_command_at_the_worst_offset_fills_the_list_exactly() {
        for map in [
            IovaMap::Contiguous(0x10_0000),
            IovaMap::Pages((0..257).map(|i| 0x100_0000 - i * 8192).collect()),
        ] {
            let f = Fixture::new(12, vec![map], (1 << 20) + 4096);
            f.check(&[(0, 4092, MAX_BYTES)], 0, MAX_BYTES).unwrap();
            f.check(&[(0, 0, MAX_BYTES)], 0, MAX_BYTES).unwrap();
        }
    }

    #[test]
    fn every_pair_and_triple_of_segments_from_a_small_set() {
        // Region 1 goes on on the bus where region 0 ends; region 2 is scattered pages.
        let f = Fixture::new(
            12,
            vec![
                IovaMap::Contiguous(0x10_0000),
                IovaMap::Contiguous(0x10_4000),
                IovaMap::Pages(Box::new([0x90_0000, 0x90_1000, 0x80_0000, 0xa0_0000])),
            ],
            16 << 10,
        );
        let mut pieces = Vec::new();
        for region in 0..3 {
            for offset in [0, 512, 1024, 3584, 4096, 4608, 8192, 12288, 15872] {
                for len in [512, 1024, 3584, 4096, 8192] {
                    if offset + u64::from(len) <= 16 << 10 {
                        pieces.push((region, offset, len));
                    }
                }
            }
        }
        let mut expressible = 0;
        for &a in &pieces {
            for &b in &pieces {
                let len = a.2 + b.2;
                expressible += u32::from(f.check(&[a, b], 0, len).is_ok());
                // The tail of a request that was split, and the head.
                f.check(&[a, b], 512, len - 512).ok();
                f.check(&[a, b], 0, len - 512).ok();
            }
        }
        assert!(expressible > 500, "{expressible}");
        for &a in pieces.iter().step_by(5) {
            for &b in pieces.iter().step_by(3) {
                for &c in pieces.iter().step_by(7) {
                    f.check(&[a, b, c], 0, a.2 + b.2 + c.2).ok();
                }
            }
        }
    }

    #[test]
    fn skip_may_pass_whole_segments() {
        let f = Fixture::new(12, vec![IovaMap::Contiguous(0x10_0000)], 64 << 10);
        let segs = [(0, 0, 4096), (0, 8192, 4096), (0, 16384, 8192)];
        for skip in (0..16384).step_by(512) {
            for len in (512..=16384 - skip).step_by(512) {
                f.check(&segs, skip, len).ok();
            }
        }
    }

    #[test]
    fn larger_pages() {
        let f = Fixture::new(14, vec![IovaMap::Contiguous(0x10_0000)], 256 << 10);
        for offset in [0, 512, 4096, 12288, 16380] {
            for len in [512, 4096, 16384, 32768, 65536] {
                f.check(&[(0, offset, len)], 0, len).unwrap();
            }
        }
        assert_eq!(
            f.check(&[(0, 0, 4096), (0, 16384, 4096)], 0, 8192),
            Err(PrpError::Inexpressible),
            "4 KiB is no whole page here"
        );
        f.check(&[(0, 12288, 4096), (0, 32768, 4096)], 0, 8192).unwrap();
    }

    #[test]
    fn unknown_memory() {
        let f = Fixture::new(12, vec![IovaMap::Contiguous(0x10_0000)], 8192);
        let stranger = Region::new(4096, PageSize::Small).unwrap();
        let list = ListSlot { region: &f.list, offset: 0, bus: LIST_BUS };
        let known = f.data[0].0.seg(0, 4096).unwrap();
        let segs = [known, stranger.seg(0, 4096).unwrap()];
        assert_eq!(build(&f.table, 12, &segs[1..], 0, 512, &list), Err(PrpError::Unmapped));
        assert_eq!(build(&f.table, 12, &segs, 0, 8192, &list), Err(PrpError::Unmapped));
        assert_eq!(build(&f.table, 12, &[], 0, 512, &list), Err(PrpError::Inexpressible));
        assert_eq!(
            build(&f.table, 12, &segs[..1], 0, 8192, &list),
            Err(PrpError::Inexpressible),
            "fewer bytes than asked for"
        );
    }
}
