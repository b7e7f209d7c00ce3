//! [`Nodes`]: what can be done with nodes, in a transaction or outside.

use nix::errno::Errno;

use super::connection::Failure;
use super::wire::{MAX_LIST, bad_path, kind, strings};
use super::{Error, Perm, Store, Transaction, describe, explain};

/// How often a list is begun anew because it changed in the middle.
const LIST_TRIES: u32 = 64;

/// Reading and writing nodes, by a [`Store`] or within a [`Transaction`]. Paths are absolute, or
/// relative to the home of the domain that the connection belongs to.
pub trait Nodes: Talk {
    /// The value of a node; `None` if there is no such node.
    ///
    /// # Errors
    /// As all calls: [`Error::Refused`] or [`Error::Closed`]. A domain that is not privileged is refused
    /// with `EACCES` where it may not know that a node is gone.
    fn read(&self, path: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
        found(self.call("read", kind::READ, path.as_ref(), b""))
    }

    /// Writes a node; makes it, and those above it, if need be.
    ///
    /// # Errors
    /// As all calls.
    fn write(&self, path: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        self.call("write", kind::WRITE, path.as_ref(), value.as_ref()).map(drop)
    }

    /// Makes a node without a value, if it is not there.
    ///
    /// # Errors
    /// As all calls.
    fn mkdir(&self, path: impl AsRef<[u8]>) -> Result<(), Error> {
        self.call("make", kind::MKDIR, path.as_ref(), b"").map(drop)
    }

    /// Removes a node and all below it. Nothing happens if it is not there.
    ///
    /// # Errors
    /// As all calls.
    fn rm(&self, path: impl AsRef<[u8]>) -> Result<(), Error> {
        found(self.call("remove", kind::RM, path.as_ref(), b"")).map(drop)
    }

    /// The names of the nodes right below one, of whatever number; `None` if it is not there.
    ///
    /// # Errors
    /// As all calls. A store that has no lists in parts (oxenstored, by the kernel's device) refuses one
    /// that is longer than a message with `ENOSYS`.
    fn directory(&self, path: impl AsRef<[u8]>) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let path = path.as_ref();
        let list = match self.call("list", kind::DIRECTORY, path, b"") {
            Err(Error::Refused { why: Errno::E2BIG, .. }) => in_parts(self, path)?,
            other => found(other)?,
        };
        let Some(list) = list else { return Ok(None) };
        let names = strings(&list).filter(|n| n.iter().all(|n| is_name(n)));
        names.map(Some).ok_or_else(|| nonsense("list", path))
    }

    /// Who may do what with a node; `None` if it is not there.
    ///
    /// # Errors
    /// As all calls.
    fn perms(&self, path: impl AsRef<[u8]>) -> Result<Option<Vec<Perm>>, Error> {
        let path = path.as_ref();
        let answer = found(self.call("read permissions of", kind::GET_PERMS, path, b""))?;
        let Some(answer) = answer else { return Ok(None) };
        let perms = strings(&answer).and_then(|t| t.iter().map(|t| Perm::decode(t)).collect());
        perms.map(Some).ok_or_else(|| nonsense("read permissions of", path))
    }

    /// Says who may do what with a node. The first entry is the owner's.
    ///
    /// # Errors
    /// As all calls.
    fn set_perms(&self, path: impl AsRef<[u8]>, perms: &[Perm]) -> Result<(), Error> {
        let text: String = perms.iter().map(|p| p.encode() + "\0").collect();
        let verb = "set permissions of";
        self.call(verb, kind::SET_PERMS, path.as_ref(), text.as_bytes()).map(drop)
    }
}

impl Nodes for Store {}
impl Nodes for Transaction<'_> {}

/// A request, and the transaction that it belongs to. Not for others to implement.
pub trait Talk {
    #[doc(hidden)]
    fn call(&self, verb: &str, kind: u32, path: &[u8], rest: &[u8]) -> Result<Vec<u8>, Error>;
}

impl Talk for Store {
    fn call(&self, verb: &str, kind: u32, path: &[u8], rest: &[u8]) -> Result<Vec<u8>, Error> {
        self.request(0, verb, kind, path, rest)
    }
}

impl Store {
    pub(super) fn request(
        &self,
        tx_id: u32,
        verb: &str,
        kind: u32,
        path: &[u8],
        rest: &[u8],
    ) -> Result<Vec<u8>, Error> {
        if let Some(why) = bad_path(path) {
            return Err(Error::Request { what: describe(verb, path), why });
        }
        let answer: Result<Vec<u8>, Failure> = self.talk(kind, tx_id, path, rest);
        answer.map_err(|e| explain(e, || describe(verb, path)))
    }
}

fn found(answer: Result<Vec<u8>, Error>) -> Result<Option<Vec<u8>>, Error> {
    match answer {
        Err(Error::Refused { why: Errno::ENOENT, .. }) => Ok(None),
        other => other.map(Some),
    }
}

/// Something that is no answer to what was asked, though it has the form of one.
fn nonsense(verb: &str, path: &[u8]) -> Error {
    Error::Refused {
        what: format!("{}: the answer makes no sense", describe(verb, path)),
        why: Errno::EIO,
    }
}

fn is_name(name: &[u8]) -> bool {
    bad_path(name).is_none() && !name.contains(&b'/')
}

/// A list that is too long for one message: generation (whatever the server writes), zero byte, then a
/// part of the list; at the end an empty name. If the generation changes all begins anew.
fn in_parts<T: Talk + ?Sized>(talk: &T, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let (mut list, mut generation) = (Vec::new(), Vec::new());
    let mut tries = 0;
    loop {
        let offset = format!("{}\0", list.len());
        let part = found(talk.call("list", kind::DIRECTORY_PART, path, offset.as_bytes()))?;
        let Some(part) = part else { return Ok(None) };
        let end = part.iter().position(|&b| b == 0).ok_or_else(|| nonsense("list", path))?;
        let (now, names) = (&part[..end], &part[end + 1..]);
        if !list.is_empty() && now != generation {
            list.clear();
            tries += 1;
            if tries == LIST_TRIES {
                return Err(Error::Conflict(tries));
            }
            continue;
        }
        generation = now.to_vec();
        list.extend_from_slice(names);
        if names.is_empty() || list.len() > MAX_LIST {
            return Err(nonsense("list", path));
        }
        // An empty name: behind the last one, or all there is.
        if list == b"\0" || list.ends_with(b"\0\0") {
            list.pop();
            return Ok(Some(list));
        }
    }
}
