//! Physical Region Pages (NVMe 1.4 §4.3): from the two entries of a command to the spans of host
//! memory that its data lies in.
//!
//! The lists lie in host memory and may change while they are read or be nonsense: every entry is
//! read once, and the work is bounded by the length of the transfer.

use nvme_spec::{PRP_ENTRY_SIZE, StatusCode};
use zerocopy::IntoBytes;

use crate::memory::{DmaFault, HostMemory};

/// A run of bus addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Span {
    pub(crate) addr: u64,
    pub(crate) len: u32,
}

/// Why the data pointer of a command cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PrpError {
    /// An entry has an offset where none is allowed, or is not aligned.
    Offset,
    /// The list itself cannot be read.
    Fault(DmaFault),
}

impl PrpError {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            PrpError::Offset => StatusCode::INVALID_PRP_OFFSET,
            PrpError::Fault(_) => StatusCode::DATA_TRANSFER_ERROR,
        }
    }
}

/// Entries read from a list at a time.
const BATCH: usize = 64;

/// Fills `out` with the spans of a transfer of `len` bytes (at most 2^31), neighbours merged.
/// `page` is the memory page size in bytes (CC.MPS).
pub(crate) fn walk<M: HostMemory>(
    mem: &mut M,
    page: u64,
    prp1: u64,
    prp2: u64,
    len: u64,
    out: &mut Vec<Span>,
) -> Result<(), PrpError> {
    out.clear();
    if len == 0 {
        return Ok(());
    }
    if !prp1.is_multiple_of(4) {
        return Err(PrpError::Offset);
    }
    let first = len.min(page - prp1 % page);
    push(out, prp1, first);
    let rest = len - first;
    if rest == 0 {
        Ok(())
    } else if rest <= page {
        if !prp2.is_multiple_of(page) {
            return Err(PrpError::Offset);
        }
        push(out, prp2, rest);
        Ok(())
    } else {
        walk_list(mem, page, prp2, rest, out)
    }
}

fn walk_list<M: HostMemory>(
    mem: &mut M,
    page: u64,
    list: u64,
    mut rest: u64,
    out: &mut Vec<Span>,
) -> Result<(), PrpError> {
    const ENTRY: u64 = PRP_ENTRY_SIZE as u64;
    if !list.is_multiple_of(ENTRY) {
        return Err(PrpError::Offset);
    }
    let mut at = list;
    let mut batch = [0u64; BATCH];
    loop {
        // Entries from here to the end of the list's page; the last one points to the next page
        // of the list if more are needed than fit.
        let slots = (page - at % page) / ENTRY;
        let needed = rest.div_ceil(page);
        let chained = needed > slots;
        let mut data_entries = if chained { slots - 1 } else { needed };
        while data_entries > 0 {
            let n = data_entries.min(BATCH as u64) as usize;
            mem.read(at, batch[..n].as_mut_bytes()).map_err(PrpError::Fault)?;
            for entry in batch[..n].iter().map(|&e| u64::from_le(e)) {
                if !entry.is_multiple_of(page) {
                    return Err(PrpError::Offset);
                }
                let here = rest.min(page);
                push(out, entry, here);
                rest -= here;
            }
            // Cannot wrap: the read just succeeded, or the page ends at 2^64 and so does the list.
            at = at.wrapping_add(n as u64 * ENTRY);
            data_entries -= n as u64;
        }
        if !chained {
            return Ok(());
        }
        mem.read(at, batch[..1].as_mut_bytes()).map_err(PrpError::Fault)?;
        at = u64::from_le(batch[0]);
        if !at.is_multiple_of(page) {
            return Err(PrpError::Offset);
        }
    }
}

#[inline]
fn push(out: &mut Vec<Span>, addr: u64, len: u64) {
    let len = len as u32;
    if let Some(last) = out.last_mut()
        && last.addr.checked_add(u64::from(last.len)) == Some(addr)
    {
        last.len += len;
        return;
    }
    out.push(Span { addr, len });
}

