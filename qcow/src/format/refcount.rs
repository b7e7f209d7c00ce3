//! Refcounts of 1 to 64 bits packed in a refcount block ("Host cluster management").

use super::Geometry;

/// The refcount at `index` of a block whose entries are `1 << order` bits wide.
///
/// Widths below a byte are packed from the least significant bit up; wider ones are big-endian.
///
/// # Panics
/// If the index lies outside the block.
#[inline]
pub fn get_refcount(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per_byte = 3 - order;
            let shift = (index & ((1 << per_byte) - 1)) << order;
            let mask = (1u64 << (1 << order)) - 1;
            (u64::from(block[index >> per_byte]) >> shift) & mask
        }
        _ => {
            let bytes = 1usize << (order - 3);
            block[index * bytes..(index + 1) * bytes]
                .iter()
                .fold(0, |value, &b| (value << 8) | u64::from(b))
        }
    }
}

/// Sets the refcount at `index`; `value` must fit the width.
///
/// # Panics
/// If the index lies outside the block.
#[inline]
pub fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(order == 6 || value < 1 << (1 << order));
    match order {
        0..=2 => {
            let per_byte = 3 - order;
            let shift = (index & ((1 << per_byte) - 1)) << order;
            let mask = ((1u32 << (1 << order)) - 1) as u8;
            let byte = &mut block[index >> per_byte];
            *byte = (*byte & !(mask << shift)) | ((value as u8 & mask) << shift);
        }
        _ => {
            let bytes = 1usize << (order - 3);
            block[index * bytes..(index + 1) * bytes]
                .copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
        }
    }
}

/// One refcount block in memory, as it stands on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefcountBlock {
    bytes: Vec<u8>,
    order: u32,
}

impl RefcountBlock {
    /// All zeroes.
    pub fn new(geometry: &Geometry) -> RefcountBlock {
        RefcountBlock {
            bytes: vec![0; geometry.cluster_size() as usize],
            order: geometry.refcount_order(),
        }
    }

    /// The refcount at `index`, below [`Geometry::refcount_block_entries`].
    pub fn get(&self, index: usize) -> u64 {
        get_refcount(&self.bytes, self.order, index)
    }

    /// Sets the refcount at `index`; at most [`Geometry::refcount_max`].
    pub fn set(&mut self, index: usize, value: u64) {
        set_refcount(&mut self.bytes, self.order, index, value);
    }

    /// The block as it stands on disk.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// To read a block into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Whether nothing in it is in use.
    pub fn is_zero(&self) -> bool {
        self.bytes.iter().all(|&b| b == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_as_the_specification_says() {
        let mut b = [0u8; 16];
        set_refcount(&mut b, 0, 9, 1);
        assert_eq!(b[..2], [0, 0b10]);
        let mut b = [0u8; 16];
        set_refcount(&mut b, 1, 5, 3);
        assert_eq!(b[..2], [0, 0b1100]);
        let mut b = [0u8; 16];
        set_refcount(&mut b, 2, 3, 0xa);
        assert_eq!(b[..2], [0, 0xa0]);
        let mut b = [0u8; 16];
        set_refcount(&mut b, 4, 1, 0x1234);
        assert_eq!(b[..4], [0, 0, 0x12, 0x34]);
        let mut b = [0u8; 16];
        set_refcount(&mut b, 6, 1, 0x0102_0304_0506_0708);
        assert_eq!(b[8..], [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn every_width_against_a_plain_array() {
        for order in 0..=6 {
            let g = Geometry::new(3, 9, order, 0).unwrap();
            let mut block = RefcountBlock::new(&g);
            assert!(block.is_zero());
            let n = g.refcount_block_entries();
            let mut plain = vec![0u64; n];
            let mut x = 88172645463325252u64;
            for _ in 0..3 * n {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                let (i, v) = ((x >> 32) as usize % n, x & g.refcount_max());
                plain[i] = v;
                block.set(i, v);
            }
            for (i, &v) in plain.iter().enumerate() {
                assert_eq!(block.get(i), v, "order {order} index {i}");
            }
        }
    }
}
