//! The wire protocol of xenstore: messages of a header and at most [`MAX_PAYLOAD`] bytes. Pure.
//!
//! Follows `xen/io/xs_wire.h`. What comes in is hostile as to length and form.

use nix::errno::Errno;

/// Bytes of a header: four words, little endian.
pub(crate) const HEADER: usize = 16;

/// Most bytes behind a header; whoever sends more is cut off.
pub(crate) const MAX_PAYLOAD: usize = 4096;

/// Most bytes of a list of names: a guest's quota of nodes allows for much less. oxenstored (4.17, seen)
/// has no lists in parts, and sends long ones on a socket as one message all the same.
pub(crate) const MAX_LIST: usize = 1 << 20;

/// `XENSTORE_ABS_PATH_MAX`
pub(crate) const MAX_PATH: usize = 3072;

/// What a message is: `enum xsd_sockmsg_type`.
pub(crate) mod kind {
    pub(crate) const DIRECTORY: u32 = 1;
    pub(crate) const READ: u32 = 2;
    pub(crate) const GET_PERMS: u32 = 3;
    pub(crate) const WATCH: u32 = 4;
    pub(crate) const UNWATCH: u32 = 5;
    pub(crate) const TRANSACTION_START: u32 = 6;
    pub(crate) const TRANSACTION_END: u32 = 7;
    pub(crate) const WRITE: u32 = 11;
    pub(crate) const MKDIR: u32 = 12;
    pub(crate) const RM: u32 = 13;
    pub(crate) const SET_PERMS: u32 = 14;
    pub(crate) const WATCH_EVENT: u32 = 15;
    pub(crate) const ERROR: u32 = 16;
    pub(crate) const DIRECTORY_PART: u32 = 22;
}

/// One message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    pub(crate) kind: u32,
    pub(crate) req_id: u32,
    pub(crate) payload: Vec<u8>,
}

/// A message as it is sent. The payload is at most [`MAX_PAYLOAD`] bytes.
pub(crate) fn encode(kind: u32, req_id: u32, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [kind, req_id, tx_id, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Puts messages together from a stream that comes in any pieces.
#[derive(Default, Debug)]
pub(crate) struct Parser {
    /// Less than one message, once all that are whole were taken.
    bytes: Vec<u8>,
}

/// A message says that it is longer than any may be; the stream is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TooLong(pub(crate) u32);

impl Parser {
    /// Takes what was read.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message. To be called until there is none, after each [`Parser::push`].
    pub(crate) fn next(&mut self) -> Result<Option<Message>, TooLong> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| header[4 * i + b]));
        let (kind, req_id, len) = (word(0), word(1), word(3));
        let most = if kind == kind::DIRECTORY { MAX_LIST } else { MAX_PAYLOAD };
        if len as usize > most {
            return Err(TooLong(len));
        }
        let Some(payload) = rest.get(..len as usize) else { return Ok(None) };
        let message = Message { kind, req_id, payload: payload.to_vec() };
        self.bytes.drain(..HEADER + len as usize);
        Ok(Some(message))
    }
}

/// The errors that the protocol has names for.
const ERRORS: &[(&str, Errno)] = &[
    ("EINVAL", Errno::EINVAL),
    ("EACCES", Errno::EACCES),
    ("EEXIST", Errno::EEXIST),
    ("EISDIR", Errno::EISDIR),
    ("ENOENT", Errno::ENOENT),
    ("ENOMEM", Errno::ENOMEM),
    ("ENOSPC", Errno::ENOSPC),
    ("EIO", Errno::EIO),
    ("ENOTEMPTY", Errno::ENOTEMPTY),
    ("ENOSYS", Errno::ENOSYS),
    ("EROFS", Errno::EROFS),
    ("EBUSY", Errno::EBUSY),
    ("EAGAIN", Errno::EAGAIN),
    ("EISCONN", Errno::EISCONN),
    ("E2BIG", Errno::E2BIG),
    ("EPERM", Errno::EPERM),
    // Not in the protocol, but said by oxenstored.
    ("EQUOTA", Errno::EDQUOT),
];

/// The error that an answer of kind ERROR names. A name that is not known is taken for `EINVAL`, as
/// other clients do: servers may have more of them one day.
pub(crate) fn error(payload: &[u8]) -> Errno {
    let name = payload.strip_suffix(b"\0").unwrap_or(payload);
    let found = ERRORS.iter().find(|(n, _)| n.as_bytes() == name);
    found.map_or(Errno::EINVAL, |&(_, errno)| errno)
}

