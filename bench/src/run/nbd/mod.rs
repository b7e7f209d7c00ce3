//! [`Nbd`]: a server of NBD on a unix socket, as a [`Target`].
//!
//! One connection, simple replies. All that is to be sent goes by one system call, without a copy, and
//! all answers that are there are taken by another; the data of reads is let fall where it arrives. So
//! what the server costs is what is measured, and the client's own cost is the same for all servers.

mod handshake;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use reactor::Clock;

use super::ring::filler;
use super::{Done, Kind, Limits, Request, Target};
use crate::Error;
use handshake::{Export, Talk};

const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const HEAD: usize = 28;
const REPLY: usize = 16;
const DISCONNECT: u16 = 2;

const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_TRIM: u16 = 1 << 5;

/// Longest request, in bytes: what every server here takes.
const MAX_LEN: u32 = 2 << 20;
/// Most requests under way.
const MAX_DEPTH: u32 = 1024;
/// Bytes that are received at once, at most.
const RECEIVE: usize = 1 << 20;
/// Parts that are sent at once: half as many requests, at least.
const PARTS: usize = 256;

/// Waits that are shorter than this are spent looking, longer ones end so much earlier, in
/// nanoseconds: sleeps take up to so much longer than they should.
const EARLY: u64 = 100_000;
/// A receive that may wait ends after so long, in microseconds, or at the kernel's next tick but one.
const NAP_US: i64 = 10_000;

/// A connection to a server.
pub struct Nbd {
    stream: UnixStream,
    limits: Limits,
    slots: Vec<Slot>,
    /// Slots whose requests are to be sent, and how much of the first one has been.
    queue: VecDeque<u32>,
    sent: usize,
    /// What is written where it does not matter.
    filler: Vec<u8>,
    keep: bool,
    received: Box<[u8]>,
    /// What of it is left to be looked at.
    from: usize,
    to: usize,
    /// The read whose data is arriving, and how much of it has.
    arriving: Option<(u32, usize)>,
}

struct Slot {
    head: [u8; HEAD],
    kind: Kind,
    len: u32,
    /// How often it was used: the upper half of the cookie.
    uses: u32,
    /// It was sent, all of it, and not answered.
    busy: bool,
    /// Data to write, or that was read; empty where it does not matter.
    data: Vec<u8>,
    own_data: bool,
}

