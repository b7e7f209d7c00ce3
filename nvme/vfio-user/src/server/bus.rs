//! [`Bus`]: a served device's way to its client: memory by bus address, and interrupts.
//!
//! Shared by the server and its device, on the server's thread. Memory that the client passed as a
//! sealed memfd is mapped; other memory is moved by messages, and commands of the client that arrive
//! meanwhile are kept for later.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::Region;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, readlink};
use nix::poll::PollFlags;
use reactor::Clock;

use crate::Error;
use crate::socket::{Inbox, Message, send, wait};
use crate::version::MAX_MAPS;
use crate::wire::{Dma, DmaMap, HEADER, Header, Kind, MAX_DATA, command, pci};

/// Commands of the client that are kept while a message of ours is answered; more are too many.
const MAX_BACKLOG: usize = 64;

/// Most bytes of a client's memory that are mapped: address space must be left for ourselves.
const MAX_MAPPED: u64 = 1 << 45;

/// The device touched a bus address that it cannot reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BusFault {
    /// The first such address.
    pub addr: u64,
}

/// The client's memory and interrupts.
#[derive(Clone, Debug)]
pub struct Bus(pub(super) Rc<RefCell<State>>);

#[derive(Debug)]
pub(super) struct State {
    pub(super) clock: Clock,
    pub(super) patience: u64,
    pub(super) peer: Option<Peer>,
    /// Sorted by address; they do not overlap.
    windows: Vec<Window>,
    /// The one hit last.
    last: usize,
    /// Who is told of each MSI-X vector.
    vectors: Vec<Option<OwnedFd>>,
    /// Vectors raised since they were told of: one bit each.
    raised: Vec<u64>,
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) stream: UnixStream,
    pub(super) inbox: Inbox,
    pub(super) backlog: VecDeque<Message>,
    /// It said which version it speaks.
    pub(super) greeted: bool,
    /// When it connected.
    pub(super) since: u64,
    pub(super) max_data: usize,
    id: u16,
    /// It is to be left, for this reason.
    pub(super) broken: Option<Error>,
}

/// Memory that the client lets the device reach.
#[derive(Debug)]
struct Window {
    address: u64,
    size: u64,
    readable: bool,
    writable: bool,
    /// `None`: by messages.
    memory: Option<Arc<Region>>,
}

impl Window {
    fn end(&self) -> u64 {
        // No overflow: `map` checked it.
        self.address + self.size
    }
}

impl Peer {
    pub(super) fn new(stream: UnixStream, now: u64) -> Peer {
        Peer {
            stream,
            inbox: Inbox::default(),
            backlog: VecDeque::new(),
            greeted: false,
            since: now,
            max_data: MAX_DATA,
            id: 0,
            broken: None,
        }
    }
}

impl Bus {
    pub(super) fn new(clock: Clock, patience: u64) -> Bus {
        Bus(Rc::new(RefCell::new(State {
            clock,
            patience,
            peer: None,
            windows: Vec::new(),
            last: 0,
            vectors: Vec::new(),
            raised: Vec::new(),
        })))
    }

