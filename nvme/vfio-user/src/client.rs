//! [`Client`]: drives a device that another process offers.
//!
//! Calls block, one at a time, and are for control threads. Each call's answer has a deadline. A
//! thread of the client reads the socket: it hands answers over, and serves the server's own reads
//! and writes of memory that it did not map. Whatever the server does wrong ends the connection for
//! good; from then on every call fails at once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use dma::{Held, Region};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use reactor::{Clock, sync::Mutex};

use crate::Error;
use crate::socket::{Inbox, Message, send, wait};
use crate::version;
use crate::wire::{
    self, Access, Area, DeviceInfo, Dma, DmaMap, DmaUnmap, HEADER, Header, Irq, IrqAction, IrqData,
    Kind, MAX_AREAS, SetIrqs, command,
};

/// A part of a region that the server shares: registers that are reached without a message.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Where it begins in the region.
    pub offset: u64,
    /// The memory. The server reads it, and may write anything to it at any time.
    pub memory: Arc<Region>,
}

impl Mapped {
    /// Offset in the memory of the `len` bytes at `offset` of the region, if they lie in this part.
    pub fn find(&self, offset: u64, len: u64) -> Option<usize> {
        let at = offset.checked_sub(self.offset)?;
        let inside = at.checked_add(len)? <= self.memory.len() as u64;
        inside.then_some(at as usize)
    }
}

/// A region of the device.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// Bytes; 0 if it is not there.
    pub size: u64,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// The parts that are mapped.
    pub mapped: Vec<Mapped>,
}

/// A device behind a socket. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    info: DeviceInfo,
    max_data: usize,
    max_fds: usize,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    clock: Clock,
    /// Patience with the server, in nanoseconds.
    patience: u64,
    /// Held while a message is sent, so that messages do not mix.
    sending: Mutex<()>,
    calls: Mutex<Calls>,
    gone: AtomicBool,
    why: Mutex<Option<String>>,
    memory: Mutex<Vec<Window>>,
    posted: AtomicU64,
}

#[derive(Debug)]
struct Calls {
    id: u16,
    answers: Receiver<Message>,
}

/// Memory that the server may reach.
#[derive(Debug)]
struct Window {
    address: u64,
    region: Held,
}

