//! Blocks that prove where they belong: block number, generation, and a CRC over all of it.

/// Bytes of a stamped block.
pub(crate) const BLOCK: usize = 4096;

/// Fills `block` for block number `lba`, written for the `generation`th time. Generation 0 is a
/// block that was never written: zeroes.
pub(crate) fn fill(block: &mut [u8; BLOCK], lba: u64, generation: u32) {
    if generation == 0 {
        block.fill(0);
        return;
    }
    let mut word = (lba << 32 | u64::from(generation)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for chunk in block[24..].chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(0x2545_f491_4f6c_dd1d);
    }
    block[..8].copy_from_slice(&lba.to_le_bytes());
    block[8..12].copy_from_slice(&generation.to_le_bytes());
    block[12..16].fill(0);
    let crc = crc32fast::hash(&block[24..]);
    block[16..24].copy_from_slice(&(u64::from(crc) << 32 | 0x706f_6c6c).to_le_bytes());
}

/// Whether `block` is block `lba` of this generation, every byte of it.
pub(crate) fn verify(block: &[u8], lba: u64, generation: u32) -> bool {
    if block.len() != BLOCK {
        return false;
    }
    if generation == 0 {
        return block.iter().all(|&b| b == 0);
    }
    let crc = u64::from(crc32fast::hash(&block[24..])) << 32 | 0x706f_6c6c;
    block[..8] == lba.to_le_bytes()
        && block[8..12] == generation.to_le_bytes()
        && block[12..16] == [0; 4]
        && block[16..24] == crc.to_le_bytes()
        && first_word(block)
            == (lba << 32 | u64::from(generation)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn first_word(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[24..32].try_into().unwrap_or([0; 8]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_and_every_wrong_place_is_noticed() {
        let mut b = [0; BLOCK];
        fill(&mut b, 77, 3);
        assert!(verify(&b, 77, 3) && !verify(&b, 78, 3) && !verify(&b, 77, 4));
        assert!(!verify(&b, 77, 0) && !verify(&b[..512], 77, 3));
        for i in 0..BLOCK {
            b[i] ^= 1;
            assert!(!verify(&b, 77, 3), "byte {i}");
            b[i] ^= 1;
        }
        fill(&mut b, 5, 0);
        assert!(verify(&b, 5, 0));
        b[4000] = 1;
        assert!(!verify(&b, 5, 0));
    }
}
