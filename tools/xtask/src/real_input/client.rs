//! A small NBD client that can have many requests in flight and lose its server at any moment:
//! fixed newstyle, simple replies. Written against the protocol's text, apart from our server, so
//! that both cannot share a mistake. Used by the kill cases, on the main thread.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u16 = 1;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const COMMAND_FUA: u16 = 1;
const COMMAND_NO_HOLE: u16 = 2;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Write { fua: bool },
    Zero { no_hole: bool },
    Trim,
    Flush,
}

/// One open connection.
pub(crate) struct Client {
    stream: UnixStream,
    /// Size of the export in bytes.
    pub(crate) size: u64,
    /// Smallest unit of offsets and lengths, in bytes.
    pub(crate) granule: u64,
    flags: u16,
}

impl Client {
    /// Connects and opens the export with the empty name.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        let mut client = Self { stream, size: 0, granule: 1, flags: 0 };
        client.negotiate().context("NBD negotiation")?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<()> {
        if (self.u64()?, self.u64()?) != (MAGIC, OPTION) {
            bail!("no newstyle greeting");
        }
        if self.u16()? & FIXED_NEWSTYLE == 0 {
            bail!("not fixed newstyle");
        }
        let mut hello = u32::from(FIXED_NEWSTYLE).to_be_bytes().to_vec();
        hello.extend(OPTION.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        // An empty name, and one request for information: the block size.
        let mut data = 0_u32.to_be_bytes().to_vec();
        data.extend(1_u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        hello.extend(u32::try_from(data.len())?.to_be_bytes());
        hello.extend(data);
        self.stream.write_all(&hello)?;
        loop {
            if (self.u64()?, self.u32()?) != (OPTION_REPLY, OPTION_GO) {
                bail!("not a reply to the option");
            }
            let (kind, length) = (self.u32()?, self.u32()?);
            if length > 4096 {
                bail!("a reply of {length} bytes");
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => break,
                REPLY_INFO => self.info(&data)?,
                _ => bail!("refused: {kind:x} {}", String::from_utf8_lossy(&data)),
            }
        }
        if self.size == 0 || self.flags & FLAG_SEND_FLUSH == 0 {
            bail!("size {} and flags {:x}: no disk that can be flushed", self.size, self.flags);
        }
        Ok(())
    }

    fn info(&mut self, data: &[u8]) -> Result<()> {
        match data {
            [0, 0, size @ .., high, low] if size.len() == 8 => {
                self.size = u64::from_be_bytes(size.try_into()?);
                self.flags = u16::from_be_bytes([*high, *low]);
            }
            [0, 3, a, b, c, d, ..] if data.len() == 14 => {
                self.granule = u64::from(u32::from_be_bytes([*a, *b, *c, *d])).max(1);
            }
            [high, low, ..] => {
                let kind = u16::from_be_bytes([*high, *low]);
                if kind == INFO_EXPORT || kind == INFO_BLOCK_SIZE {
                    bail!("information {kind} of {} bytes", data.len());
                }
            }
            _ => bail!("information of {} bytes", data.len()),
        }
        Ok(())
    }

    /// Whether the server says that it can do this.
    pub(crate) fn can(&self, command: Command) -> bool {
        let flag = match command {
            Command::Write { fua: false } | Command::Flush => return true,
            Command::Write { fua: true } => FLAG_SEND_FUA,
            Command::Zero { .. } => FLAG_SEND_WRITE_ZEROES,
            Command::Trim => FLAG_SEND_TRIM,
        };
        self.flags & flag != 0
    }

    /// Sends a request; `data` goes with a write only.
    pub(crate) fn send(
        &mut self,
        command: Command,
        cookie: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<()> {
        let (number, flags): (u16, u16) = match command {
            Command::Write { fua } => (1, if fua { COMMAND_FUA } else { 0 }),
            Command::Flush => (3, 0),
            Command::Trim => (4, 0),
            Command::Zero { no_hole } => (6, if no_hole { COMMAND_NO_HOLE } else { 0 }),
        };
        let mut request = REQUEST.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(number.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).context("sending a request")
    }

    /// Waits for one reply and returns its cookie. An error answer is an error.
    pub(crate) fn receive(&mut self) -> Result<u64> {
        let magic = self.u32()?;
        let (error, cookie) = (self.u32()?, self.u64()?);
        if magic != SIMPLE_REPLY {
            bail!("a reply that starts with {magic:x}");
        }
        if error != 0 {
            bail!("the server answered error {error}");
        }
        Ok(cookie)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context("reading from the server")?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_be_bytes)
    }
}
