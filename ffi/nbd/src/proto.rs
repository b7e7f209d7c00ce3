//! Numbers and layouts of the NBD protocol (its `doc/proto.md`): requests in, replies out, and
//! which request is wrong in which way. Pure; used by handshake and connections.

use block::Status;

/// First word of a server's greeting, "NBDMAGIC".
pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first of each option, "IHAVEOPT".
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of an option reply.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub(crate) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply chunk.
pub(crate) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the client's being the same two bits.
pub(crate) mod handshake_flag {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1;
    pub(crate) const NO_ZEROES: u16 = 2;
}

/// Transmission flags.
pub(crate) mod export_flag {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Types of option replies.
pub(crate) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub(crate) const ERR_POLICY: u32 = 1 << 31 | 2;
    pub(crate) const ERR_INVALID: u32 = 1 << 31 | 3;
    pub(crate) const ERR_PLATFORM: u32 = 1 << 31 | 4;
    pub(crate) const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub(crate) const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub(crate) const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Information items of INFO and GO.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// The one metadata context that is offered, and the id it is given.
pub(crate) const ALLOCATION: &[u8] = b"base:allocation";

/// Longest string of the protocol, in bytes.
pub(crate) const MAX_STRING: usize = 4096;
/// Longest payload of a read or write that is served, in bytes: the protocol's portable limit.
pub(crate) const MAX_PAYLOAD: u32 = 32 << 20;

/// Error values of replies.
pub(crate) mod error {
    pub(crate) const PERM: u32 = 1;
    pub(crate) const IO: u32 = 5;
    pub(crate) const INVAL: u32 = 22;
    pub(crate) const NOSPC: u32 = 28;
    pub(crate) const OVERFLOW: u32 = 75;
    pub(crate) const NOTSUP: u32 = 95;
    pub(crate) const SHUTDOWN: u32 = 108;
}

/// The error value that says what a status says; 0 for [`Status::Ok`]. `fast` tells that the
/// request was a write-zeroes with FAST_ZERO: the only one that may fail with `ENOTSUP`.
pub(crate) fn error_of(status: Status, fast: bool) -> u32 {
    match status {
        Status::Ok => 0,
        Status::Invalid => error::INVAL,
        Status::ReadOnly => error::PERM,
        Status::NoSpace => error::NOSPC,
        Status::Unsupported if fast => error::NOTSUP,
        Status::Unsupported => error::INVAL,
        Status::Medium | Status::Timeout | Status::Corrupt => error::IO,
        Status::Gone => error::SHUTDOWN,
    }
}

/// Commands of requests.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
}

/// Command flags.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 2;
    pub(crate) const DF: u16 = 4;
    pub(crate) const REQ_ONE: u16 = 8;
    pub(crate) const FAST_ZERO: u16 = 16;
}

/// A request as the client sent it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// What the handshake and the export settled, as far as it decides which requests are right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Size of the export in bytes.
    pub(crate) size: u64,
    /// Smallest unit of the image in bytes, a power of two.
    pub(crate) block: u32,
    pub(crate) read_only: bool,
    /// Structured replies were negotiated.
    pub(crate) structured: bool,
    /// Metadata contexts were selected.
    pub(crate) contexts: bool,
    /// The client asked for the block sizes, and so has to keep to them.
    pub(crate) aligned: bool,
    /// Longest read with DF that can be answered in one chunk, in bytes.
    pub(crate) df_limit: u32,
    /// The image writes zeroes faster than data.
    pub(crate) fast_zero: bool,
}

impl Header {
    /// Length on the wire.
    pub(crate) const LEN: usize = 28;

