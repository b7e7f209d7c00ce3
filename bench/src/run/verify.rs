//! Which blocks a job wrote, and whether they are read back right.

use std::collections::HashMap;

use super::Kind;
use super::choose::Choice;
use crate::Error;
use crate::stamp::{self, BLOCK};

/// Blocks of a page of the table.
const PAGE: usize = 1024;

/// A request for this block is under way: others would race with it.
const BUSY: u32 = 1 << 31;

/// Which blocks were written, and how often. Memory for what was touched, not for the disk.
pub(super) struct Written {
    pages: HashMap<u64, Box<[u32; PAGE]>>,
    out: Vec<u8>,
    pub(super) verified_bytes: u64,
}

/// The blocks of a range, of which the first and last byte are those of blocks.
fn blocks(offset: u64, len: u32) -> std::ops::Range<u64> {
    let first = offset / BLOCK as u64;
    first..first + u64::from(len) / BLOCK as u64
}

impl Written {
    /// For requests of at most so many bytes.
    pub(super) fn new(max_len: u32) -> Written {
        Written { pages: HashMap::new(), out: vec![0; max_len as usize], verified_bytes: 0 }
    }

    fn entry(&mut self, block: u64) -> &mut u32 {
        let page = self.pages.entry(block / PAGE as u64);
        &mut page.or_insert_with(|| Box::new([0; PAGE]))[(block % PAGE as u64) as usize]
    }

    fn get(&self, block: u64) -> u32 {
        let page = self.pages.get(&(block / PAGE as u64));
        page.map_or(0, |p| p[(block % PAGE as u64) as usize])
    }

    /// Whether no other request is under way to any of its blocks.
    pub(super) fn is_free(&self, c: &Choice) -> bool {
        blocks(c.offset, c.len).all(|b| self.get(b) & BUSY == 0)
    }

    /// Keeps its blocks for a request, and returns what it writes, if it does.
    pub(super) fn begin(&mut self, c: &Choice) -> Option<&[u8]> {
        let write = c.kind == Kind::Write;
        for (i, block) in blocks(c.offset, c.len).enumerate() {
            let entry = self.entry(block);
            if write {
                // Generation 0 is of blocks that were never written.
                *entry = (*entry + 1) % BUSY;
                *entry = (*entry).max(1);
            }
            let generation = *entry;
            *entry |= BUSY;
            if write && let Some(out) = self.out[i * BLOCK..].first_chunk_mut::<BLOCK>() {
                stamp::fill(out, block, generation);
            }
        }
        write.then(|| &self.out[..c.len as usize])
    }

    /// Takes back what [`Written::begin`] did for a request that was not sent.
    pub(super) fn undo(&mut self, c: &Choice) {
        for block in blocks(c.offset, c.len) {
            let entry = self.entry(block);
            *entry &= !BUSY;
            if c.kind == Kind::Write {
                *entry -= 1;
            }
        }
    }

    /// A request has ended. Of what was discarded, and of writes that failed, nobody knows what is there.
    ///
    /// # Errors
    /// If a read found something else than what was written.
    pub(super) fn end(&mut self, c: &Choice, failed: bool, data: &[u8]) -> Result<(), Error> {
        let mut wrong = Ok(());
        for (i, block) in blocks(c.offset, c.len).enumerate() {
            let entry = self.entry(block);
            *entry &= !BUSY;
            let generation = *entry;
            match c.kind {
                Kind::Trim => *entry = 0,
                Kind::Write if failed => *entry = 0,
                Kind::Read if !failed && generation > 0 && wrong.is_ok() => {
                    let found = data.get(i * BLOCK..(i + 1) * BLOCK).unwrap_or_default();
                    wrong = check(found, block, generation);
                    self.verified_bytes += if wrong.is_ok() { BLOCK as u64 } else { 0 };
                }
                _ => {}
            }
        }
        wrong
    }

