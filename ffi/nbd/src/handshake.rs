//! Fixed newstyle negotiation, on the connection's thread, before any DMA memory is taken.
//!
//! Everything is bounded: the length of an option, their number, and the time for all of it.
//! Where TLS is required ([`start_tls`]) nothing is said of the export before it is spoken.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::{Clock, Wake};

use crate::contexts::{self, Context};
use crate::export::Export;
use crate::proto::{self, handshake_flag, info, option, option_reply};
use crate::sockio::{self, Gather};

/// Longest option data that is read, in bytes: a name and many queries.
const MAX_DATA: u32 = 64 << 10;
/// Most queries of one metadata option.
const MAX_QUERIES: u32 = 256;
/// Most options of one client.
const MAX_OPTIONS: usize = 256;

/// Why a handshake ended without a session.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    /// The client went, in the way it should or another.
    Left,
    /// It took too long.
    Late,
    /// The server shuts down.
    Stopped,
    /// The client broke a rule.
    Broke(&'static str),
    /// What the client asked for cannot be had, and there is no way to say so.
    Refused(String),
}

/// What was agreed.
#[derive(Debug)]
pub(crate) struct Session<T> {
    pub(crate) structured: bool,
    /// A context's number is its place, counted from 1.
    pub(crate) contexts: Vec<Context>,
    /// The client asked for the block sizes on its way in.
    pub(crate) aligned: bool,
    pub(crate) attached: T,
}

/// A socket with a deadline.
pub(crate) struct Line<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) wake: &'a Wake,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) clock: &'a Clock,
    /// In the clock's nanoseconds.
    pub(crate) deadline: u64,
}

impl Line<'_> {
    pub(crate) fn wait(&self, events: PollFlags) -> Result<(), End> {
        let left = self.deadline.saturating_sub(self.clock.now()).div_ceil(1_000_000);
        if left == 0 {
            return Err(End::Late);
        }
        self.wake.about_to_sleep();
        if !self.stop.load(Ordering::Acquire) {
            let mut fds =
                [PollFd::new(self.fd, events), PollFd::new(self.wake.fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        }
        self.wake.awake();
        if self.stop.load(Ordering::Acquire) { Err(End::Stopped) } else { Ok(()) }
    }

    fn read(&self, into: &mut [u8]) -> Result<(), End> {
        let mut at = 0;
        while at < into.len() {
            match sockio::receive(self.fd, None, &mut into[at..]) {
                Ok(0) => return Err(End::Left),
                Ok(n) => at += n,
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLIN)?,
                Err(_) => return Err(End::Left),
            }
        }
        Ok(())
    }

    fn read_array<const N: usize>(&self) -> Result<[u8; N], End> {
        let mut raw = [0; N];
        self.read(&mut raw)?;
        Ok(raw)
    }

    fn write(&self, mut from: &[u8]) -> Result<(), End> {
        while !from.is_empty() {
            let mut out = Gather::new();
            out.bytes(from);
            match out.send(self.fd) {
                Ok(n) => from = &from[n..],
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLOUT)?,
                Err(_) => return Err(End::Left),
            }
        }
        Ok(())
    }
}

/// The replies to one option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn add(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        self.bytes.extend(proto::OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        // All parts are strings of the protocol or shorter.
        self.bytes.extend((len as u32).to_be_bytes());
        parts.iter().for_each(|p| self.bytes.extend(*p));
    }

    fn ack(&mut self) {
        self.add(option_reply::ACK, &[]);
    }

    fn error(&mut self, kind: u32, text: &str) {
        self.add(kind, &[text.as_bytes()]);
    }
}

/// Splits `N` big-endian bytes off the front.
fn split<'a, const N: usize>(data: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (first, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(first)
}

/// Splits a string with its 32-bit length off the front.
fn split_string<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = u32::from_be_bytes(*split(data)?) as usize;
    let (string, rest) = data.split_at_checked(len)?;
    *data = rest;
    Some(string)
}

/// Name and information requests of INFO and GO.
fn parse_go(mut data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let name = split_string(&mut data)?;
    let count = usize::from(u16::from_be_bytes(*split(&mut data)?));
    if data.len() != count * 2 {
        return None;
    }
    let (pairs, _) = data.as_chunks::<2>();
    Some((name, pairs.iter().map(|p| u16::from_be_bytes(*p)).collect()))
}

