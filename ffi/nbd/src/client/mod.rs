//! [`Client`]: writes to an export of another server: several requests at a time, each with a limit on
//! its time; and reads back what it wrote. What the server says is believed of nothing but its own export.
//!
//! For control code, on a thread that may wait. It negotiates as new clients do (`GO`) and as older ones
//! did, and asks for no more than simple replies: all that it wants to know is how writes ended.

mod remote;
mod wire;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use reactor::Clock;

use crate::proto::{
    self, Header, command, export_flag, handshake_flag, info, option, option_reply,
};
use crate::tls::TlsClient;
pub use remote::{Network, Remote};
use wire::Wire;

/// Requests without a reply at a time. Their replies fit into any socket's buffer.
const WINDOW: usize = 16;
/// Longest write without an agreement on more, in bytes (doc/proto.md, "Block size constraints").
const PAYLOAD: u32 = 32 << 20;
/// Most replies to one option.
const REPLIES: usize = 256;
/// Longest data of an option's reply that is read, in bytes.
const REPLY_MAX: u32 = 64 << 10;
/// Zeroes that are sent as such where the server does not know how to make them, in bytes.
const ZEROES: usize = 1 << 20;

/// Why a remote export cannot be used, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot be reached.
    #[error("{0}: cannot connect: {1}")]
    Connect(String, std::io::Error),
    /// The connection went away, or nothing came for too long.
    #[error("the connection to the remote side failed: {0}")]
    Lost(String),
    /// The server breaks the protocol.
    #[error("the remote side is no NBD server as we know them: {0}")]
    Protocol(&'static str),
    /// The server does not want to.
    #[error("the remote side refuses: {0}")]
    Refused(String),
    /// TLS is wanted, and cannot be had.
    #[error("no TLS with the remote side: {0}")]
    Tls(String),
    /// A request failed over there.
    #[error("the remote side failed to {what} at {offset}: {why}")]
    Request {
        /// What was asked.
        what: &'static str,
        /// Where.
        offset: u64,
        /// Its error.
        why: &'static str,
    },
}

type Result<T> = std::result::Result<T, ClientError>;

/// A request whose reply is waited for.
struct Asked {
    cookie: u64,
    what: &'static str,
    offset: u64,
}

/// A connection to an export that can be written to.
pub struct Client {
    wire: Wire,
    size: u64,
    flags: u16,
    /// Offsets and lengths are multiples of this.
    block: u32,
    payload: u32,
    asked: VecDeque<Asked>,
    cookie: u64,
}

/// What a server says of its export.
#[derive(Default)]
struct Found {
    export: Option<(u64, u16)>,
    blocks: Option<[u32; 3]>,
}

/// Text of the other side, for messages.
fn text(data: &[u8]) -> String {
    let short = String::from_utf8_lossy(&data[..data.len().min(200)]).into_owned();
    short.replace(char::is_control, " ")
}

