//! A small NBD client that loads a server: fixed newstyle, simple replies, one thread. It sends all
//! that it may have in flight by one system call and takes whatever replies are there by another, so
//! that the server is what is measured. Used by [`crate::image`], on the thread of the command.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::Error;

/// The export's name, at every server.
pub(crate) const EXPORT: &str = "bench";

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u32 = 1;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// A connection.
pub(crate) struct Client {
    stream: UnixStream,
    /// Size of the export in bytes.
    pub(crate) size: u64,
    out: Vec<u8>,
    replies: Vec<u8>,
}

impl Client {
    /// Connects to the server at `socket` and opens its export.
    pub(crate) fn connect(socket: &Path) -> Result<Client, Error> {
        let stream = UnixStream::connect(socket).map_err(Error::other)?;
        stream.set_read_timeout(Some(SILENCE)).map_err(Error::other)?;
        stream.set_write_timeout(Some(SILENCE)).map_err(Error::other)?;
        let mut client = Client { stream, size: 0, out: Vec::new(), replies: Vec::new() };
        client.negotiate()?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<(), Error> {
        let greeting: [u8; 18] = self.take()?;
        if greeting[..8] != MAGIC.to_be_bytes() || greeting[8..16] != OPTION.to_be_bytes() {
            return Err(Error::other("NBD: no newstyle greeting"));
        }
        let mut hello = FIXED_NEWSTYLE.to_be_bytes().to_vec();
        hello.extend(OPTION.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        // The name's length, the name, and no request for information.
        let name = EXPORT.len() as u32;
        hello.extend((4 + name + 2).to_be_bytes());
        hello.extend(name.to_be_bytes());
        hello.extend(EXPORT.as_bytes());
        hello.extend(0u16.to_be_bytes());
        self.stream.write_all(&hello).map_err(Error::other)?;
        loop {
            let head: [u8; 20] = self.take()?;
            let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| head[at + i]));
            let (kind, len) = (word(12), word(16));
            if head[..8] != OPTION_REPLY.to_be_bytes() || word(8) != OPTION_GO || len > 4096 {
                return Err(Error::other("NBD: not a reply to the option"));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).map_err(Error::other)?;
            match (kind, &data[..]) {
                (REPLY_ACK, _) if self.size > 0 => return Ok(()),
                (REPLY_INFO, [0, 0, size @ .., _, _]) if size.len() == 8 => {
                    self.size = size.iter().fold(0, |n, &b| n << 8 | u64::from(b));
                }
                (REPLY_INFO, _) => {}
                _ => return Err(Error::other(format!("NBD: refused: {kind:#x}"))),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).map_err(Error::other)?;
        Ok(bytes)
    }

    fn request(&mut self, command: u16, cookie: u64, offset: u64, len: u32) {
        self.out.extend(REQUEST.to_be_bytes());
        self.out.extend(0u16.to_be_bytes());
        self.out.extend(command.to_be_bytes());
        self.out.extend(cookie.to_be_bytes());
        self.out.extend(offset.to_be_bytes());
        self.out.extend(len.to_be_bytes());
    }

    fn send(&mut self) -> Result<(), Error> {
        let sent = self.stream.write_all(&self.out).map_err(Error::other);
        self.out.clear();
        sent
    }

    /// Waits for replies; how many there were.
    fn receive(&mut self) -> Result<usize, Error> {
        let mut buf = [0; 4096];
        let n = self.stream.read(&mut buf).map_err(Error::other)?;
        if n == 0 {
            return Err(Error::other("NBD: the server hung up"));
        }
        self.replies.extend(&buf[..n]);
        let (whole, rest) = self.replies.as_chunks::<16>();
        for reply in whole {
            if reply[..4] != SIMPLE_REPLY.to_be_bytes() || reply[4..8] != [0; 4] {
                return Err(Error::other(format!("NBD: answered {:02x?}", &reply[..8])));
            }
        }
        let (whole, rest) = (whole.len(), rest.to_vec());
        self.replies = rest;
        Ok(whole)
    }

    /// Writes `data` at each of the offsets, up to `depth` at a time, and flushes.
    pub(crate) fn write(
        &mut self,
        offsets: &[u64],
        depth: usize,
        data: &[u8],
    ) -> Result<(), Error> {
        let (mut sent, mut done) = (0, 0);
        while done < offsets.len() {
            for &offset in offsets[sent..].iter().take(depth - (sent - done)) {
                self.request(WRITE, sent as u64, offset, data.len() as u32);
                self.out.extend(data);
                sent += 1;
            }
            self.send()?;
            done += self.receive()?;
        }
        self.request(FLUSH, 0, 0, 0);
        self.send()?;
        while self.receive()? == 0 {}
        Ok(())
    }

    /// Says goodbye.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.request(DISCONNECT, 0, 0, 0);
        self.send()
    }
}