    /// Takes a request apart; `None` if the magic is wrong.
    pub(crate) fn parse(raw: &[u8; Header::LEN]) -> Option<Header> {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *raw;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC {
            return None;
        }
        let [cookie @ .., _, _, _, _, _, _, _, _, _, _, _, _] = rest;
        let [_, _, _, _, _, _, _, _, offset @ .., l0, l1, l2, l3] = rest;
        Some(Header {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes(cookie),
            offset: u64::from_be_bytes(offset),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Whether data follows the request, be the request right or wrong.
    pub(crate) fn has_payload(&self) -> bool {
        self.command == 1
    }

    /// Whether the answer may have to wait for others than the image.
    pub(crate) fn may_take_long(&self) -> bool {
        self.command == command::BLOCK_STATUS
    }

    /// What is to be done, or the error that the request is answered with.
    pub(crate) fn check(&self, rules: &Rules) -> Result<Kind, u32> {
        let (kind, allowed) = match self.command {
            command::READ => (Kind::Read, if rules.structured { flag::DF } else { 0 }),
            command::WRITE => (Kind::Write, 0),
            command::DISCONNECT => return Ok(Kind::Disconnect),
            command::FLUSH => (Kind::Flush, 0),
            command::TRIM => (Kind::Trim, 0),
            command::WRITE_ZEROES => (Kind::WriteZeroes, flag::NO_HOLE | flag::FAST_ZERO),
            command::BLOCK_STATUS => (Kind::BlockStatus, flag::REQ_ONE),
            _ => return Err(error::INVAL),
        };
        if self.flags & !(allowed | flag::FUA) != 0 {
            return Err(error::INVAL);
        }
        let writes = matches!(kind, Kind::Write | Kind::Trim | Kind::WriteZeroes);
        if writes && rules.read_only {
            return Err(error::PERM);
        }
        let len = u64::from(self.len);
        if kind == Kind::Flush {
            return if self.offset | len == 0 { Ok(kind) } else { Err(error::INVAL) };
        }
        if self.offset > rules.size || len > rules.size - self.offset {
            let full = matches!(kind, Kind::Write | Kind::WriteZeroes);
            return Err(if full { error::NOSPC } else { error::INVAL });
        }
        if matches!(kind, Kind::Read | Kind::Write) && self.len > MAX_PAYLOAD {
            return Err(error::INVAL);
        }
        if kind == Kind::BlockStatus && (!rules.contexts || self.len == 0) {
            return Err(error::INVAL);
        }
        let odd = (self.offset | len) & u64::from(rules.block - 1) != 0;
        if odd && rules.aligned {
            return Err(error::INVAL);
        }
        if self.flags & flag::FAST_ZERO != 0 && (odd || !rules.fast_zero) {
            return Err(error::NOTSUP);
        }
        let around = span(self.offset, len, rules.block);
        if self.flags & flag::DF != 0 && around > u64::from(rules.df_limit) {
            return Err(error::OVERFLOW);
        }
        Ok(kind)
    }
}

/// Length of the whole blocks around `[offset, offset + len)`, a range inside the export.
pub(crate) fn span(offset: u64, len: u64, block: u32) -> u64 {
    let mask = u64::from(block) - 1;
    ((offset + len + mask) & !mask) - (offset & !mask)
}

/// The fixed part of a reply, written at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    bytes: [u8; Head::MAX],
    len: u8,
}

impl Head {
    /// Longest head: an error chunk with offset and a message of 30 bytes.
    const MAX: usize = 64;
    /// Longest message of an error chunk.
    const MAX_TEXT: usize = Head::MAX - 34;

    /// No bytes.
    pub(crate) const EMPTY: Head = Head { bytes: [0; Head::MAX], len: 0 };

    /// What goes on the wire.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn put(mut self, part: &[u8]) -> Head {
        let at = usize::from(self.len);
        self.bytes[at..at + part.len()].copy_from_slice(part);
        self.len += part.len() as u8;
        self
    }

    /// A simple reply; the data of a successful read follows.
    pub(crate) fn simple(cookie: u64, error: u32) -> Head {
        let head = Head::EMPTY.put(&SIMPLE_MAGIC.to_be_bytes());
        head.put(&error.to_be_bytes()).put(&cookie.to_be_bytes())
    }

    fn chunk(cookie: u64, done: bool, kind: u16, len: u32) -> Head {
        let head = Head::EMPTY.put(&CHUNK_MAGIC.to_be_bytes());
        let head = head.put(&u16::from(done).to_be_bytes()).put(&kind.to_be_bytes());
        head.put(&cookie.to_be_bytes()).put(&len.to_be_bytes())
    }

    /// A chunk that ends a reply and says nothing.
    pub(crate) fn none(cookie: u64) -> Head {
        Head::chunk(cookie, true, 0, 0)
    }

    /// A chunk of `len` bytes of data from `offset`, which follow.
    pub(crate) fn data(cookie: u64, done: bool, offset: u64, len: u32) -> Head {
        Head::chunk(cookie, done, 1, len + 8).put(&offset.to_be_bytes())
    }

    /// The chunk that answers a block-status query for one context, with `descriptors` descriptors to follow.
    pub(crate) fn status(cookie: u64, done: bool, context: u32, descriptors: u32) -> Head {
        Head::chunk(cookie, done, 5, 4 + descriptors * 8).put(&context.to_be_bytes())
    }

    /// A chunk that ends a reply with an error, at an offset of the request if that is known.
    pub(crate) fn error(cookie: u64, error: u32, offset: Option<u64>, text: &str) -> Head {
        let text = &text.as_bytes()[..text.len().min(Head::MAX_TEXT)];
        let (kind, fixed) = if offset.is_some() { (2, 14) } else { (1, 6) };
        let head = Head::chunk(cookie, true, 1 << 15 | kind, fixed + text.len() as u32);
        let head = head.put(&error.to_be_bytes()).put(&(text.len() as u16).to_be_bytes()).put(text);
        match offset {
            Some(offset) => head.put(&offset.to_be_bytes()),
            None => head,
        }
    }
}

/// A few words for people about an error value.
pub(crate) fn error_text(error: u32) -> &'static str {
    match error {
        0 => "",
        error::PERM => "export is read-only",
        error::IO => "input/output error",
        error::INVAL => "invalid request",
        error::NOSPC => "no space left",
        error::OVERFLOW => "too long for one chunk",
        error::NOTSUP => "not faster than a write",
        error::SHUTDOWN => "server is shutting down",
        _ => "an error without a name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        size: 1 << 30,
        block: 512,
        read_only: false,
        structured: true,
        contexts: true,
        aligned: false,
        df_limit: 65536,
        fast_zero: true,
    };