impl Nbd {
    /// Connects to the server at `socket` and opens an export. `patience`: how long the handshake may
    /// take, and how long the server may answer nothing later.
    ///
    /// # Errors
    /// If nobody listens there, it is no NBD server, or it does not open the export in time.
    pub fn connect(socket: &Path, export: &str, patience: Duration) -> Result<Nbd, Error> {
        let name = format!("NBD server {}", socket.display());
        if export.len() > 4096 {
            return Err(Error::other(format!("{name}: names of exports have at most 4096 bytes")));
        }
        let clock = Clock::real();
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX).max(1_000_000);
        let stream = open(socket, patience).map_err(|e| Error::other(format!("{name}: {e}")))?;
        let until = clock.now().saturating_add(patience);
        let mut talk = Talk { stream: &stream, server: &name, clock: &clock, until };
        let Export { size, flags, blocks } = talk.open(export)?;
        // What is received from now on is waited for shortly, and looked at again.
        let nap = TimeVal::microseconds(NAP_US);
        setsockopt(&stream, sockopt::ReceiveTimeout, &nap).map_err(Error::other)?;
        let [block, _, most] = blocks.unwrap_or([512, 4096, MAX_LEN]);
        if !block.is_power_of_two() || block > MAX_LEN || most < block {
            return Err(Error::other(format!("{name}: its block sizes make no sense")));
        }
        let limits = Limits {
            name,
            size,
            block,
            max_len: most.min(MAX_LEN),
            max_depth: MAX_DEPTH,
            writable: flags & READ_ONLY == 0,
            flush: flags & SEND_FLUSH != 0,
            trim: flags & SEND_TRIM != 0,
            patience,
        };
        Ok(Nbd {
            stream,
            limits,
            slots: Vec::new(),
            queue: VecDeque::new(),
            sent: 0,
            filler: Vec::new(),
            keep: false,
            received: vec![0; RECEIVE].into_boxed_slice(),
            from: 0,
            to: 0,
            arriving: None,
        })
    }

    /// Says goodbye. Nothing may be under way.
    ///
    /// # Errors
    /// If the server has gone.
    pub fn close(self) -> Result<(), Error> {
        let head = head(DISCONNECT, 0, 0, 0);
        let parts = [IoSlice::new(&head)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &parts, &[], flags, None);
        sent.map(drop).map_err(|e| self.gone(e))
    }

    fn gone(&self, e: Errno) -> Error {
        let why = match e {
            Errno::EPIPE | Errno::ECONNRESET => "the server hung up",
            e => e.desc(),
        };
        self.fail(why)
    }

    #[cold]
    fn fail(&self, why: impl std::fmt::Display) -> Error {
        Error::other(format!("{}: {why}", self.limits.name))
    }

    /// Sends what is queued, as far as the socket takes it.
    fn transmit(&mut self) -> Result<(), Error> {
        while !self.queue.is_empty() {
            let mut parts = [IoSlice::new(&[]); PARTS];
            let mut count = 0;
            for &slot in self.queue.iter().take(PARTS / 2) {
                let slot = &self.slots[slot as usize];
                parts[count] = IoSlice::new(&slot.head);
                count += 1;
                if slot.kind == Kind::Write {
                    let data = if slot.own_data { &slot.data } else { &self.filler };
                    parts[count] = IoSlice::new(&data[..slot.len as usize]);
                    count += 1;
                }
            }
            let mut parts = &mut parts[..count];
            IoSlice::advance_slices(&mut parts, self.sent);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let fd = self.stream.as_raw_fd();
            match sendmsg::<()>(fd, parts, &[], flags, None) {
                Ok(n) => self.has_sent(n),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(self.gone(e)),
            }
        }
        Ok(())
    }

    fn has_sent(&mut self, n: usize) {
        self.sent += n;
        while let Some(&first) = self.queue.front() {
            let slot = &mut self.slots[first as usize];
            let data = if slot.kind == Kind::Write { slot.len as usize } else { 0 };
            if self.sent < HEAD + data {
                return;
            }
            self.sent -= HEAD + data;
            slot.busy = true;
            self.queue.pop_front();
        }
    }

    /// Waits for the socket; true if there is something to receive.
    fn wait(&self, events: PollFlags, ns: u64) -> Result<bool, Error> {
        let mut fds = [PollFd::new(self.stream.as_fd(), events)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(Duration::from_nanos(ns))), None) {
            Ok(_) => Ok(fds[0].revents().is_some_and(|e| !(e - PollFlags::POLLOUT).is_empty())),
            Err(Errno::EINTR) => Ok(false),
            Err(e) => Err(self.fail(e.desc())),
        }
    }

    /// Receives what is there; with `wait`, waits a while for something.
    fn receive(&mut self, wait: bool) -> Result<(), Error> {
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        match recv(self.stream.as_raw_fd(), &mut self.received[self.to..], flags) {
            Ok(0) => Err(self.fail("the server hung up")),
            Ok(n) => {
                self.to += n;
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(e) => Err(self.gone(e)),
        }
    }

    /// Looks at what was received.
    fn take(&mut self, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        loop {
            if let Some((number, had)) = self.arriving {
                let slot = &mut self.slots[number as usize];
                let n = (slot.len as usize - had).min(self.to - self.from);
                if self.keep {
                    let data = &self.received[self.from..self.from + n];
                    slot.data[had..had + n].copy_from_slice(data);
                }
                self.from += n;
                if had + n < slot.len as usize {
                    self.arriving = Some((number, had + n));
                    break;
                }
                self.arriving = None;
                slot.busy = false;
                let data = if self.keep { &slot.data[..slot.len as usize] } else { &[] };
                done(Done { slot: number, error: None, data });
            }
            let Some(reply) = self.received[self.from..self.to].first_chunk::<REPLY>() else {
                break;
            };
            let (number, error) = self.reply(*reply)?;
            self.from += REPLY;
            let slot = &mut self.slots[number as usize];
            if error.is_none() && slot.kind == Kind::Read {
                self.arriving = Some((number, 0));
                continue;
            }
            slot.busy = false;
            done(Done { slot: number, error, data: &[] });
        }
        // At most a part of a reply is left.
        self.received.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        Ok(())
    }

    /// Whose reply it is, and its error.
    #[inline]
    fn reply(&self, reply: [u8; REPLY]) -> Result<(u32, Option<i32>), Error> {
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = reply;
        if u32::from_be_bytes([m0, m1, m2, m3]) != SIMPLE_REPLY {
            return Err(self.fail("it sends something that is no simple reply"));
        }
        let cookie = u64::from_be_bytes(cookie);
        let number = cookie as u32;
        match self.slots.get(number as usize) {
            Some(slot) if slot.busy && cookie >> 32 == u64::from(slot.uses) => {}
            _ => return Err(self.fail("it answers a request that was not sent")),
        }
        let error = u32::from_be_bytes([e0, e1, e2, e3]);
        Ok((number, (error != 0).then_some(error.min(4095) as i32)))
    }
}

