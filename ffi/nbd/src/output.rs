//! [`Output`]: replies on their way to the client, gathered into few system calls. Owned by the
//! connection's thread. Its length is bounded by the connection's requests and buffers.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use crate::buffers::{Buffers, Class};
use crate::proto::Head;
use crate::sockio::Gather;

/// What follows a head.
#[derive(Debug)]
pub(crate) enum Data {
    /// Nothing.
    None,
    /// Bytes of the buffer that a piece holds.
    Piece { piece: u16, class: Class, offset: usize, len: usize },
    /// Bytes of its own.
    Owned(Vec<u8>),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Data::None => 0,
            Data::Piece { len, .. } => *len,
            Data::Owned(bytes) => bytes.len(),
        }
    }
}

/// A part of a reply.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) head: Head,
    pub(crate) data: Data,
    /// The request that it belongs to.
    pub(crate) req: u16,
}

/// The parts that wait, the first of them perhaps partly sent.
#[derive(Debug, Default)]
pub(crate) struct Output {
    parts: VecDeque<Part>,
    sent: usize,
}

impl Output {
    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Adds a part at the end.
    pub(crate) fn push(&mut self, part: Part) {
        self.parts.push_back(part);
    }

    /// Sends as much as the socket takes now, at most one system call's worth: `(how much was
    /// offered, how much of it went)`. [`Output::pop_sent`] then gives the parts that are done.
    ///
    /// # Errors
    /// As the kernel says.
    pub(crate) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        memory: &Buffers,
    ) -> Result<(usize, usize), Errno> {
        let mut out = Gather::new();
        let mut offered = 0;
        let mut skip = self.sent;
        for part in &self.parts {
            if !out.fits(2) {
                break;
            }
            let head = part.head.bytes();
            let in_head = skip.min(head.len());
            out.bytes(&head[in_head..]);
            let in_data = skip - in_head;
            match &part.data {
                Data::None => {}
                Data::Piece { class, offset, len, .. } => {
                    out.region(memory.region(*class), offset + in_data, len - in_data);
                }
                Data::Owned(bytes) => out.bytes(&bytes[in_data..]),
            }
            offered += head.len() + part.data.len() - skip;
            skip = 0;
        }
        let went = out.send(fd)?;
        self.sent += went;
        Ok((offered, went))
    }

    /// The next part that has gone completely.
    pub(crate) fn pop_sent(&mut self) -> Option<Part> {
        let first = self.parts.front()?;
        let len = first.head.bytes().len() + first.data.len();
        if self.sent < len {
            return None;
        }
        self.sent -= len;
        self.parts.pop_front()
    }

    /// The next part, sent or not: when nobody listens any more.
    pub(crate) fn discard(&mut self) -> Option<Part> {
        self.sent = 0;
        self.parts.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Use;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn parts_go_in_order_however_little_the_socket_takes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut memory = Buffers::new(false).unwrap();
        let mut output = Output::default();
        let mut want = Vec::new();
        for i in 0..40u16 {
            let lent = memory.take(Class::Large, Use::Read);
            let head = Head::simple(u64::from(i), 0);
            want.extend(head.bytes());
            let data = match lent {
                Some(lent) => {
                    let offset = lent.seg().offset() as usize + 3;
                    let bytes = vec![i as u8; 200_000];
                    memory.region(Class::Large).write(offset, &bytes);
                    want.extend(bytes);
                    Data::Piece { piece: i, class: Class::Large, offset, len: 200_000 }
                }
                None => {
                    want.extend([7; 9]);
                    Data::Owned(vec![7; 9])
                }
            };
            output.push(Part { head, data, req: i });
        }
        let (mut got, mut done, mut short) = (Vec::new(), 0, 0);
        let mut chunk = vec![0; 3001];
        while !output.is_empty() {
            match output.send(ours.as_fd(), &memory) {
                Ok((offered, went)) => short += usize::from(went < offered),
                Err(e) => assert_eq!(e, Errno::EAGAIN),
            }
            while let Some(part) = output.pop_sent() {
                assert_eq!(part.req, done);
                done += 1;
            }
            let n = theirs.read(&mut chunk).unwrap();
            got.extend(&chunk[..n]);
        }
        drop(ours);
        theirs.read_to_end(&mut got).unwrap();
        assert!(got == want && done == 40 && short > 0);
    }
}