/// Export name and queries of the metadata options; the error to reply otherwise.
fn parse_queries(mut data: &[u8]) -> Result<(&[u8], Vec<&[u8]>), u32> {
    let d = &mut data;
    let name = split_string(d).ok_or(option_reply::ERR_INVALID)?;
    let count = u32::from_be_bytes(*split(d).ok_or(option_reply::ERR_INVALID)?);
    if count > MAX_QUERIES {
        return Err(option_reply::ERR_TOO_BIG);
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(split_string(d).ok_or(option_reply::ERR_INVALID)?);
    }
    if data.is_empty() { Ok((name, queries)) } else { Err(option_reply::ERR_INVALID) }
}

/// What is so from the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms {
    /// The client wants no zeroes behind an answer to EXPORT_NAME.
    pub(crate) no_zeroes: bool,
    /// It speaks TLS.
    pub(crate) secure: bool,
    /// Whatever it calls the export is right.
    pub(crate) any_name: bool,
}

/// A negotiation under way.
struct Talk<'a, A> {
    line: &'a Line<'a>,
    export: &'a Export,
    attach: A,
    terms: Terms,
    structured: bool,
    contexts: Vec<Context>,
}

/// Greets a client; returns whether it wants no zeroes behind an answer to EXPORT_NAME.
pub(crate) fn greet(line: &Line<'_>) -> Result<bool, End> {
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    let mut hello = [0; 18];
    hello[..8].copy_from_slice(&proto::GREETING.to_be_bytes());
    hello[8..16].copy_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    hello[16..].copy_from_slice(&flags.to_be_bytes());
    line.write(&hello)?;
    let client = u32::from_be_bytes(line.read_array()?);
    if client & !u32::from(flags) != 0 {
        return Err(End::Broke("unknown client flags"));
    }
    Ok(client & u32::from(handshake_flag::NO_ZEROES) != 0)
}

/// An option and its data.
fn read_option(line: &Line<'_>) -> Result<(u32, Vec<u8>), End> {
    let [magic @ .., o0, o1, o2, o3, l0, l1, l2, l3] = line.read_array::<16>()?;
    if u64::from_be_bytes(magic) != proto::OPTION_MAGIC {
        return Err(End::Broke("wrong option magic"));
    }
    let option = u32::from_be_bytes([o0, o1, o2, o3]);
    let len = u32::from_be_bytes([l0, l1, l2, l3]);
    if len > MAX_DATA {
        return Err(End::Broke("option data too long"));
    }
    let mut data = vec![0; len as usize];
    line.read(&mut data)?;
    Ok((option, data))
}

/// Has a client that was greeted go over to TLS: until it asks for that it gets nothing else. When
/// this returns, its next byte is TLS'.
pub(crate) fn start_tls(line: &Line<'_>) -> Result<(), End> {
    for _ in 0..MAX_OPTIONS {
        let (option, data) = read_option(line)?;
        let mut replies = Replies { option, bytes: Vec::new() };
        let (mut left, mut ready) = (false, false);
        match option {
            // There is no way to say so.
            option::EXPORT_NAME => return Err(End::Refused("the client wants no TLS".to_owned())),
            option::STARTTLS if data.is_empty() => ready = true,
            option::STARTTLS => {
                replies.error(option_reply::ERR_INVALID, "this option has no data");
            }
            option::ABORT => left = true,
            _ => replies.error(option_reply::ERR_TLS_REQD, "TLS is required here"),
        }
        if left || ready {
            replies.ack();
        }
        let written = line.write(&replies.bytes);
        if left {
            return Err(End::Left);
        }
        written?;
        if ready {
            return Ok(());
        }
    }
    Err(End::Broke("too many options"))
}

/// Negotiates with a client that was greeted until it enters transmission; `attach` is called when it
/// is about to.
pub(crate) fn negotiate<T>(
    line: &Line<'_>,
    export: &Export,
    terms: Terms,
    attach: impl FnMut() -> Result<T, String>,
) -> Result<Session<T>, End> {
    let (structured, contexts) = (false, Vec::new());
    let mut talk = Talk { line, export, attach, terms, structured, contexts };
    for _ in 0..MAX_OPTIONS {
        if let Some(session) = talk.option()? {
            return Ok(session);
        }
    }
    Err(End::Broke("too many options"))
}