impl Client {
    /// Connects to a remote export, with these certificates if it is by TLS. `patience`: how long the
    /// handshake, and later each request, may take, in nanoseconds. `stop` ends whatever is waited for.
    ///
    /// # Errors
    /// If it cannot be reached in time, does not speak TLS though it must, has no such export, or that
    /// cannot be written to.
    pub fn connect(
        remote: &Remote,
        tls: Option<&TlsClient>,
        clock: &Clock,
        patience: u64,
        stop: Arc<AtomicBool>,
    ) -> Result<Client> {
        let mut wire = Wire::connect(remote, clock, patience, stop)?;
        let no_zeroes = greet(&mut wire)?;
        if let Some(name) = remote.secure() {
            let tls = tls.ok_or_else(|| ClientError::Tls("no certificates are given".into()))?;
            send_option(&mut wire, option::STARTTLS, &[])?;
            let (kind, data) = reply(&mut wire, option::STARTTLS)?;
            if kind != option_reply::ACK {
                return Err(ClientError::Tls(format!("it answers {kind:#x} {}", text(&data))));
            }
            wire.seal(tls.begin(name).map_err(ClientError::Tls)?)?;
        }
        let found = match go(&mut wire, remote.export())? {
            Some(found) => found,
            None => by_name(&mut wire, remote.export(), no_zeroes)?,
        };
        let (size, flags) = found.export.ok_or(ClientError::Protocol("it says no size"))?;
        let [block, _, payload] = found.blocks.unwrap_or([512, 4096, PAYLOAD]);
        if !block.is_power_of_two() || block > 1 << 16 || payload < block || payload < 4096 {
            return Err(ClientError::Protocol("block sizes that make no sense"));
        }
        if flags & export_flag::HAS_FLAGS == 0 || flags & export_flag::READ_ONLY != 0 {
            return Err(ClientError::Refused("its export is for reading only".to_owned()));
        }
        wire.has_agreed();
        let payload = payload.min(PAYLOAD) & !(block - 1);
        Ok(Client { wire, size, flags, block, payload, asked: VecDeque::new(), cookie: 0 })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What offsets and lengths must be multiples of, in bytes: a power of two.
    pub fn block_size(&self) -> u32 {
        self.block
    }

    /// Writes bytes. When this returns they are on their way: see [`Client::settle`].
    ///
    /// # Errors
    /// If the server does not take them, or an earlier request failed.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        for part in data.chunks(self.payload as usize) {
            self.ask("write", command::WRITE, at, part.len() as u32, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// The same with zeroes, for which the server may have a shorter way.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        let known = self.flags & export_flag::SEND_WRITE_ZEROES != 0;
        let zeroes = if known { Vec::new() } else { vec![0; ZEROES] };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = (end - at).min(u64::from(if known { self.payload } else { ZEROES as u32 }));
            match known {
                true => self.ask("write zeroes", command::WRITE_ZEROES, at, part as u32, &[])?,
                false => self.write(at, &zeroes[..part as usize])?,
            }
            at += part;
        }
        Ok(())
    }

    /// Waits until all that was sent is answered.
    ///
    /// # Errors
    /// If something failed.
    pub fn settle(&mut self) -> Result<()> {
        while !self.asked.is_empty() {
            self.receive()?;
        }
        Ok(())
    }