fn head(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..4].copy_from_slice(&REQUEST.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..].copy_from_slice(&len.to_be_bytes());
    head
}

/// Connects; a server that accepts nobody is waited for no longer than `patience`.
fn open(path: &Path, patience: u64) -> nix::Result<UnixStream> {
    let kind = (AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC);
    let fd = socket(kind.0, kind.1, kind.2, None)?;
    let most = i64::try_from(patience / 1000).unwrap_or(i64::MAX);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(most.min(3_600_000_000)))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

impl Target for Nbd {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, depth: u32, max_len: u32, keep: bool) -> Result<(), Error> {
        self.keep = keep;
        let own = if keep { max_len as usize } else { 0 };
        let slot = |_| Slot {
            head: [0; HEAD],
            kind: Kind::Flush,
            len: 0,
            uses: 0,
            busy: false,
            data: vec![0; own],
            own_data: false,
        };
        self.slots = (0..depth).map(slot).collect();
        self.queue = VecDeque::with_capacity(depth as usize);
        self.filler = filler(max_len);
        Ok(())
    }

    #[inline]
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        let Request { slot: number, kind, offset, len } = *request;
        let command = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
            Kind::Flush => 3,
            Kind::Trim => 4,
        };
        let slot = &mut self.slots[number as usize];
        slot.uses = slot.uses.wrapping_add(1);
        (slot.kind, slot.len) = (kind, len);
        slot.own_data = data.is_some();
        if let Some(data) = data {
            // Made large enough for it where it is kept; else this is no path for many.
            if slot.data.len() < data.len() {
                slot.data.resize(data.len(), 0);
            }
            slot.data[..data.len()].copy_from_slice(data);
        }
        slot.head = head(command, u64::from(slot.uses) << 32 | u64::from(number), offset, len);
        self.queue.push_back(number);
        Ok(true)
    }

    fn poll(&mut self, wait: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        self.transmit()?;
        let napping = wait >= 2 * NAP_US as u64 * 1000;
        if !self.queue.is_empty() {
            // Replies are taken meanwhile: else both sides could wait for each other.
            if !self.wait(PollFlags::POLLIN | PollFlags::POLLOUT, wait)? {
                return self.transmit();
            }
            self.receive(false)?;
        } else if napping {
            self.receive(true)?;
        } else {
            if wait > EARLY && !self.wait(PollFlags::POLLIN, wait - EARLY)? {
                return Ok(());
            }
            self.receive(false)?;
        }
        self.take(done)
    }
}

#[cfg(test)]
mod tests;
