//! The checksum of labels, headers and texts: CRC-32 (the polynomial of Ethernet), begun with a
//! value of LVM's own and not inverted at the end.

/// What LVM begins with.
const INITIAL: u32 = 0xf597_a6cf;

/// The checksum of these bytes.
pub(crate) fn crc(bytes: &[u8]) -> u32 {
    // The library inverts its state at both ends.
    let mut hasher = crc32fast::Hasher::new_with_initial(!INITIAL);
    hasher.update(bytes);
    !hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_plain_bitwise_one() {
        let slow = |bytes: &[u8]| {
            bytes.iter().fold(INITIAL, |crc, &byte| {
                (0..8).fold(crc ^ u32::from(byte), |c, _| {
                    if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 }
                })
            })
        };
        for text in
            ["", "a", "LVM2 001", "a longer text that the library takes in blocks of its own"]
        {
            assert_eq!(crc(text.as_bytes()), slow(text.as_bytes()));
        }
    }
}
