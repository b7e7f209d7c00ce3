//! SIGINT and SIGTERM, taken by a thread of their own: they work at any time, also while the main
//! thread opens an image, and never in the middle of another thread's work.
//!
//! Until a command says otherwise they end the process as they would without this module; killing
//! it is safe for images at any moment. Scratch folders are removed before.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal, raise};
use reactor::sync::Mutex;

/// A write beyond RLIMIT_FSIZE fails as on a full disk, and does not kill the process besides. To be
/// called before any thread is started.
pub(crate) fn outlive_file_limit() {
    // Blocked, not ignored: that takes no unsafe code, and child processes start without it.
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    let _ = set.thread_block();
}

/// The two signals, from now on in our hands.
pub(crate) struct Signals(Arc<Mutex<Then>>);

/// What is done when one comes.
enum Then {
    /// Remove this folder, if any, and die of it.
    Die(Option<PathBuf>),
    /// Tell the command, which ends in order. Only the first is told, more change nothing.
    Tell(SyncSender<Signal>),
}

impl Signals {
    /// Takes them over. To be called before any other thread is started: threads inherit that
    /// these signals are not for them.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn take() -> anyhow::Result<Signals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block().context("cannot block signals")?;
        let then = Arc::new(Mutex::new(Then::Die(None)));
        let shared = then.clone();
        let body = move || {
            while let Ok(signal) = set.wait() {
                match &*shared.lock() {
                    Then::Tell(sender) => {
                        let _ = sender.try_send(signal);
                    }
                    Then::Die(scratch) => {
                        if let Some(path) = scratch {
                            let _ = std::fs::remove_dir_all(path);
                        }
                        let _ = set.thread_unblock();
                        let _ = raise(signal);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(body);
        thread.context("cannot start a thread for signals")?;
        Ok(Signals(then))
    }

    /// A folder to remove before the process dies of a signal.
    pub(crate) fn remove_at_end(&self, scratch: &Path) {
        *self.0.lock() = Then::Die(Some(scratch.to_owned()));
    }

    /// From now on the process does not die: the first signal comes out here.
    pub(crate) fn told(&self) -> Receiver<Signal> {
        let (sender, receiver) = sync_channel(1);
        *self.0.lock() = Then::Tell(sender);
        receiver
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // While the process is dying of a signal the command may fail, for its folder is gone:
        // waits for the end here, instead of reporting that.
        drop(self.0.lock());
    }
}
