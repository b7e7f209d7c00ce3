//! [`Perm`]: who may do what with a node.

use super::wire::decimal;

/// One entry of a node's permissions. The first of a list names the owner, who may do all, and says
/// what everybody may do who is in no other entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Perm {
    /// The domain.
    pub domid: u16,
    /// It may read.
    pub read: bool,
    /// It may write, and make nodes below.
    pub write: bool,
}

impl Perm {
    /// An entry for a domain that may do neither: as the first of a list, a node of its own.
    pub const fn none(domid: u16) -> Perm {
        Perm { domid, read: false, write: false }
    }

    /// An entry for a domain that may read.
    pub const fn read(domid: u16) -> Perm {
        Perm { domid, read: true, write: false }
    }

    /// As text: a letter and the domain.
    pub(crate) fn encode(self) -> String {
        let letter = match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        };
        format!("{letter}{}", self.domid)
    }

    /// From text.
    pub(crate) fn decode(text: &[u8]) -> Option<Perm> {
        let (letter, domid) = text.split_first()?;
        let domid = u16::try_from(decimal(domid)?).ok()?;
        let (read, write) = match letter {
            b'n' => (false, false),
            b'r' => (true, false),
            b'w' => (false, true),
            b'b' => (true, true),
            _ => return None,
        };
        Some(Perm { domid, read, write })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, perm) in [
            (&b"n0"[..], Some(Perm::none(0))),
            (b"r65535", Some(Perm::read(65535))),
            (b"w3", Some(Perm { domid: 3, read: false, write: true })),
            (b"b12", Some(Perm { domid: 12, read: true, write: true })),
            (b"", None),
            (b"r", None),
            (b"x1", None),
            (b"r65536", None),
            (b"r-1", None),
        ] {
            assert_eq!(Perm::decode(text), perm, "{text:?}");
            if let Some(perm) = perm {
                assert_eq!(perm.encode().as_bytes(), text);
            }
        }
    }
}