    /// Reads bytes, also what was written just now.
    ///
    /// # Errors
    /// If the server does not give them, or an earlier request failed.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.settle()?;
        let mut at = offset;
        for part in into.chunks_mut(self.payload as usize) {
            self.ask("read", command::READ, at, part.len() as u32, &[])?;
            self.receive()?;
            self.wire.read(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Has the server make durable what was written.
    ///
    /// # Errors
    /// If something failed.
    pub fn flush(&mut self) -> Result<()> {
        self.settle()?;
        if self.flags & export_flag::SEND_FLUSH == 0 {
            return Ok(());
        }
        self.ask("flush", command::FLUSH, 0, 0, &[])?;
        self.settle()
    }

    /// Whether the server is there still, as far as its socket tells.
    ///
    /// # Errors
    /// If it has gone, or says something unasked.
    pub fn look(&self) -> Result<()> {
        if self.asked.is_empty() { self.wire.is_silent() } else { Ok(()) }
    }

    /// Says good-bye.
    pub fn disconnect(mut self) {
        let header = header(command::DISCONNECT, 0, 0, 0);
        // It may have gone already.
        let _ = self.wire.write(&header, &[]);
        self.wire.end();
    }

    fn ask(
        &mut self,
        what: &'static str,
        command: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Result<()> {
        if self.asked.len() >= WINDOW {
            self.receive()?;
        }
        self.cookie += 1;
        let cookie = self.cookie;
        self.wire.write(&header(command, cookie, offset, len), data)?;
        self.asked.push_back(Asked { cookie, what, offset });
        Ok(())
    }

    /// Takes one reply.
    fn receive(&mut self) -> Result<()> {
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = self.wire.read_array::<16>()?;
        if u32::from_be_bytes([m0, m1, m2, m3]) != proto::SIMPLE_MAGIC {
            return Err(ClientError::Protocol("a reply with a wrong magic"));
        }
        let cookie = u64::from_be_bytes(cookie);
        let at = self.asked.iter().position(|a| a.cookie == cookie);
        let asked = at.and_then(|at| self.asked.remove(at));
        let asked = asked.ok_or(ClientError::Protocol("a reply to nothing that was asked"))?;
        match u32::from_be_bytes([e0, e1, e2, e3]) {
            0 => Ok(()),
            e => Err(ClientError::Request {
                what: asked.what,
                offset: asked.offset,
                why: proto::error_text(e),
            }),
        }
    }
}

fn header(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; Header::LEN] {
    let mut raw = [0; Header::LEN];
    raw[..4].copy_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
    raw[6..8].copy_from_slice(&command.to_be_bytes());
    raw[8..16].copy_from_slice(&cookie.to_be_bytes());
    raw[16..24].copy_from_slice(&offset.to_be_bytes());
    raw[24..].copy_from_slice(&len.to_be_bytes());
    raw
}

/// Takes the greeting; returns whether the server leaves zeroes out.
fn greet(wire: &mut Wire) -> Result<bool> {
    let [hello @ .., f0, f1] = wire.read_array::<18>()?;
    let magic = [proto::GREETING.to_be_bytes(), proto::OPTION_MAGIC.to_be_bytes()].concat();
    let flags = u16::from_be_bytes([f0, f1]);
    if hello[..] != magic[..] || flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(ClientError::Protocol("its greeting is not of the fixed newstyle"));
    }
    let no_zeroes = flags & handshake_flag::NO_ZEROES;
    let flags = u32::from(handshake_flag::FIXED_NEWSTYLE | no_zeroes);
    wire.write(&flags.to_be_bytes(), &[])?;
    Ok(no_zeroes != 0)
}

fn send_option(wire: &mut Wire, option: u32, data: &[u8]) -> Result<()> {
    let mut head = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    head.extend(option.to_be_bytes());
    // What we send is short.
    head.extend((data.len() as u32).to_be_bytes());
    wire.write(&head, data)
}

/// The next reply to an option: its type and data.
fn reply(wire: &mut Wire, to: u32) -> Result<(u32, Vec<u8>)> {
    let [magic @ .., o0, o1, o2, o3, k0, k1, k2, k3, l0, l1, l2, l3] = wire.read_array::<20>()?;
    let of = u32::from_be_bytes([o0, o1, o2, o3]);
    let len = u32::from_be_bytes([l0, l1, l2, l3]);
    if u64::from_be_bytes(magic) != proto::OPTION_REPLY_MAGIC || of != to || len > REPLY_MAX {
        return Err(ClientError::Protocol("a reply to an option that was not sent, or too long"));
    }
    let mut data = vec![0; len as usize];
    wire.read(&mut data)?;
    Ok((u32::from_be_bytes([k0, k1, k2, k3]), data))
}

/// Asks for an export; `None` if the server does not know that way.
fn go(wire: &mut Wire, export: &str) -> Result<Option<Found>> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(1u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    send_option(wire, option::GO, &data)?;
    let mut found = Found::default();
    for _ in 0..REPLIES {
        let (kind, data) = reply(wire, option::GO)?;
        let unfit = ClientError::Protocol("information of a wrong length");
        match kind {
            option_reply::ACK => return Ok(Some(found)),
            option_reply::ERR_UNSUP => return Ok(None),
            option_reply::INFO => {
                let (item, rest) = data.split_first_chunk::<2>().ok_or(unfit)?;
                found.take(u16::from_be_bytes(*item), rest)?;
            }
            _ => return Err(ClientError::Refused(format!("{kind:#x} {}", text(&data)))),
        }
    }
    Err(ClientError::Protocol("too many replies"))
}

impl Found {
    fn take(&mut self, item: u16, data: &[u8]) -> Result<()> {
        let unfit = || ClientError::Protocol("information of a wrong length");
        match item {
            info::EXPORT => {
                let [size @ .., f0, f1] = <[u8; 10]>::try_from(data).map_err(|_| unfit())?;
                self.export = Some((u64::from_be_bytes(size), u16::from_be_bytes([f0, f1])));
            }
            info::BLOCK_SIZE => {
                let (words, []) = data.as_chunks::<4>() else { return Err(unfit()) };
                let words = <[[u8; 4]; 3]>::try_from(words).map_err(|_| unfit())?;
                self.blocks = Some(words.map(u32::from_be_bytes));
            }
            // Servers may say more than they are asked.
            _ => {}
        }
        Ok(())
    }
}

/// Asks for an export in the way that has no answer but the end of the connection.
fn by_name(wire: &mut Wire, export: &str, no_zeroes: bool) -> Result<Found> {
    send_option(wire, option::EXPORT_NAME, export.as_bytes())?;
    let [size @ .., f0, f1] = wire.read_array::<10>()?;
    if !no_zeroes {
        wire.read_array::<124>()?;
    }
    let export = Some((u64::from_be_bytes(size), u16::from_be_bytes([f0, f1])));
    Ok(Found { export, blocks: None })
}
