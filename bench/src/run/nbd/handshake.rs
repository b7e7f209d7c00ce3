//! The handshake with an NBD server (its `doc/proto.md`): fixed newstyle, simple replies.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use reactor::Clock;

use crate::Error;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 1 << 31 | 1;
const REPLY_UNKNOWN: u32 = 1 << 31 | 6;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Most replies to an option, and most bytes of one.
const REPLIES: usize = 64;
const REPLY_BYTES: u32 = 4096;

/// What a server says of an export.
#[derive(Clone, Copy, Debug)]
pub(super) struct Export {
    pub(super) size: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    /// Smallest, preferred and largest size of a request in bytes, if it says them.
    pub(super) blocks: Option<[u32; 3]>,
}

/// A connection during the handshake, all of which has one end.
pub(super) struct Talk<'a> {
    pub(super) stream: &'a UnixStream,
    pub(super) server: &'a str,
    pub(super) clock: &'a Clock,
    pub(super) until: u64,
}

impl Talk<'_> {
    fn fail<T>(&self, why: impl std::fmt::Display) -> Result<T, Error> {
        Err(Error::other(format!("{}: {why}", self.server)))
    }

    fn left(&self) -> Result<Duration, Error> {
        match self.until.saturating_sub(self.clock.now()) {
            0 => self.fail("the NBD handshake takes too long"),
            ns => Ok(Duration::from_nanos(ns.max(1_000_000))),
        }
    }

    fn read(&mut self, mut into: &mut [u8]) -> Result<(), Error> {
        while !into.is_empty() {
            let left = self.left()?;
            self.stream.set_read_timeout(Some(left)).map_err(Error::other)?;
            match self.stream.read(into) {
                Ok(0) => return self.fail("the server hung up during the NBD handshake"),
                Ok(n) => into = &mut into[n..],
                Err(e) => match e.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return self.fail(e),
                },
            }
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let left = self.left()?;
        self.stream.set_write_timeout(Some(left)).map_err(Error::other)?;
        self.stream.write_all(bytes).or_else(|e| self.fail(e))
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), Error> {
        let mut out = OPTION.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.write(&out)
    }

    /// Opens an export.
    pub(super) fn open(&mut self, export: &str) -> Result<Export, Error> {
        let hello = self.take::<18>()?;
        let flags = u16::from_be_bytes([hello[16], hello[17]]);
        if hello[..8] != MAGIC.to_be_bytes()
            || hello[8..16] != OPTION.to_be_bytes()
            || flags & FIXED_NEWSTYLE == 0
        {
            return self.fail("no NBD server: it does not greet in the fixed newstyle");
        }
        let no_zeroes = flags & NO_ZEROES;
        self.write(&u32::from(FIXED_NEWSTYLE | no_zeroes).to_be_bytes())?;
        match self.go(export)? {
            Some(found) => Ok(found),
            None => self.by_name(export, no_zeroes != 0),
        }
    }

    /// `None` if the server does not know that way.
    fn go(&mut self, export: &str) -> Result<Option<Export>, Error> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.option(GO, &data)?;
        let (mut found, mut blocks) = (None, None);
        for _ in 0..REPLIES {
            let head = self.take::<20>()?;
            let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| head[at + i]));
            let (kind, len) = (word(12), word(16));
            if head[..8] != OPTION_REPLY.to_be_bytes() || word(8) != GO || len > REPLY_BYTES {
                return self.fail("what it answers is no reply to the option GO");
            }
            let mut data = vec![0; len as usize];
            self.read(&mut data)?;
            let item = data.first_chunk().map(|b| u16::from_be_bytes(*b));
            match (kind, item) {
                (REPLY_UNSUPPORTED, _) => return Ok(None),
                (REPLY_UNKNOWN, _) => return self.fail(format!("it has no export {export:?}")),
                (REPLY_ACK, _) => {
                    let Some((size, flags)) = found else {
                        return self.fail("it opens the export and does not say its size");
                    };
                    return Ok(Some(Export { size, flags, blocks }));
                }
                (REPLY_INFO, Some(INFO_EXPORT)) => {
                    let Some((size, flags)) = data[2..].split_first_chunk() else {
                        return self.fail("what it says of the export is too short");
                    };
                    let flags = flags.first_chunk().map_or(0, |f| u16::from_be_bytes(*f));
                    found = Some((u64::from_be_bytes(*size), flags));
                }
                (REPLY_INFO, Some(INFO_BLOCK_SIZE)) => {
                    let (words, []) = data[2..].as_chunks::<4>() else {
                        return self.fail("what it says of block sizes is too short");
                    };
                    blocks =
                        <[[u8; 4]; 3]>::try_from(words).ok().map(|w| w.map(u32::from_be_bytes));
                }
                (REPLY_INFO, _) => {}
                _ => {
                    let text = String::from_utf8_lossy(&data[..data.len().min(200)]);
                    let text = text.replace(char::is_control, " ");
                    return self
                        .fail(format!("it refuses the export {export:?}: {kind:#x} {text}"));
                }
            }
        }
        self.fail("it does not come to an end with its replies")
    }

    /// The older way, which is answered with the export, or the end of the connection.
    fn by_name(&mut self, export: &str, no_zeroes: bool) -> Result<Export, Error> {
        self.option(EXPORT_NAME, export.as_bytes())?;
        let found = self.take::<10>()?;
        if !no_zeroes {
            self.take::<124>()?;
        }
        let [size @ .., f0, f1] = found;
        let (size, flags) = (u64::from_be_bytes(size), u16::from_be_bytes([f0, f1]));
        Ok(Export { size, flags, blocks: None })
    }
}