/// Cuts spans into pieces as the data is moved.
pub(crate) struct Pieces<'a> {
    spans: &'a [Span],
    done: u32,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(spans: &'a [Span]) -> Pieces<'a> {
        Pieces { spans, done: 0 }
    }

    /// The next run of at most `max` bytes (at least 1): bus address and length.
    #[inline]
    pub(crate) fn next(&mut self, max: usize) -> Option<(u64, usize)> {
        let (span, rest) = self.spans.split_first()?;
        let left = span.len - self.done;
        let n = left.min(u32::try_from(max).unwrap_or(u32::MAX));
        let addr = span.addr.wrapping_add(u64::from(self.done));
        if n == left {
            self.spans = rest;
            self.done = 0;
        } else {
            self.done += n;
        }
        Some((addr, n as usize))
    }

    /// Bytes that are left.
    pub(crate) fn remaining(&self) -> u64 {
        self.spans.iter().map(|s| u64::from(s.len)).sum::<u64>() - u64::from(self.done)
    }

    /// Passes over `n` bytes.
    pub(crate) fn skip(&mut self, mut n: u64) {
        while n > 0 {
            match self.next(usize::try_from(n).unwrap_or(usize::MAX)) {
                Some((_, got)) => n -= got as u64,
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Iommu, RegionMemory, iommu};
    use dma::{PageSize, Region};
    use std::sync::Arc;

    fn memory() -> (Iommu, RegionMemory, Arc<Region>) {
        let (mut host, dev) = iommu();
        let region = Region::new(64 << 10, PageSize::Small).unwrap();
        host.map_at(0, &region).unwrap();
        (host, dev, region)
    }

    fn spans(
        dev: &mut RegionMemory,
        prp1: u64,
        prp2: u64,
        len: u64,
    ) -> Result<Vec<Span>, PrpError> {
        let mut out = Vec::new();
        walk(dev, 4096, prp1, prp2, len, &mut out).map(|()| out)
    }

    fn span(addr: u64, len: u32) -> Span {
        Span { addr, len }
    }

    #[test]
    fn one_and_two_entries() {
        let (_host, mut dev, _) = memory();
        assert_eq!(spans(&mut dev, 0x1200, 0x7777, 0xe00), Ok(vec![span(0x1200, 0xe00)]));
        assert_eq!(
            spans(&mut dev, 0x1200, 0x5000, 0x1000),
            Ok(vec![span(0x1200, 0xe00), span(0x5000, 0x200)])
        );
        assert_eq!(spans(&mut dev, 0x1000, 0x2000, 0x2000), Ok(vec![span(0x1000, 0x2000)]));
        assert_eq!(spans(&mut dev, 0x1002, 0, 512), Err(PrpError::Offset));
        assert_eq!(spans(&mut dev, 0x1004, 0, 512), Ok(vec![span(0x1004, 512)]));
        assert_eq!(spans(&mut dev, 0x1200, 0x5200, 0x1000), Err(PrpError::Offset));
        assert_eq!(spans(&mut dev, 0, 0, 0), Ok(vec![]));
        // No arithmetic trap at the end of the address space.
        assert_eq!(
            spans(&mut dev, u64::MAX - 4095, u64::MAX - 4095, 8192),
            Ok(vec![span(u64::MAX - 4095, 4096), span(u64::MAX - 4095, 4096)])
        );
    }

    #[test]
    fn lists_with_offset_and_chain() {
        let (_host, mut dev, region) = memory();
        // The list begins three entries before the end of its page: two data entries and a
        // pointer to the page at 0x2000.
        for (at, entry) in
            [(0x1fe8u64, 0x10_0000u64), (0x1ff0, 0x20_0000), (0x1ff8, 0x2000), (0x2000, 0x30_0000)]
        {
            region.write(at as usize, &entry.to_le_bytes());
        }
        region.write(0x2008, &0x40_0000u64.to_le_bytes());
        assert_eq!(
            spans(&mut dev, 0x9800, 0x1fe8, 0x800 + 0x3000 + 0x10),
            Ok(vec![
                span(0x9800, 0x800),
                span(0x10_0000, 0x1000),
                span(0x20_0000, 0x1000),
                span(0x30_0000, 0x1000),
                span(0x40_0000, 0x10)
            ])
        );
        // Exactly three more pages fit the rest of the page: no chain.
        region.write(0x1ff8, &0x50_0000u64.to_le_bytes());
        assert_eq!(spans(&mut dev, 0x9000, 0x1fe8, 0x4000).unwrap()[3], span(0x50_0000, 0x1000));
        assert_eq!(spans(&mut dev, 0x9000, 0x1fec, 0x4000), Err(PrpError::Offset));
        region.write(0x1ff8, &0x2008u64.to_le_bytes());
        assert_eq!(spans(&mut dev, 0x9000, 0x1fe8, 0x5000), Err(PrpError::Offset));
        region.write(0x1ff0, &0x50_0200u64.to_le_bytes());
        assert_eq!(spans(&mut dev, 0x9000, 0x1fe8, 0x4000), Err(PrpError::Offset));
        assert!(matches!(spans(&mut dev, 0x9000, 1 << 40, 0x4000), Err(PrpError::Fault(_))));
    }

    #[test]
    fn a_list_that_points_to_itself_ends() {
        let (_host, mut dev, region) = memory();
        for i in 0..512 {
            region.write(0x1000 + i * 8, &0x1000u64.to_le_bytes());
        }
        let out = spans(&mut dev, 0, 0x1000, 256 << 20).unwrap();
        assert_eq!(out.iter().map(|s| u64::from(s.len)).sum::<u64>(), 256 << 20);
    }

    #[test]
    fn pieces() {
        let list = [span(100, 10), span(300, 5)];
        let mut p = Pieces::new(&list);
        assert_eq!(p.next(4), Some((100, 4)));
        p.skip(7);
        assert_eq!(p.next(100), Some((301, 4)));
        assert_eq!(p.next(1), None);
        p.skip(3);
    }
}
