//! [`Transaction`]: several requests that are done as one.

use std::cell::Cell;
use std::time::Duration;

use nix::errno::Errno;

use super::nodes::Talk;
use super::wire::{decimal, kind};
use super::{Error, Store, explain};

/// How often a transaction is tried: with the waits between, more than a second.
const TRIES: u32 = 24;

/// Reads and writes by this see a state of the store that others change only as a whole, and are
/// seen by others all at once. See [`Store::transaction`].
#[derive(Debug)]
pub struct Transaction<'a> {
    store: &'a Store,
    id: u32,
    /// Something was changed.
    wrote: Cell<bool>,
}

impl Talk for Transaction<'_> {
    fn call(&self, verb: &str, kind: u32, path: &[u8], rest: &[u8]) -> Result<Vec<u8>, Error> {
        if matches!(kind, kind::WRITE | kind::MKDIR | kind::RM | kind::SET_PERMS) {
            self.wrote.set(true);
        }
        self.store.request(self.id, verb, kind, path, rest)
    }
}

impl Store {
    /// Does what `work` does as one transaction. If others changed what it saw it is done again, from
    /// the beginning: so `work` must have no effect elsewhere. If it fails nothing is changed; and if
    /// it had only read, it is asked again in case that it saw a mixture of two states.
    ///
    /// # Errors
    /// That of `work`; [`Error::Conflict`] if others were always quicker; else as all calls.
    pub fn transaction<R, E: From<Error>>(
        &self,
        mut work: impl FnMut(&Transaction<'_>) -> Result<R, E>,
    ) -> Result<R, E> {
        for tried in 0..TRIES {
            if tried > 0 {
                // Not in step with others who do the same.
                let jitter = u64::from(std::process::id()) % 7;
                let wait = (1u64 << tried.min(6)) + jitter;
                std::thread::sleep(Duration::from_millis(wait));
            }
            let tx = self.begin()?;
            let result = work(&tx);
            let keep = result.is_ok() || !tx.wrote.get();
            match (tx.end(keep), result) {
                (Err(Error::Refused { why: Errno::EAGAIN, .. }), _) => {}
                // What `work` says is more to the point than what its end says.
                (_, Err(e)) => return Err(e),
                (ended, result) => return ended.map_err(E::from).and(result),
            }
        }
        Err(Error::Conflict(TRIES).into())
    }

    fn begin(&self) -> Result<Transaction<'_>, Error> {
        let what = || "begin a transaction".to_owned();
        let answer = self.talk(kind::TRANSACTION_START, 0, b"", b"");
        let answer = answer.map_err(|e| explain(e, what))?;
        let id = answer.strip_suffix(b"\0").and_then(decimal).and_then(|n| u32::try_from(n).ok());
        match id {
            // 0 would be no transaction at all.
            Some(id) if id != 0 => Ok(Transaction { store: self, id, wrote: Cell::new(false) }),
            _ => Err(Error::Refused { what: what(), why: Errno::EIO }),
        }
    }
}

impl Transaction<'_> {
    fn end(&self, keep: bool) -> Result<(), Error> {
        let word = if keep { b"T" } else { b"F" };
        let answer = self.store.talk(kind::TRANSACTION_END, self.id, word, b"");
        answer.map(drop).map_err(|e| explain(e, || "end a transaction".to_owned()))
    }
}