    /// All that must be there, in order, as reads of at most `max_len` bytes.
    pub(super) fn all(&self, max_len: u32) -> Vec<Choice> {
        let mut pages: Vec<u64> = self.pages.keys().copied().collect();
        pages.sort_unstable();
        let mut reads: Vec<Choice> = Vec::new();
        for page in pages {
            for block in page * PAGE as u64..(page + 1) * PAGE as u64 {
                if self.get(block) == 0 {
                    continue;
                }
                let offset = block * BLOCK as u64;
                match reads.last_mut() {
                    Some(last)
                        if last.offset + u64::from(last.len) == offset
                            && last.len + BLOCK as u32 <= max_len =>
                    {
                        last.len += BLOCK as u32;
                    }
                    _ => reads.push(Choice { kind: Kind::Read, offset, len: BLOCK as u32 }),
                }
            }
        }
        reads
    }
}

/// Whether this is the block, every byte of it.
fn check(found: &[u8], block: u64, generation: u32) -> Result<(), Error> {
    if stamp::verify(found, block, generation) {
        return Ok(());
    }
    let mut right = [0; BLOCK];
    stamp::fill(&mut right, block, generation);
    let same = found.iter().zip(&right).take_while(|(a, b)| a == b).count();
    let at = block * BLOCK as u64 + same as u64;
    let word = |at: usize| found.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let what = match (word(0), word(8)) {
        (Some(b), Some(g))
            if u32::try_from(g).is_ok_and(|g| g > 0 && stamp::verify(found, b, g)) =>
        {
            format!("what was written to byte {} for the {g}th time", u128::from(b) * BLOCK as u128)
        }
        _ if found.iter().all(|&b| b == 0) => "zeroes".to_owned(),
        _ => "something else".to_owned(),
    };
    Err(Error::other(format!(
        "verification: byte {at} is wrong: the block at {} was written {generation} times, and read \
         back was {what}",
        block * BLOCK as u64
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(kind: Kind, block: u64, count: u32) -> Choice {
        Choice { kind, offset: block * BLOCK as u64, len: count * BLOCK as u32 }
    }

    #[test]
    fn what_was_written_is_known_and_a_wrong_byte_named() {
        let mut w = Written::new(3 * BLOCK as u32);
        let write = choice(Kind::Write, 1023, 3);
        let data = w.begin(&write).unwrap().to_vec();
        assert!(
            !w.is_free(&choice(Kind::Read, 1024, 1)) && w.is_free(&choice(Kind::Read, 1026, 1))
        );
        w.end(&write, false, &[]).unwrap();
        let read = choice(Kind::Read, 1023, 3);
        assert!(w.is_free(&read) && w.begin(&read).is_none());
        w.end(&read, false, &data).unwrap();
        assert_eq!(w.verified_bytes, 3 * BLOCK as u64);
        assert_eq!(w.all(1 << 20), [read]);
        assert_eq!(w.all(BLOCK as u32).len(), 3);
        let told = |w: &mut Written, data: &[u8]| {
            w.begin(&read);
            w.end(&read, false, data).unwrap_err().to_string()
        };
        let mut bad = data.clone();
        bad[BLOCK + 77] ^= 1;
        let text = told(&mut w, &bad);
        assert!(text.contains(&format!("byte {} is wrong", 1024 * BLOCK + 77)), "{text}");
        bad[BLOCK..2 * BLOCK].fill(0);
        assert!(told(&mut w, &bad).contains("read back was zeroes"));
        // The right block of another place, and nothing at all.
        bad[BLOCK..2 * BLOCK].copy_from_slice(&data[..BLOCK]);
        assert!(told(&mut w, &bad).contains(&format!("written to byte {} for", 1023 * BLOCK)));
        assert!(
            told(&mut w, &[]).contains("something else") || told(&mut w, &[]).contains("zeroes")
        );
    }

    #[test]
    fn of_discards_and_failed_writes_nothing_is_known() {
        let mut w = Written::new(BLOCK as u32);
        let (write, trim) = (choice(Kind::Write, 5, 1), choice(Kind::Trim, 5, 1));
        for end in [write, trim] {
            w.begin(&write);
            w.end(&write, false, &[]).unwrap();
            assert_eq!(w.all(4096).len(), 1);
            w.begin(&end);
            w.end(&end, end.kind == Kind::Write, &[]).unwrap();
            assert!(w.all(4096).is_empty());
        }
        // A write that was not sent has not been.
        w.begin(&write);
        w.end(&write, false, &[]).unwrap();
        let old = w.get(5);
        w.begin(&write);
        w.undo(&write);
        assert_eq!(w.get(5), old);
    }
}