    /// Reads memory.
    ///
    /// # Errors
    /// If any byte cannot be read; `into` then holds anything.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), BusFault> {
        let mut state = self.0.borrow_mut();
        let mut done = 0;
        while done < into.len() {
            let (at, window) = state.locate(addr, done)?;
            if !window.readable {
                return Err(BusFault { addr: at });
            }
            let n =
                (into.len() - done).min(usize::try_from(window.end() - at).unwrap_or(usize::MAX));
            let part = &mut into[done..done + n];
            match &window.memory {
                Some(memory) => memory.read((at - window.address) as usize, part),
                None => state.fetch(at, part)?,
            }
            done += n;
        }
        Ok(())
    }

    /// Writes memory.
    ///
    /// # Errors
    /// If any byte cannot be written; bytes before it may have been.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), BusFault> {
        let mut state = self.0.borrow_mut();
        let mut done = 0;
        while done < from.len() {
            let (at, window) = state.locate(addr, done)?;
            if !window.writable {
                return Err(BusFault { addr: at });
            }
            let n =
                (from.len() - done).min(usize::try_from(window.end() - at).unwrap_or(usize::MAX));
            let part = &from[done..done + n];
            match &window.memory {
                Some(memory) => memory.write((at - window.address) as usize, part),
                None => state.store(at, part)?,
            }
            done += n;
        }
        Ok(())
    }

    /// Reads a word at a multiple of 4 in one access, and nothing later before it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read_u32(&self, addr: u64) -> Result<u32, BusFault> {
        let mut state = self.0.borrow_mut();
        let (_, window) = state.locate(addr, 0)?;
        if !window.readable || !addr.is_multiple_of(4) {
            return Err(BusFault { addr });
        }
        // Windows are whole pages, so the word does not straddle two.
        if let Some(memory) = &window.memory {
            let at = (addr - window.address) as usize;
            return Ok(u32::from_le(memory.load32(at, Ordering::Acquire)));
        }
        let mut bytes = [0; 4];
        state.fetch(addr, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a word at a multiple of 4 in one access, and nothing earlier after it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_u32(&self, addr: u64, value: u32) -> Result<(), BusFault> {
        let mut state = self.0.borrow_mut();
        let (_, window) = state.locate(addr, 0)?;
        if !window.writable || !addr.is_multiple_of(4) {
            return Err(BusFault { addr });
        }
        if let Some(memory) = &window.memory {
            let at = (addr - window.address) as usize;
            memory.store32(at, value.to_le(), Ordering::Release);
            return Ok(());
        }
        state.store(addr, &value.to_le_bytes())
    }

    /// Writes 16 bytes at a multiple of 16, the second half (the upper address) last: who sees that
    /// sees the first, and everything written before.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn publish(&self, addr: u64, halves: [u64; 2]) -> Result<(), BusFault> {
        let mut state = self.0.borrow_mut();
        let (_, window) = state.locate(addr, 0)?;
        if !window.writable || !addr.is_multiple_of(16) {
            return Err(BusFault { addr });
        }
        // Windows are whole pages, so the 16 bytes do not straddle two.
        let at = (addr - window.address) as usize;
        if let Some(memory) = &window.memory {
            memory.store64(at, halves[0].to_le(), Ordering::Relaxed);
            memory.store64(at + 8, halves[1].to_le(), Ordering::Release);
            return Ok(());
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&halves[0].to_le_bytes());
        bytes[8..].copy_from_slice(&halves[1].to_le_bytes());
        state.store(addr, &bytes)
    }

    /// Raises an MSI-X vector. Told to the client after the device's step, once however often it was
    /// raised in it.
    pub fn raise(&self, vector: u16) {
        let mut state = self.0.borrow_mut();
        let (word, bit) = (usize::from(vector / 64), vector % 64);
        if state.raised.len() <= word {
            state.raised.resize(word + 1, 0);
        }
        state.raised[word] |= 1 << bit;
    }

    /// Tells the client of what was raised.
    pub(super) fn tell(&self) {
        let mut state = self.0.borrow_mut();
        let State { vectors, raised, .. } = &mut *state;
        for (word, bits) in raised.iter_mut().enumerate() {
            while *bits != 0 {
                let vector = word * 64 + bits.trailing_zeros() as usize;
                *bits &= *bits - 1;
                if let Some(Some(fd)) = vectors.get(vector) {
                    // A counter that is full was told of often enough: the write fails, and the
                    // client has an interrupt pending.
                    let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
                }
            }
        }
    }

    /// Everything of the client goes: memory, interrupts, connection.
    pub(super) fn clear(&self) {
        let mut state = self.0.borrow_mut();
        state.peer = None;
        state.windows.clear();
        state.vectors.clear();
        state.raised.clear();
    }
}

impl State {
    /// The window that holds byte `addr + done`, with that address.
    #[inline]
    fn locate(&mut self, addr: u64, done: usize) -> Result<(u64, &Window), BusFault> {
        let at = addr.checked_add(done as u64).ok_or(BusFault { addr })?;
        let hit = self.windows.get(self.last).is_some_and(|w| w.address <= at && at < w.end());
        if !hit {
            let above = self.windows.partition_point(|w| w.address <= at);
            let index = above.checked_sub(1).filter(|&i| at < self.windows[i].end());
            self.last = index.ok_or(BusFault { addr: at })?;
        }
        Ok((at, &self.windows[self.last]))
    }