impl<T, A: FnMut() -> Result<T, String>> Talk<'_, A> {
    /// Reads and answers one option; returns the session if it began one.
    fn option(&mut self) -> Result<Option<Session<T>>, End> {
        let (option, data) = read_option(self.line)?;
        if option == option::EXPORT_NAME {
            return self.export_name(&data).map(Some);
        }
        let mut replies = Replies { option, bytes: Vec::new() };
        let mut session = None;
        match option {
            option::ABORT => {
                replies.ack();
                // The client may have gone without waiting for this.
                let _ = self.line.write(&replies.bytes);
                return Err(End::Left);
            }
            option::LIST if data.is_empty() => {
                let len = (self.export.name.len() as u32).to_be_bytes();
                let (name, about) =
                    (self.export.name.as_bytes(), self.export.description.as_bytes());
                replies.add(option_reply::SERVER, &[&len, name, about]);
                replies.ack();
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                replies.ack();
            }
            option::STARTTLS if data.is_empty() => match self.terms.secure {
                true => replies.error(option_reply::ERR_INVALID, "TLS is spoken already"),
                false => replies.error(option_reply::ERR_POLICY, "no TLS here"),
            },
            option::LIST | option::STRUCTURED_REPLY | option::STARTTLS => {
                replies.error(option_reply::ERR_INVALID, "this option has no data");
            }
            option::INFO => self.info(&mut replies, &data).map_or((), |_| replies.ack()),
            option::GO => session = self.go(&mut replies, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta(&mut replies, &data);
            }
            _ => replies.error(option_reply::ERR_UNSUP, "option not known here"),
        }
        self.line.write(&replies.bytes)?;
        Ok(session)
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        self.terms.any_name || name == self.export.name.as_bytes()
    }

    fn begin(&mut self, attached: T, aligned: bool) -> Session<T> {
        let (structured, contexts) = (self.structured, std::mem::take(&mut self.contexts));
        Session { structured, contexts, aligned, attached }
    }

    fn export_name(&mut self, name: &[u8]) -> Result<Session<T>, End> {
        if !self.is_ours(name) {
            return Err(End::Refused("the client asked for another export".to_owned()));
        }
        let attached = (self.attach)().map_err(End::Refused)?;
        let mut answer = self.export.size().to_be_bytes().to_vec();
        answer.extend(self.export.flags(self.structured).to_be_bytes());
        if !self.terms.no_zeroes {
            answer.extend([0; 124]);
        }
        self.line.write(&answer)?;
        Ok(self.begin(attached, false))
    }

    /// Answers with what the client may know; returns what it asked for, or `None` on an error.
    fn info(&self, replies: &mut Replies, data: &[u8]) -> Option<Vec<u16>> {
        let Some((name, asked)) = parse_go(data) else {
            replies.error(option_reply::ERR_INVALID, "lengths do not fit");
            return None;
        };
        if !self.is_ours(name) {
            replies.error(option_reply::ERR_UNKNOWN, "no such export");
            return None;
        }
        let (size, flags) = (self.export.size(), self.export.flags(self.structured));
        let item = |kind: u16| kind.to_be_bytes();
        replies.add(
            option_reply::INFO,
            &[&item(info::EXPORT), &size.to_be_bytes(), &flags.to_be_bytes()],
        );
        if asked.contains(&info::NAME) {
            replies.add(option_reply::INFO, &[&item(info::NAME), name]);
        }
        if asked.contains(&info::DESCRIPTION) && !self.export.description.is_empty() {
            let text = self.export.description.as_bytes();
            replies.add(option_reply::INFO, &[&item(info::DESCRIPTION), text]);
        }
        let [min, preferred, max] = self.export.block_sizes().map(u32::to_be_bytes);
        replies.add(option_reply::INFO, &[&item(info::BLOCK_SIZE), &min, &preferred, &max]);
        Some(asked)
    }

    fn go(&mut self, replies: &mut Replies, data: &[u8]) -> Option<Session<T>> {
        let asked = self.info(replies, data)?;
        match (self.attach)() {
            Ok(attached) => {
                replies.ack();
                Some(self.begin(attached, asked.contains(&info::BLOCK_SIZE)))
            }
            Err(e) => {
                log::warn!("cannot attach an NBD client: {e}");
                replies.error(option_reply::ERR_PLATFORM, "cannot attach to the image");
                None
            }
        }
    }

    fn meta(&mut self, replies: &mut Replies, data: &[u8]) {
        let set = replies.option == option::SET_META_CONTEXT;
        if set {
            // Also a request that fails takes back what was selected before.
            self.contexts.clear();
            if !self.structured {
                replies.error(option_reply::ERR_INVALID, "structured replies come first");
                return;
            }
        }
        let (name, queries) = match parse_queries(data) {
            Ok(parsed) => parsed,
            Err(kind) => return replies.error(kind, "queries too many or lengths wrong"),
        };
        if !self.is_ours(name) {
            return replies.error(option_reply::ERR_UNKNOWN, "no such export");
        }
        let names = match set {
            true => {
                self.contexts = contexts::selected(self.export, &queries);
                self.contexts.iter().map(Context::name).collect()
            }
            false => contexts::listed(self.export, &queries),
        };
        for (number, name) in (1u32..).zip(&names) {
            let id = if set { number } else { 0 };
            replies.add(option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
        }
        replies.ack();
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
