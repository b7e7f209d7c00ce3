//! Files and kernel block devices as a leaf: [`FileQueue`], one per reactor for all of its files.
//!
//! I/O is `O_DIRECT` where the file takes it. The kernel is reached through one io_uring, or through
//! Linux AIO where there is none (Linux 4.19, or a host that forbids it). Requests are queued by
//! `submit` and sent by `poll` in one system call; completions are read from memory that the kernel
//! shares with us, without one. A queue with nothing queued and nothing in flight makes no call.
//!
//! - [`FileQueue`]: the queue. Belongs to a reactor thread, or to a control thread before that.
//! - [`ImageLock`]: QEMU's lock bytes on an image file. Control path.
//!
//! A file grows by writes past its end, but slowly: file systems make each such write wait, and
//! Linux AIO makes the caller wait with it. Whoever is going to write there does well to lengthen the
//! file by a large step first, with [`block::Op::WriteZeroes`] past the end, and to cut it when done
//! ([`block::LeafAccess::set_unit_len`]); the queue itself cannot know where the data will end.
//!
//! `unsafe` stands in four small files: `os` (system calls that have no safe wrapper), `uring`,
//! `aio` and `kernel` (which keeps memory in place while the kernel may use it).

mod ahead;
mod aio;
mod bounce;
mod helper;
mod kernel;
mod lock;
mod memory;
mod os;
mod queue;
#[cfg(test)]
mod tests;
mod unit;
mod uring;

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

pub use lock::{ImageLock, LockError};
pub use queue::FileQueue;

/// The kernel's interface for asynchronous file I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    /// io_uring if the kernel has it and lets us, else Linux AIO.
    Auto,
    /// Linux AIO if there is a context left, else as [`Engine::Auto`]: for files in memory (tmpfs), where
    /// it is done at once, so that nobody who sleeps need be told of it. io_uring has a thread of the kernel
    /// do it there, which costs more than what is done.
    InMemory,
    /// io_uring (Linux 5.6 or later).
    IoUring,
    /// Linux AIO (any kernel), with one helper thread for what it cannot do.
    Aio,
}

impl Engine {
    /// The one for these files: [`Engine::InMemory`] if all of them are.
    pub fn for_files(files: &[std::fs::File]) -> Engine {
        // A device's node lies in memory, too, but not what is behind it.
        let in_memory = |file: &std::fs::File| {
            file.metadata().is_ok_and(|m| m.is_file())
                && fstatfs(file).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
        };
        let all = !files.is_empty() && files.iter().all(in_memory);
        if all { Engine::InMemory } else { Engine::Auto }
    }
}

/// Why a queue could not be made or a file not be added.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a call; `what` names it.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Memory for bounce buffers could not be had.
    #[error(transparent)]
    Memory(#[from] dma::Error),
    /// Neither a regular file nor a block device.
    #[error("neither a regular file nor a block device")]
    Kind,
    /// The file was not opened for reading.
    #[error("the file is not open for reading")]
    NotReadable,
    /// A queue holds at most 65536 files.
    #[error("too many files")]
    TooMany,
}

impl Error {
    fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Os { what, source }
    }
}
