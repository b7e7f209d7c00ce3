//! Filling the map with what nearly all L2 entries are: clusters of data that lie side by side, or each
//! by itself, with nothing special about them. What is, is left to [`super::resolve`], entry by entry.

use super::shared::Shared;
use crate::format::{Geometry, plain_run};
use crate::map::Word;

impl Shared {
    /// Fills those of `words` that are not known yet with what the entries in `list` of layer `at` say,
    /// where these are of plain data that nothing is wrong with. Both begin at guest offset `start`, and
    /// a word stands for a cluster of the layer. Returns how many were filled.
    pub(super) fn take_plain(
        &self,
        at: usize,
        g: &Geometry,
        start: u64,
        list: &[u64],
        words: &mut [Word],
    ) -> usize {
        if g.extended_l2() || g.data_file() {
            return 0;
        }
        // The last one may end with the disk or its layer.
        let whole = self.stack.layers[at].size().saturating_sub(start) >> g.cluster_bits();
        let whole = usize::try_from(whole).unwrap_or(usize::MAX);
        let mut list = &list[..list.len().min(words.len()).min(whole)];
        let (mut words, mut filled) = (words, 0);
        while let Some((host, copied, count)) = plain_run(list, g) {
            let (run, rest) = std::mem::take(&mut words).split_at_mut(count);
            let owned = copied && at == self.top_at();
            match host {
                Some(host) if self.is_sound(at, g, host, count as u64) => {
                    filled += fill(run, at, g, host, owned);
                }
                // Something is wrong with one of them at least.
                Some(host) if count > 1 => {
                    for (i, word) in run.iter_mut().enumerate() {
                        let host = host + ((i as u64) << g.cluster_bits());
                        if self.is_sound(at, g, host, 1) {
                            filled += fill(std::slice::from_mut(word), at, g, host, owned);
                        }
                    }
                }
                _ => {}
            }
            (words, list) = (rest, &list[count..]);
        }
        filled
    }

    /// Whether `count` clusters from `host` on may be mapped by layer `at`, as [`Shared::decode`] would
    /// find: they lie before its end, none is metadata, and all seem to be counted.
    fn is_sound(&self, at: usize, g: &Geometry, host: u64, count: u64) -> bool {
        let first = g.cluster(host);
        let last = first + (count - 1);
        if last << g.cluster_bits() >= self.end_of(at) {
            return false;
        }
        if at != self.top_at() {
            return true;
        }
        let alloc = self.alloc.borrow();
        if count == 1 {
            return !alloc.is_metadata(first)
                && (self.info.read_only || alloc.seems_counted(first));
        }
        !alloc.metadata.meets_any(&(first..last + 1))
            && (self.info.read_only || alloc.seem_counted(first, last))
    }
}

/// Maps those of `run` that are not known to clusters from `host` on. Returns how many.
fn fill(run: &mut [Word], at: usize, g: &Geometry, host: u64, owned: bool) -> usize {
    let mut filled = 0;
    for (word, host) in run.iter_mut().zip((host..).step_by(g.cluster_size() as usize)) {
        if *word == Word::ABSENT {
            *word = Word::mapped(at as u8, host, owned);
            filled += 1;
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use crate::format::{Geometry, L2Entry, RawL2, plain_run};

    const COPIED: u64 = 1 << 63;

    /// Every entry of a run is what decoding it alone gives, and no run could be longer.
    fn compare(list: &[u64], g: &Geometry) {
        let entry = |word| L2Entry::decode(RawL2 { word, bitmap: 0 }, g);
        let mut at = 0;
        while let Some((host, copied, count)) = plain_run(&list[at..], g) {
            assert!(count > 0);
            for i in 0..count {
                let found = entry(list[at + i]);
                let host = host.map(|h| h + i as u64 * g.cluster_size());
                match host {
                    Some(host) => assert_eq!(found, Ok(L2Entry::Normal { host, copied })),
                    None => {
                        let plain = matches!(found, Ok(L2Entry::Normal { .. }));
                        assert!(!plain && count == 1, "{:#x}", list[at]);
                    }
                }
            }
            let next = host.map(|h| h + count as u64 * g.cluster_size());
            if let (Some(next), Some(&word)) = (next, list.get(at + count)) {
                assert_ne!(entry(word), Ok(L2Entry::Normal { host: next, copied }));
            }
            at += count;
        }
        assert_eq!(at, list.len());
    }

    #[test]
    fn runs_are_what_their_entries_are_one_by_one() {
        let mut x = 0x1234_5678_9abc_def1u64;
        let mut random = |n: u64| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 33) % n
        };
        for (version, bits) in [(2, 16), (3, 16), (3, 9), (3, 21)] {
            let g = Geometry::new(version, bits, 4, 1 << 30).unwrap();
            let size = g.cluster_size();
            for _ in 0..300 {
                let mut list = Vec::new();
                while list.len() < 64 {
                    let host = random(1 << 20) * size;
                    let odd =
                        [0, 1, size, size / 2, 1 << 62, 1 << 56, 512, COPIED, (1 << 56) - size];
                    let first = match random(4) {
                        0 => odd[random(9) as usize] | (COPIED * random(2)),
                        _ => host | (COPIED * random(2)),
                    };
                    list.extend((0..1 + random(9)).map(|i| first.wrapping_add(i * size)));
                }
                compare(&list, &g);
            }
        }
        let g = Geometry::new(3, 16, 4, 1 << 30).unwrap();
        assert_eq!(plain_run(&[], &g), None);
        // The last cluster that an entry can name, and what would be behind it.
        let last = (1 << 56) - (1 << 16);
        assert_eq!(plain_run(&[last, last + (1 << 16)], &g), Some((Some(last), false, 1)));
    }
}
