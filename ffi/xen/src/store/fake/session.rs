//! One connection of the stand-in: its bytes, watches and transactions. Pure.

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;

use super::tree::{Change, MOST, Tree, Tx, View, may_read};
use crate::store::Perm;

const HEADER: usize = 16;
/// Quotas of domains that are not privileged.
const MOST_WATCHES: usize = 128;
const MOST_TRANSACTIONS: usize = 10;

#[derive(Debug)]
struct Watch {
    path: Vec<u8>,
    token: Vec<u8>,
    /// So many bytes are left away in front of events' paths.
    strip: usize,
}

/// A connection, and whose it is.
#[derive(Debug)]
pub(super) struct Session {
    domid: u16,
    input: Vec<u8>,
    /// What is to be sent.
    pub(super) output: VecDeque<u8>,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Tx>,
    last_tx: u32,
}

/// The other side broke a rule for which it is cut off.
#[derive(Debug)]
pub(super) struct CutOff;

impl Session {
    pub(super) fn new(domid: u16) -> Session {
        Session {
            domid,
            input: Vec::new(),
            output: VecDeque::new(),
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            last_tx: 0,
        }
    }

    /// Takes bytes and serves the requests that are whole. What they changed goes to `fired`.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        tree: &mut Tree,
        fired: &mut Vec<Change>,
    ) -> Result<(), CutOff> {
        self.input.extend(bytes);
        loop {
            if self.input.len() < HEADER {
                return Ok(());
            }
            let word = |i: usize| {
                let b = &self.input[4 * i..4 * i + 4];
                u32::from_le_bytes([b[0], b[1], b[2], b[3]])
            };
            let (kind, req_id, tx_id, len) = (word(0), word(1), word(2), word(3) as usize);
            if len > MOST {
                return Err(CutOff);
            }
            if self.input.len() < HEADER + len {
                return Ok(());
            }
            let payload = self.input[HEADER..HEADER + len].to_vec();
            self.input.drain(..HEADER + len);
            match self.serve(kind, tx_id, &payload, tree, fired) {
                Ok(answer) => {
                    self.send(kind, req_id, tx_id, &answer);
                    if kind == 4
                        && let Some(new) = self.watches.last()
                    {
                        // The first event comes behind the answer, and needs no change.
                        let path = new.path.clone();
                        self.event(self.watches.len() - 1, &path);
                    }
                }
                Err(errno) => {
                    self.send(16, req_id, tx_id, format!("{errno:?}\0").as_bytes());
                }
            }
        }
    }

    fn send(&mut self, kind: u32, req_id: u32, tx_id: u32, payload: &[u8]) {
        for word in [kind, req_id, tx_id, payload.len() as u32] {
            self.output.extend(word.to_le_bytes());
        }
        self.output.extend(payload);
    }

    fn event(&mut self, watch: usize, path: &[u8]) {
        let watch = &self.watches[watch];
        let payload = [&path[watch.strip..], b"\0", &watch.token, b"\0"].concat();
        self.send(15, 0, 0, &payload);
    }

    /// Tells of a change, to those watches that it concerns. Returns whether there are some.
    pub(super) fn changed(&mut self, change: &Change) -> bool {
        if self.watches.is_empty() || !may_read(&change.perms, self.domid) {
            return false;
        }
        let before = self.output.len();
        for i in 0..self.watches.len() {
            let watched = &self.watches[i].path;
            let under = || {
                let rest = change.path.strip_prefix(&watched[..]);
                watched == b"/" && change.path.starts_with(b"/")
                    || rest.is_some_and(|r| r.first() == Some(&b'/'))
            };
            if *watched == change.path || !change.exact && under() {
                self.event(i, &change.path);
            }
        }
        self.output.len() > before
    }

    /// A path as it was sent, made absolute; and how much was put before it.
    fn absolute(&self, path: &[u8]) -> Result<(Vec<u8>, usize), Errno> {
        let known = |b: &u8| b.is_ascii_alphanumeric() || b"-/_@".contains(b);
        let odd = path.is_empty()
            || !path.iter().all(known)
            || path.len() > 1 && path.ends_with(b"/")
            || path.windows(2).any(|w| w == b"//");
        if odd {
            return Err(Errno::EINVAL);
        }
        match path[0] {
            b'/' if path.len() <= 3072 => Ok((path.to_vec(), 0)),
            b'@' => Ok((path.to_vec(), 0)),
            b'/' => Err(Errno::EINVAL),
            _ if path.len() > 2048 => Err(Errno::EINVAL),
            _ => {
                let home = format!("/local/domain/{}/", self.domid).into_bytes();
                Ok(([&home, path].concat(), home.len()))
            }
        }
    }

    /// A request's first string, which is a path, and what is behind it.
    fn path<'a>(&self, payload: &'a [u8]) -> Result<(Vec<u8>, usize, &'a [u8]), Errno> {
        let end = payload.iter().position(|&b| b == 0).ok_or(Errno::EINVAL)?;
        let (path, strip) = self.absolute(&payload[..end])?;
        Ok((path, strip, &payload[end + 1..]))
    }

    fn serve(
        &mut self,
        kind: u32,
        tx_id: u32,
        payload: &[u8],
        tree: &mut Tree,
        fired: &mut Vec<Change>,
    ) -> Result<Vec<u8>, Errno> {
        const OK: &[u8] = b"OK\0";
        match kind {
            4 | 5 => return self.watch(kind == 4, payload).map(|()| OK.to_vec()),
            6 => return self.begin(tx_id, payload),
            7 => {
                let tx = self.transactions.remove(&tx_id).ok_or(Errno::ENOENT)?;
                return match payload {
                    b"T\0" => tree.commit(tx).map(|f| fired.extend(f)).map(|()| OK.to_vec()),
                    b"F\0" => Ok(OK.to_vec()),
                    _ => Err(Errno::EINVAL),
                };
            }
            1..=3 | 11..=14 | 22 => {}
            _ => return Err(Errno::ENOSYS),
        }
        let (path, _, rest) = self.path(payload)?;
        if path[0] == b'@' {
            return Err(Errno::EINVAL);
        }
        let domid = self.domid;
        let tx = match tx_id {
            0 => None,
            id => Some(self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?),
        };
        let mut view = View { tree, tx, domid, fired: Vec::new() };
        let alone = || if rest.is_empty() { Ok(()) } else { Err(Errno::EINVAL) };
        let answer = match kind {
            1 => alone().and_then(|()| view.list(&path))?,
            2 => alone().and_then(|()| view.read(&path))?,
            3 => {
                let perms = alone().and_then(|()| view.perms(&path))?;
                perms.iter().flat_map(|p| (p.encode() + "\0").into_bytes()).collect()
            }
            22 => {
                let text = rest.strip_suffix(b"\0").and_then(|t| std::str::from_utf8(t).ok());
                let offset = text.and_then(|t| t.parse().ok()).ok_or(Errno::EINVAL)?;
                view.list_part(&path, offset)?
            }
            11 => view.write(&path, rest).map(|()| OK.to_vec())?,
            12 => alone().and_then(|()| view.mkdir(&path)).map(|()| OK.to_vec())?,
            13 => alone().and_then(|()| view.rm(&path)).map(|()| OK.to_vec())?,
            _ => {
                let text = rest.strip_suffix(b"\0").ok_or(Errno::EINVAL)?;
                let perms: Option<Vec<Perm>> = text.split(|&b| b == 0).map(Perm::decode).collect();
                view.set_perms(&path, perms.ok_or(Errno::EINVAL)?).map(|()| OK.to_vec())?
            }
        };
        fired.append(&mut view.fired);
        Ok(answer)
    }

    fn begin(&mut self, tx_id: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        if tx_id != 0 {
            return Err(Errno::EBUSY);
        }
        if payload != b"\0" {
            return Err(Errno::EINVAL);
        }
        if self.domid != 0 && self.transactions.len() >= MOST_TRANSACTIONS {
            return Err(Errno::ENOSPC);
        }
        self.last_tx += 1;
        self.transactions.insert(self.last_tx, Tx::default());
        Ok(format!("{}\0", self.last_tx).into_bytes())
    }

    fn watch(&mut self, add: bool, payload: &[u8]) -> Result<(), Errno> {
        let (path, strip, rest) = self.path(payload)?;
        let token = rest.strip_suffix(b"\0").filter(|t| !t.contains(&0)).ok_or(Errno::EINVAL)?;
        let at = self.watches.iter().position(|w| w.path == path && w.token == token);
        match (add, at) {
            (true, Some(_)) => Err(Errno::EEXIST),
            (true, None) if self.domid != 0 && self.watches.len() >= MOST_WATCHES => {
                Err(Errno::ENOSPC)
            }
            (true, None) => {
                self.watches.push(Watch { path, token: token.to_vec(), strip });
                Ok(())
            }
            (false, Some(at)) => {
                self.watches.remove(at);
                Ok(())
            }
            (false, None) => Err(Errno::ENOENT),
        }
    }
}
