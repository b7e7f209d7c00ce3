//! [`Layout`]: which byte lies where, without a division.

/// Chunks of `1 << shift` bytes dealt out to members in turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    shift: u32,
    members: u64,
    /// ⌊2^64 / members⌋ + 1: a product with it, shifted by 64, is the quotient for all numbers below
    /// 2^64 / members, so for all chunks that there can be (chunks are 4 KiB at least).
    inverse: u64,
}

impl Layout {
    /// `size`: a power of two; `members`: 2 to 2^12.
    pub(super) fn new(size: u64, members: usize) -> Layout {
        let members = members as u64;
        Layout { shift: size.ilog2(), members, inverse: u64::MAX / members + 1 }
    }

    /// Bytes of a chunk.
    pub(super) fn size(&self) -> u64 {
        1 << self.shift
    }

    /// Row and column of a chunk.
    #[inline]
    fn place(&self, chunk: u64) -> (u64, u64) {
        let row = ((u128::from(chunk) * u128::from(self.inverse)) >> 64) as u64;
        (row, chunk - row * self.members)
    }

    /// The member that has byte `at`, where on it, and how many bytes from there on it has in the
    /// same chunk.
    #[inline]
    pub(super) fn locate(&self, at: u64) -> (usize, u64, u64) {
        let mask = (1 << self.shift) - 1;
        let (row, column) = self.place(at >> self.shift);
        (column as usize, row << self.shift | at & mask, mask + 1 - (at & mask))
    }

    /// How many of the bytes before `at` lie on the member.
    pub(super) fn before(&self, member: usize, at: u64) -> u64 {
        let mask = (1u64 << self.shift) - 1;
        let (row, column) = self.place(at >> self.shift);
        let here = match column.cmp(&(member as u64)) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Equal => at & mask,
            std::cmp::Ordering::Greater => mask + 1,
        };
        (row << self.shift) + here
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_place_and_every_place_one_byte() {
        for members in 2..=7 {
            let l = Layout::new(4096, members);
            let mut next = vec![0; members];
            for chunk in 0..200u64 {
                let (member, at, left) = l.locate(chunk * 4096 + 512);
                assert_eq!((member as u64, left), (chunk % members as u64, 4096 - 512));
                assert_eq!(at, next[member] + 512);
                next[member] += 4096;
            }
        }
    }

    #[test]
    fn far_away_chunks_are_divided_right() {
        for members in 2..=32u64 {
            for shift in [12, 16, 30] {
                let l = Layout::new(1 << shift, members as usize);
                let last = u64::MAX >> shift;
                for chunk in [last, last - 1, last / 3, last / members * members, 1 << 40] {
                    let chunk = chunk.min(last);
                    assert_eq!(l.place(chunk), (chunk / members, chunk % members));
                }
            }
        }
    }

    #[test]
    fn ranges_are_counted_per_member() {
        let l = Layout::new(4096, 3);
        for (from, to) in [(0, 0), (0, 4096), (512, 8192), (4096, 100 * 4096), (5 * 4096, 6 * 4096)]
        {
            let mut count = [0u64; 3];
            let mut at = from;
            while at < to {
                count[l.locate(at).0] += 512;
                at += 512;
            }
            for (member, n) in count.into_iter().enumerate() {
                assert_eq!(l.before(member, to) - l.before(member, from), n);
            }
        }
    }
}
