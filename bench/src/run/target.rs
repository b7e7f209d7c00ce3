//! [`Target`]: what requests are sent to.

use crate::Error;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Discards.
    Trim,
    /// Makes durable what was written; of no place and length.
    Flush,
}

impl Kind {
    /// As messages say it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Trim => "trim",
            Kind::Flush => "flush",
        }
    }
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Which of the sender's slots it is in: below the depth that the target was prepared for, and not
    /// under way.
    pub slot: u32,
    /// What to do.
    pub kind: Kind,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// An answer.
#[derive(Clone, Copy, Debug)]
pub struct Done<'a> {
    /// The request's slot, which is free again.
    pub slot: u32,
    /// Why it failed, if it did: an error number of Linux.
    pub error: Option<i32>,
    /// What a read has read, if the target was told to keep it; else empty.
    pub data: &'a [u8],
}

/// What a target takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// What it is called in messages.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Offsets and lengths are multiples of this, in bytes.
    pub block: u32,
    /// Longest read or write in bytes.
    pub max_len: u32,
    /// Most requests under way.
    pub max_depth: u32,
    /// It can be written to.
    pub writable: bool,
    /// It knows flushes.
    pub flush: bool,
    /// It knows discards.
    pub trim: bool,
    /// How long it may answer nothing while something is under way, in nanoseconds; after that it is
    /// given up.
    pub patience: u64,
}

/// What requests are sent to, by one thread.
pub trait Target {
    /// What it takes.
    fn limits(&self) -> &Limits;

    /// Takes all memory for so many requests of so many bytes at a time. With `keep`, [`Done::data`] is
    /// what was read. While nothing is under way.
    ///
    /// # Errors
    /// If memory is short.
    fn prepare(&mut self, depth: u32, max_len: u32, keep: bool) -> Result<(), Error>;

    /// Takes a request, without sending it yet; false if there is no room now. `data` is what to write,
    /// of the request's length; anything, if it is not given.
    ///
    /// # Errors
    /// If the target is not there any more.
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error>;

    /// Sends what was taken, and hands out answers. Where there is none it may wait for one, so many
    /// nanoseconds at most; one that polls does not wait.
    ///
    /// # Errors
    /// If the target is not there any more, or answers what was not asked.
    fn poll(&mut self, wait: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error>;
}