    /// Reads memory by messages.
    #[cold]
    fn fetch(&mut self, addr: u64, into: &mut [u8]) -> Result<(), BusFault> {
        let mut at = addr;
        let most = self.peer.as_ref().map_or(1, |p| p.max_data);
        for part in into.chunks_mut(most) {
            let dma = Dma { address: at, count: part.len() as u64 };
            let body = self.ask(command::DMA_READ, &dma.encode()).ok_or(BusFault { addr: at })?;
            match Dma::decode(&body) {
                Some((d, data)) if d == dma && data.len() == part.len() => {
                    part.copy_from_slice(data);
                }
                _ => return Err(self.broken(at, "wrong answer to DMA_READ")),
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes memory by messages.
    #[cold]
    fn store(&mut self, addr: u64, from: &[u8]) -> Result<(), BusFault> {
        let mut at = addr;
        let most = self.peer.as_ref().map_or(1, |p| p.max_data);
        for part in from.chunks(most) {
            let dma = Dma { address: at, count: part.len() as u64 };
            let body = [&dma.encode(), part].concat();
            self.ask(command::DMA_WRITE, &body).ok_or(BusFault { addr: at })?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn broken(&mut self, addr: u64, why: &str) -> BusFault {
        if let Some(peer) = &mut self.peer {
            peer.broken.get_or_insert(Error::Protocol(why.to_owned()));
        }
        BusFault { addr }
    }

    /// Sends the client a command and waits for its answer. `None` if that is not to be had: then
    /// the client is left, but for one that answers that it does not want to.
    fn ask(&mut self, command: u16, body: &[u8]) -> Option<Vec<u8>> {
        let until = self.clock.now().saturating_add(self.patience);
        let peer = self.peer.as_mut().filter(|p| p.broken.is_none())?;
        peer.id = peer.id.wrapping_add(1);
        let header = Header::new(peer.id, command, Kind::Command, body.len());
        let answer =
            send(&peer.stream, &[&header.encode()[..], body].concat(), &[], &self.clock, until)
                .and_then(|()| peer.answer(&header, &self.clock, until));
        match answer {
            Ok(body) => body,
            Err(e) => {
                peer.broken = Some(e);
                None
            }
        }
    }

    /// DMA_MAP.
    pub(super) fn map(&mut self, map: &DmaMap, mut fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let DmaMap { readable, writable, offset, address, size } = *map;
        let end = address.checked_add(size).ok_or(Errno::EINVAL)?;
        if size == 0 || !(address | size).is_multiple_of(4096) || fds.len() > 1 {
            return Err(Errno::EINVAL);
        }
        let above = self.windows.partition_point(|w| w.address < address);
        let below = above.checked_sub(1).is_some_and(|i| self.windows[i].end() > address);
        if below || self.windows.get(above).is_some_and(|w| w.address < end) {
            return Err(Errno::EEXIST);
        }
        if self.windows.len() >= MAX_MAPS {
            return Err(Errno::ENOSPC);
        }
        let mapped: u64 = self.windows.iter().filter(|w| w.memory.is_some()).map(|w| w.size).sum();
        let memory = match fds.pop() {
            None => None,
            Some(_) if size > MAX_MAPPED - mapped => return Err(Errno::ENOMEM),
            Some(fd) => match Region::from_peer(fd, offset, size) {
                Ok(region) => Some(region),
                // Memory that could be taken away, or not be written, is not mapped.
                Err(e @ dma::Error::NotSealed(_))
                | Err(e @ dma::Error::Os { source: Errno::EACCES | Errno::EPERM, .. }) => {
                    log::warn!("vfio-user: memory at {address:#x} is reached by messages: {e}");
                    None
                }
                Err(dma::Error::Os { source, .. }) => return Err(source),
                Err(dma::Error::TooMany) => return Err(Errno::ENOSPC),
                Err(_) => return Err(Errno::EINVAL),
            },
        };
        self.windows.insert(above, Window { address, size, readable, writable, memory });
        Ok(())
    }

    /// DMA_UNMAP of exactly what was mapped. Nothing of it is in use afterwards: all of it is used
    /// on this thread.
    pub(super) fn unmap(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        let found = self.windows.iter().position(|w| w.address == address && w.size == size);
        self.windows.remove(found.ok_or(Errno::ENOENT)?);
        Ok(())
    }

    /// DMA_UNMAP of everything.
    pub(super) fn unmap_all(&mut self) {
        self.windows.clear();
    }

    /// Who is told of vectors from `start` on. They lie in the device's range.
    pub(super) fn set_vectors(
        &mut self,
        start: usize,
        fds: impl ExactSizeIterator<Item = Option<OwnedFd>>,
    ) -> Result<(), Errno> {
        let mut checked = Vec::with_capacity(fds.len());
        for fd in fds {
            if let Some(fd) = &fd {
                check_eventfd(fd)?;
            }
            checked.push(fd);
        }
        let end = start + checked.len();
        if self.vectors.len() < end {
            self.vectors.resize_with(end, || None);
        }
        for (slot, fd) in self.vectors[start..end].iter_mut().zip(checked) {
            *slot = fd;
        }
        Ok(())
    }

    /// Nobody is told of any vector.
    pub(super) fn clear_vectors(&mut self) {
        self.vectors.clear();
    }
}

/// Whether a descriptor is an eventfd, and makes sure that writing to it does not wait. (Its owner
/// could undo that, and fill it, and would keep its own device from going on.)
fn check_eventfd(fd: &OwnedFd) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str())?;
    if link != "anon_inode:[eventfd]" {
        return Err(Errno::EINVAL);
    }
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

impl Peer {
    /// Waits for the answer to a command. `None` in it: refused.
    fn answer(
        &mut self,
        header: &Header,
        clock: &Clock,
        until: u64,
    ) -> Result<Option<Vec<u8>>, Error> {
        loop {
            let now = clock.now();
            match self.inbox.take(&self.stream, now)? {
                Some(m) => match m.header.kind {
                    Kind::Command | Kind::Posted if self.backlog.len() < MAX_BACKLOG => {
                        self.backlog.push_back(m);
                    }
                    Kind::Command | Kind::Posted => {
                        return Error::protocol("too many commands instead of an answer");
                    }
                    _ if (m.header.id, m.header.command) != (header.id, header.command) => {
                        return Error::protocol("an answer to something else");
                    }
                    Kind::Reply => return Ok(Some(m.body)),
                    Kind::Failed(_) => return Ok(None),
                },
                None if now >= until => return Err(Error::Late("answer to a memory access")),
                None => {
                    wait(&[(self.stream.as_fd(), PollFlags::POLLIN)], Some(until - now))?;
                }
            }
        }
    }
}

const _: () = assert!(HEADER + Dma::SIZE + MAX_DATA <= crate::wire::MAX_MESSAGE);
const _: () = assert!(pci::MSIX < pci::IRQS);
