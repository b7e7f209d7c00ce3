//! [`Address`]: where a PCI function is.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A PCI function's address, `DDDD:BB:DD.F` in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Address {
    /// Segment.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl FromStr for Address {
    type Err = Error;

    /// Takes exactly `DDDD:BB:DD.F`: a shortened address might be another function than was meant.
    fn from_str(text: &str) -> Result<Address, Error> {
        let parse = || {
            let bytes = text.as_bytes();
            let shape = |i: usize, b: &u8| match i {
                4 | 7 => *b == b':',
                10 => *b == b'.',
                _ => b.is_ascii_hexdigit(),
            };
            if bytes.len() != 12 || !bytes.iter().enumerate().all(|(i, b)| shape(i, b)) {
                return None;
            }
            // The digits were looked at above, so a sign cannot slip in.
            let hex = |at: std::ops::Range<usize>| u16::from_str_radix(text.get(at)?, 16).ok();
            let device = hex(8..10)? as u8;
            let function = hex(11..12)? as u8;
            (device < 32 && function < 8).then_some(Address {
                domain: hex(0..4)?,
                bus: hex(5..7)? as u8,
                device,
                function,
            })
        };
        parse().ok_or_else(|| Error::Address(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for text in ["0000:01:00.0", "ffff:ff:1f.7", "0001:a0:0b.3"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("000A:AB:1C.1".parse::<Address>().unwrap().to_string(), "000a:ab:1c.1");
        for bad in [
            "",
            "01:00.0",
            "0000:01:00",
            "0000:01:00.8",
            "0000:01:20.0",
            "0000:01:00.0 ",
            "0000:01:00.00",
            "00000:1:00.0",
            "+000:01:00.0",
            "0000:+1:00.0",
            "0000:01:00:0",
            "0000.01:00.0",
            "g000:01:00.0",
            "0000:01:0é.0",
            "../0:01:00.0",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad:?}");
        }
    }
}
