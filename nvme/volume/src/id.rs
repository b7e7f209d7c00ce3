//! [`Id`]: the identity of a group, a device or a volume: 32 characters, shown with hyphens.

use std::fmt;
use std::io::{self, Read};

use crate::error::{Result, corrupt};

/// Characters of an identity.
const LEN: usize = 32;
/// Lengths of the parts between hyphens.
const PARTS: [usize; 7] = [6, 4, 4, 4, 4, 4, 6];
const ALPHABET: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// An identity, unique in the world by chance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; LEN]);

impl Id {
    /// A new one, from the kernel's random numbers.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn random() -> io::Result<Id> {
        let mut bytes = [0; LEN];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Id::from_noise(bytes))
    }

    /// The identity that these bytes, which should be random, stand for.
    pub fn from_noise(bytes: [u8; LEN]) -> Id {
        Id(bytes.map(|byte| ALPHABET[usize::from(byte) % ALPHABET.len()]))
    }

    /// Reads the 32 characters of a header.
    ///
    /// # Errors
    /// If one of them is not of an identity.
    pub fn from_raw(raw: [u8; LEN]) -> Result<Id> {
        // Old tools also used two more characters.
        match raw.iter().all(|c| ALPHABET.contains(c) || b"!#".contains(c)) {
            true => Ok(Id(raw)),
            false => corrupt("an identity holds other characters than it may"),
        }
    }

    /// Reads what [`Id`] shows.
    ///
    /// # Errors
    /// If it is not an identity.
    pub fn parse(text: &str) -> Result<Id> {
        let plain: Vec<u8> = text.bytes().filter(|&c| c != b'-').collect();
        match <[u8; LEN]>::try_from(plain) {
            Ok(raw) => Id::from_raw(raw),
            Err(_) => corrupt(format!("`{text}` is not an identity")),
        }
    }

    /// The 32 characters.
    pub fn raw(&self) -> &[u8; LEN] {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut at = 0;
        for part in PARTS {
            let hyphen = if at == 0 { "" } else { "-" };
            // All characters are of the alphabet.
            let text = String::from_utf8_lossy(&self.0[at..at + part]);
            write!(to, "{hyphen}{text}")?;
            at += part;
        }
        Ok(())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_shown_and_read() {
        let text = "CGRqFS-253q-ONnS-7xaS-KPbm-2RGk-L4KUlO";
        let id = Id::parse(text).unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.raw(), b"CGRqFS253qONnS7xaSKPbm2RGkL4KUlO");
        assert!(Id::parse("CGRqFS").is_err() && Id::parse(&text.replace('C', "\u{e9}")).is_err());
        assert_ne!(Id::random().unwrap(), Id::random().unwrap());
    }
}