/// The strings of an answer that is a list of them, each with its zero byte; `None` if it is not.
pub(crate) fn strings(payload: &[u8]) -> Option<Vec<Vec<u8>>> {
    if payload.is_empty() {
        return Some(Vec::new());
    }
    let body = payload.strip_suffix(b"\0")?;
    Some(body.split(|&b| b == 0).map(<[u8]>::to_vec).collect())
}

/// A decimal number; nothing but digits.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let add = |n: u64, d: &u8| n.checked_mul(10)?.checked_add(u64::from(d - b'0'));
    digits.then(|| text.iter().try_fold(0, add))?
}

/// Why a path cannot be sent, if so.
pub(crate) fn bad_path(path: &[u8]) -> Option<&'static str> {
    let known = |b: &u8| b.is_ascii_alphanumeric() || b"-/_@".contains(b);
    if path.is_empty() {
        Some("an empty path")
    } else if path.len() > MAX_PATH {
        Some("a path of more than 3072 bytes")
    } else if !path.iter().all(known) {
        Some("a character that no path may have")
    } else if path.windows(2).any(|w| w == b"//") || (path.len() > 1 && path.ends_with(b"/")) {
        Some("a slash too many")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_these_bytes() {
        let bytes = encode(kind::WRITE, 7, 0x0102_0304, b"/a\x00b");
        assert_eq!(bytes, b"\x0b\0\0\0\x07\0\0\0\x04\x03\x02\x01\x04\0\0\0/a\0b");
    }

    #[test]
    fn messages_come_in_any_pieces() {
        let sent: Vec<Message> = (0..5u32)
            .map(|i| Message { kind: i, req_id: 10 + i, payload: vec![i as u8; i as usize * 700] })
            .collect();
        let stream: Vec<u8> =
            sent.iter().flat_map(|m| encode(m.kind, m.req_id, 0, &m.payload)).collect();
        for piece in [1, 7, 15, 16, 17, 1000, 100_000] {
            let (mut parser, mut got) = (Parser::default(), Vec::new());
            for bytes in stream.chunks(piece) {
                parser.push(bytes);
                while let Some(m) = parser.next().unwrap() {
                    got.push(m);
                }
            }
            assert_eq!(got, sent, "pieces of {piece}");
            assert!(parser.bytes.is_empty());
        }
    }

    #[test]
    fn lengths_are_not_believed() {
        for len in [4097u32, u32::MAX] {
            let mut parser = Parser::default();
            let mut bytes = encode(2, 1, 0, b"");
            bytes[12..].copy_from_slice(&len.to_le_bytes());
            parser.push(&bytes);
            assert_eq!(parser.next(), Err(TooLong(len)));
        }
        let mut parser = Parser::default();
        parser.push(&encode(2, 1, 0, &[9; 4096]));
        assert_eq!(parser.next().unwrap().unwrap().payload.len(), 4096);
        let mut list = encode(kind::DIRECTORY, 1, 0, &[]);
        list[12..].copy_from_slice(&6400u32.to_le_bytes());
        parser.push(&list);
        parser.push(&[9; 6400]);
        assert_eq!(parser.next().unwrap().unwrap().payload.len(), 6400);
        list[12..].copy_from_slice(&(1u32 << 20 | 1).to_le_bytes());
        parser.push(&list);
        assert!(parser.next().is_err());
    }

    #[test]
    fn lists_numbers_and_errors() {
        assert_eq!(strings(b""), Some(vec![]));
        assert_eq!(strings(b"a\0bc\0"), Some(vec![b"a".to_vec(), b"bc".to_vec()]));
        assert_eq!(strings(b"a\0\0"), Some(vec![b"a".to_vec(), vec![]]));
        assert_eq!(strings(b"a"), None);
        for (text, number) in [
            (&b"0"[..], Some(0)),
            (b"18446744073709551615", Some(u64::MAX)),
            (b"18446744073709551616", None),
            (b"", None),
            (b"-1", None),
            (b"1\0", None),
        ] {
            assert_eq!(decimal(text), number, "{text:?}");
        }
        assert_eq!(error(b"ENOENT\0"), Errno::ENOENT);
        assert_eq!(error(b"EAGAIN"), Errno::EAGAIN);
        assert_eq!(error(b"EWHATEVER\0"), Errno::EINVAL);
    }

    #[test]
    fn paths() {
        let long = [b'a'; 3073];
        for path in [&b"/"[..], b"/local/domain/0/x-y_Z", b"device/vbd", b"@releaseDomain"] {
            assert_eq!(bad_path(path), None);
        }
        for path in [&b""[..], b"/a/", b"/a//b", b"/a b", b"/a\0b", b"/\xc3\xa4", b"/a.b", &long] {
            assert!(bad_path(path).is_some(), "{path:?}");
        }
    }
}