impl Client {
    /// Connects to a server. `patience`: how long each of its answers may take.
    ///
    /// # Errors
    /// If nobody listens there, the server speaks something else, or offers no PCI device.
    pub fn connect(path: &Path, patience: Duration) -> Result<Client, Error> {
        let clock = Clock::real();
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX / 2);
        let stream = connect_to(path, &clock, clock.now().saturating_add(patience))?;
        let (answer, answers) = sync_channel(1);
        let shared = Arc::new(Shared {
            stream,
            clock,
            patience,
            sending: Mutex::new(()),
            calls: Mutex::new(Calls { id: 0, answers }),
            gone: AtomicBool::new(false),
            why: Mutex::new(None),
            memory: Mutex::new(Vec::new()),
            posted: AtomicU64::new(0),
        });
        let theirs = shared.clone();
        let reader = std::thread::Builder::new()
            .name("vfio-user".to_owned())
            .spawn(move || theirs.read(&answer))
            .map_err(|source| Error::Os { what: "starting a thread", source })?;
        let info = DeviceInfo { reset: false, pci: false, regions: 0, irqs: 0 };
        let mut client =
            Client { shared, reader: Some(reader), info, max_data: wire::MAX_DATA, max_fds: 1 };
        let reply = client.call("version", command::VERSION, &version::propose(), &[]);
        let reply = reply.map_err(|e| match e {
            // Found by the reader, or by the sender.
            Error::Gone(why) => Error::TurnedAway(why),
            Error::Closed => Error::TurnedAway(e.to_string()),
            e => e,
        })?;
        let offer = client.checked(version::decode(&reply.body))?;
        (client.max_data, client.max_fds) = (offer.max_data, offer.max_fds);
        let wanted = DeviceInfo { reset: false, pci: false, regions: 0, irqs: 0 };
        let reply = client.call("device info", command::DEVICE_GET_INFO, &wanted.encode(), &[])?;
        client.info = client.decoded("device info", DeviceInfo::decode(&reply.body))?;
        if !client.info.pci || client.info.regions <= wire::pci::CONFIG {
            let n = client.info.regions;
            return Err(Error::Invalid(format!("it is no PCI device (it has {n} regions)")));
        }
        Ok(client)
    }

    /// What the device is like.
    pub fn info(&self) -> DeviceInfo {
        self.info
    }

    /// Whether the connection has ended. It never comes back.
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
    }

    /// Messages that were [posted](Client::post): each is a system call of its caller.
    pub fn posted(&self) -> u64 {
        self.shared.posted.load(Ordering::Relaxed)
    }

    /// Looks at a region, and maps what the server shares of it in a way that is safe; the rest is
    /// reached by [`Client::read`] and [`Client::write`], as everything is.
    ///
    /// # Errors
    /// If the server has no such region, or does not answer properly.
    pub fn region(&self, index: u32) -> Result<RegionInfo, Error> {
        let what = "region info";
        let room = (32 + 16 + 16 * MAX_AREAS) as u32;
        let query = wire::encode_region_query(room, index);
        let reply = self.call(what, command::DEVICE_GET_REGION_INFO, &query, &[])?;
        let (region, argsz) = self.decoded(what, wire::Region::decode(&reply.body))?;
        if region.index != index || argsz > room {
            return self.broken(what);
        }
        let mut mapped = Vec::new();
        if region.mmap && region.size > 0 {
            let [fd] = &reply.fds[..] else { return self.broken("descriptor of a region") };
            let whole = [Area { offset: 0, size: region.size }];
            let areas = if region.areas.is_empty() { &whole } else { &region.areas[..] };
            for area in areas {
                let copy = fd.try_clone();
                let copy = copy.map_err(|source| Error::Os { what: "a descriptor", source })?;
                let at = region.offset.checked_add(area.offset);
                match at.map(|at| Region::from_peer(copy, at, area.size)) {
                    Some(Ok(memory)) => mapped.push(Mapped { offset: area.offset, memory }),
                    Some(Err(e)) => log::info!(
                        "vfio-user: region {index} at {:#x} is reached by messages: {e}",
                        area.offset
                    ),
                    None => return self.broken("region that ends nowhere"),
                }
            }
        }
        Ok(RegionInfo { size: region.size, read: region.read, write: region.write, mapped })
    }

    /// How many interrupts of a type there are that an eventfd can be told of.
    ///
    /// # Errors
    /// If the server has no such type, or does not answer properly.
    pub fn irqs(&self, index: u32) -> Result<u32, Error> {
        let what = "interrupt info";
        let query = Irq { eventfd: false, index, count: 0 }.encode();
        let reply = self.call(what, command::DEVICE_GET_IRQ_INFO, &query, &[])?;
        let irq = self.decoded(what, Irq::decode(&reply.body))?;
        if irq.index != index {
            return self.broken(what);
        }
        Ok(if irq.eventfd { irq.count } else { 0 })
    }

    /// Has eventfds told of interrupts from `start` on; with none, nobody is told of any of the type.
    ///
    /// # Errors
    /// If the server refuses it or does not answer properly.
    pub fn set_irqs(&self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        // In groups that the server takes.
        let most = self.max_fds.clamp(1, version::MAX_FDS);
        if fds.is_empty() {
            let (data, action) = (IrqData::None, IrqAction::Trigger);
            let set = SetIrqs { data, action, index, start: 0, count: 0 };
            self.call("interrupts", command::DEVICE_SET_IRQS, &set.encode(), &[])?;
        }
        for (i, group) in fds.chunks(most).enumerate() {
            let (data, action) = (IrqData::Eventfd, IrqAction::Trigger);
            let (start, count) = (start + (i * most) as u32, group.len() as u32);
            let set = SetIrqs { data, action, index, start, count };
            self.call("interrupts", command::DEVICE_SET_IRQS, &set.encode(), group)?;
        }
        Ok(())
    }

    /// Reads bytes of a region by a message.
    ///
    /// # Errors
    /// If the server refuses it or does not answer properly.
    pub fn read(&self, region: u32, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let what = "read of a region";
        let mut at = offset;
        for part in into.chunks_mut(self.max_data) {
            let access = Access { offset: at, region, count: part.len() as u32 };
            let reply = self.call(what, command::REGION_READ, &access.encode(), &[])?;
            match Access::decode(&reply.body) {
                Some((a, data)) if a == access && data.len() == part.len() => {
                    part.copy_from_slice(data);
                }
                _ => return self.broken(what),
            }
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes bytes of a region by a message, and waits until it is done.
    ///
    /// # Errors
    /// If the server refuses it or does not answer properly.
    pub fn write(&self, region: u32, offset: u64, from: &[u8]) -> Result<(), Error> {
        let what = "write of a region";
        let mut at = offset;
        for part in from.chunks(self.max_data) {
            let access = Access { offset: at, region, count: part.len() as u32 };
            let body = [&access.encode(), part].concat();
            // What the answer repeats differs between servers.
            self.call(what, command::REGION_WRITE, &body, &[])?;
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes a 32-bit register without waiting for an answer: one system call, and a lock. Waits
    /// only while the server has not read the last few hundred of these, and ends the connection
    /// if that takes too long.
    pub fn post(&self, region: u32, offset: u64, value: u32) {
        let header = Header::new(0, command::REGION_WRITE, Kind::Posted, Access::SIZE + 4);
        let access = Access { offset, region, count: 4 };
        let mut bytes = [0; HEADER + Access::SIZE + 4];
        bytes[..HEADER].copy_from_slice(&header.encode());
        bytes[HEADER..HEADER + Access::SIZE].copy_from_slice(&access.encode());
        bytes[HEADER + Access::SIZE..].copy_from_slice(&value.to_le_bytes());
        if self.is_gone() {
            return;
        }
        self.shared.posted.fetch_add(1, Ordering::Relaxed);
        if let Err(e) = self.shared.send(&bytes, &[]) {
            self.shared.fail(&e);
        }
    }

    /// Lets the server reach a whole region at a bus address.
    ///
    /// # Errors
    /// If the server refuses it or does not answer properly.
    pub fn map(&self, address: u64, region: &Arc<Region>) -> Result<(), Error> {
        let size = region.len() as u64;
        let map = DmaMap { readable: true, writable: true, offset: 0, address, size };
        // First, for the server may use it as soon as it knows of it.
        self.shared.memory.lock().push(Window { address, region: Held::new(region) });
        let done = self.call("memory map", command::DMA_MAP, &map.encode(), &[region.fd()]);
        if done.is_err() {
            self.forget(address);
        }
        done.map(drop)
    }

    /// Takes back what [`Client::map`] gave. `Ok`: the server has let go of it.
    ///
    /// # Errors
    /// If that is not certain.
    pub fn unmap(&self, address: u64, region: &Region) -> Result<(), Error> {
        let unmap = DmaUnmap { all: false, address, size: region.len() as u64 };
        let done = self.call("memory unmap", command::DMA_UNMAP, &unmap.encode(), &[]);
        self.forget(address);
        done.map(drop)
    }

    fn forget(&self, address: u64) {
        self.shared.memory.lock().retain(|w| w.address != address);
    }

    /// Resets the device, and waits until that is done.
    ///
    /// # Errors
    /// If the server cannot, refuses it or does not answer properly.
    pub fn reset(&self) -> Result<(), Error> {
        if !self.info.reset {
            return Err(Error::Invalid("the device cannot be reset".to_owned()));
        }
        self.call("reset", command::DEVICE_RESET, &[], &[]).map(drop)
    }

    /// Sends a command and waits for its answer.
    fn call(
        &self,
        what: &'static str,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, Error> {
        let shared = &self.shared;
        let mut calls = shared.calls.lock();
        if self.is_gone() {
            return Err(shared.gone());
        }
        if calls.answers.try_recv().is_ok() {
            drop(calls);
            return self.broken("answer to nothing");
        }
        calls.id = calls.id.wrapping_add(1);
        let header = Header::new(calls.id, command, Kind::Command, body.len());
        if let Err(e) = shared.send(&[&header.encode(), body].concat(), fds) {
            shared.fail(&e);
            return Err(e);
        }
        let reply = match calls.answers.recv_timeout(Duration::from_nanos(shared.patience)) {
            Ok(reply) => reply,
            // The state that a late answer leaves is not known: it is not waited for.
            Err(RecvTimeoutError::Timeout) => {
                let e = Error::Late(what);
                shared.fail(&e);
                return Err(e);
            }
            Err(RecvTimeoutError::Disconnected) => return Err(shared.gone()),
        };
        let same = reply.header.id == header.id && reply.header.command == command;
        match reply.header.kind {
            Kind::Reply if same => Ok(reply),
            Kind::Failed(errno) if same => Err(Error::Refused { what, errno }),
            _ => self.broken("answer to something else"),
        }
    }

    /// A reply that makes no sense ends the connection.
    fn broken<T>(&self, what: &str) -> Result<T, Error> {
        self.checked(Error::protocol(format!("wrong {what}")))
    }

    fn decoded<T>(&self, what: &str, decoded: Option<T>) -> Result<T, Error> {
        decoded.map_or_else(|| self.broken(what), Ok)
    }

    fn checked<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(e) = &result {
            self.shared.fail(e);
        }
        result
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.fail(&Error::Closed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Shared {
    /// Ends the connection, for a reason that the first to know it tells.
    fn fail(&self, e: &Error) {
        self.why.lock().get_or_insert_with(|| e.to_string());
        self.gone.store(true, Ordering::Release);
        // The reader wakes, and so does who waits for an answer.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn gone(&self) -> Error {
        Error::Gone(self.why.lock().clone().unwrap_or_default())
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let _sending = self.sending.lock();
        let until = self.clock.now().saturating_add(self.patience);
        send(&self.stream, bytes, fds, &self.clock, until)
    }

    /// The reader's thread.
    fn read(&self, answers: &SyncSender<Message>) {
        let mut inbox = Inbox::default();
        loop {
            let step = match inbox.take(&self.stream, self.clock.now()) {
                Ok(Some(message)) => self.handle(message, answers),
                Ok(None) => self.idle(&inbox),
                Err(e) => Err(e),
            };
            if let Err(e) = step {
                self.fail(&e);
                return;
            }
        }
    }

    fn idle(&self, inbox: &Inbox) -> Result<(), Error> {
        let left = match inbox.began() {
            None => None,
            Some(began) => {
                let until = began.saturating_add(self.patience);
                match until.checked_sub(self.clock.now()).filter(|&left| left > 0) {
                    Some(left) => Some(left),
                    None => return Err(Error::Late("rest of a message")),
                }
            }
        };
        wait(&[(self.stream.as_fd(), PollFlags::POLLIN)], left)
    }

    fn handle(&self, message: Message, answers: &SyncSender<Message>) -> Result<(), Error> {
        let Header { id, command, kind, .. } = message.header;
        match (kind, command) {
            (Kind::Reply | Kind::Failed(_), _) => answers.try_send(message).or_else(|_| {
                // There is never more than one call.
                Error::protocol("an answer too many")
            }),
            (_, command::DMA_READ | command::DMA_WRITE) => {
                let done = self.transfer(command, &message.body);
                let (kind, body) = match done {
                    Ok(body) => (Kind::Reply, body),
                    Err(e) => (Kind::Failed(e as u32), Vec::new()),
                };
                if message.header.kind == Kind::Posted {
                    return Ok(());
                }
                let header = Header::new(id, command, kind, body.len());
                self.send(&[&header.encode()[..], &body].concat(), &[])
            }
            (Kind::Posted, _) => Ok(()),
            (Kind::Command, _) => {
                let header = Header::new(id, command, Kind::Failed(Errno::ENOTSUP as u32), 0);
                self.send(&header.encode(), &[])
            }
        }
    }

    /// The server reads or writes memory by a message. The body of the answer.
    fn transfer(&self, command: u16, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (dma, data) = Dma::decode(body).ok_or(Errno::EINVAL)?;
        let found = |w: &Window| {
            let at = dma.address.checked_sub(w.address)?;
            let inside = at.checked_add(dma.count)? <= w.region.len() as u64;
            inside.then(|| (w.region.clone(), at as usize))
        };
        let (region, at) = self.memory.lock().iter().find_map(found).ok_or(Errno::EFAULT)?;
        let mut out = Vec::from(dma.encode());
        if command == command::DMA_WRITE {
            if data.len() as u64 != dma.count {
                return Err(Errno::EINVAL);
            }
            region.write(at, data);
        } else {
            out.resize(Dma::SIZE + dma.count as usize, 0);
            region.read(at, &mut out[Dma::SIZE..]);
        }
        Ok(out)
    }
}

/// A socket that never blocks, connected. A server whose queue of connections is full is given
/// until `until`.
fn connect_to(path: &Path, clock: &Clock, until: u64) -> Result<UnixStream, Error> {
    let address = UnixAddr::new(path).map_err(Error::os("not a socket name"))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None);
    let fd = fd.map_err(Error::os("cannot make a socket"))?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => return Ok(fd.into()),
            Err(Errno::EAGAIN | Errno::EINTR) if clock.now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(Error::os("cannot connect")(e)),
        }
    }
}