    fn header(command: u16, flags: u16, offset: u64, len: u32) -> Header {
        Header { flags, command, cookie: 7, offset, len }
    }

    #[test]
    fn every_status_has_its_error_value() {
        let table = Status::ALL.map(|s| (s, error_of(s, false), error_of(s, true)));
        assert_eq!(
            table,
            [
                (Status::Ok, 0, 0),
                (Status::Invalid, 22, 22),
                (Status::ReadOnly, 1, 1),
                (Status::NoSpace, 28, 28),
                (Status::Unsupported, 22, 95),
                (Status::Medium, 5, 5),
                (Status::Timeout, 5, 5),
                (Status::Gone, 108, 108),
                (Status::Corrupt, 5, 5),
            ]
        );
        for (_, plain, fast) in table {
            assert_eq!(error_text(plain).is_empty(), plain == 0);
            assert!(error_text(fast).len() <= Head::MAX_TEXT);
        }
    }

    #[test]
    fn a_request_is_taken_apart() {
        let mut raw = [0; 28];
        raw[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        raw[4..8].copy_from_slice(&[0, 1, 0, 6]);
        raw[8..16].copy_from_slice(&0x1122_3344_5566_7788u64.to_be_bytes());
        raw[16..24].copy_from_slice(&0x99u64.to_be_bytes());
        raw[24..].copy_from_slice(&0x200u32.to_be_bytes());
        let parsed = Header::parse(&raw).unwrap();
        assert_eq!(
            parsed,
            Header { flags: 1, command: 6, cookie: 0x1122_3344_5566_7788, offset: 0x99, len: 512 }
        );
        raw[3] = 0x14;
        assert_eq!(Header::parse(&raw), None);
    }

    #[test]
    fn ranges_and_flags_are_checked_per_command() {
        let end = RULES.size;
        let cases = [
            (header(0, 0, 0, 4096), Ok(Kind::Read)),
            (header(0, 0, end, 0), Ok(Kind::Read)),
            (header(0, 0, end - 512, 1024), Err(22)),
            (header(0, 0, u64::MAX, 1), Err(22)),
            (header(0, 0, u64::MAX - 511, 512), Err(22)),
            (header(0, flag::NO_HOLE, 0, 512), Err(22)),
            (header(0, flag::DF, 0, 65536), Ok(Kind::Read)),
            (header(0, flag::DF, 1, 65536), Err(75)),
            (header(0, 0, 0, MAX_PAYLOAD), Ok(Kind::Read)),
            (header(0, 0, 0, MAX_PAYLOAD + 1), Err(22)),
            (header(1, flag::FUA, 1, 3), Ok(Kind::Write)),
            (header(1, 0, end - 512, 1024), Err(28)),
            (header(1, 0, 0, MAX_PAYLOAD + 512), Err(22)),
            (header(1, flag::DF, 0, 512), Err(22)),
            (header(2, 99, 9, 9), Ok(Kind::Disconnect)),
            (header(3, flag::FUA, 0, 0), Ok(Kind::Flush)),
            (header(3, 0, 512, 0), Err(22)),
            (header(4, flag::FUA, 0, 1 << 30), Ok(Kind::Trim)),
            (header(4, 0, end, 512), Err(22)),
            (header(5, 0, 0, 512), Err(22)),
            (header(6, flag::NO_HOLE | flag::FAST_ZERO | flag::FUA, 0, 512), Ok(Kind::WriteZeroes)),
            (header(6, flag::FAST_ZERO, 1, 512), Err(95)),
            (header(6, 0, 1, 512), Ok(Kind::WriteZeroes)),
            (header(6, 0, end, 512), Err(28)),
            (header(6, flag::REQ_ONE, 0, 512), Err(22)),
            (header(7, flag::REQ_ONE, 0, 1 << 30), Ok(Kind::BlockStatus)),
            (header(7, 0, 0, 0), Err(22)),
            (header(7, 0, end - 512, 1024), Err(22)),
            (header(8, 0, 0, 512), Err(22)),
            (header(0xffff, 0, 0, 0), Err(22)),
        ];
        for (h, want) in cases {
            assert_eq!(h.check(&RULES), want, "{h:?}");
        }
    }

    #[test]
    fn what_was_negotiated_decides() {
        let ro = Rules { read_only: true, ..RULES };
        for command in [1, 4, 6] {
            assert_eq!(header(command, 0, 0, 512).check(&ro), Err(1));
        }
        assert_eq!(header(3, 0, 0, 0).check(&ro), Ok(Kind::Flush));
        let plain = Rules { structured: false, contexts: false, ..RULES };
        assert_eq!(header(0, flag::DF, 0, 512).check(&plain), Err(22));
        assert_eq!(header(7, 0, 0, 512).check(&plain), Err(22));
        let aligned = Rules { aligned: true, ..RULES };
        for command in [0, 1, 4, 6, 7] {
            assert_eq!(header(command, 0, 256, 512).check(&aligned), Err(22));
            assert_eq!(header(command, 0, 512, 511).check(&aligned), Err(22));
            assert!(header(command, 0, 512, 512).check(&aligned).is_ok());
        }
        let slow = Rules { fast_zero: false, ..RULES };
        assert_eq!(header(6, flag::FAST_ZERO, 0, 512).check(&slow), Err(95));
        assert!(header(6, 0, 0, 512).check(&slow).is_ok());
    }

    #[test]
    fn replies_have_the_layout_of_the_protocol() {
        assert_eq!(
            Head::simple(0x0102_0304_0506_0708, 5).bytes(),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        let data = Head::data(1, true, 0x1000, 512);
        assert_eq!(data.bytes()[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(data.bytes()[16..20], 520u32.to_be_bytes());
        assert_eq!(data.bytes()[20..], 0x1000u64.to_be_bytes());
        let none = Head::none(1);
        assert_eq!((none.bytes().len(), &none.bytes()[4..8]), (20, &[0, 1, 0, 0][..]));
        let status = Head::status(1, false, 2, 3);
        assert_eq!(status.bytes()[4..8], [0, 0, 0, 5]);
        assert_eq!(status.bytes()[16..], [0, 0, 0, 28, 0, 0, 0, 2]);
        let long = "a message that is longer than what there is place for";
        let error = Head::error(1, 22, Some(0x77), long);
        assert_eq!(error.bytes().len(), Head::MAX);
        assert_eq!(error.bytes()[4..8], [0, 1, 0x80, 2]);
        assert_eq!(error.bytes()[16..20], 44u32.to_be_bytes());
        assert_eq!(error.bytes()[20..26], [0, 0, 0, 22, 0, 30]);
        assert_eq!(error.bytes()[56..], 0x77u64.to_be_bytes());
        let error = Head::error(1, 5, None, "no");
        assert_eq!(error.bytes()[16..], [0, 0, 0, 8, 0, 0, 0, 5, 0, 2, b'n', b'o']);
    }

    #[test]
    fn blocks_around_a_range() {
        assert_eq!(span(0, 512, 512), 512);
        assert_eq!(span(511, 2, 512), 1024);
        assert_eq!(span(513, 1, 512), 512);
        assert_eq!(span(512, 0, 512), 0);
    }
}
