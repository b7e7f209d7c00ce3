//! [`Helper`]: a thread that does what Linux AIO cannot: `fallocate`, and `fdatasync` before 4.18.
//!
//! Used by the AIO engine only, and only for these rare requests; so it may cost a wake-up each.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::Error;
use crate::kernel::Io;

/// What the thread is to do.
struct Job {
    slot: u16,
    file: Arc<File>,
    io: Io,
    offset: u64,
}

/// The queue's end of the thread.
pub(crate) struct Helper {
    jobs: Option<Sender<Job>>,
    results: Receiver<(u16, i64)>,
    thread: Option<JoinHandle<()>>,
    busy: usize,
}

impl Helper {
    /// Starts the thread. It counts `done` up after each result.
    pub(crate) fn new(done: &EventFd) -> Result<Helper, Error> {
        let done = duplicate(done.as_fd())?;
        let (jobs, todo) = channel::<Job>();
        let (answer, results) = channel();
        let work = move || {
            for job in todo {
                let result = run(&job);
                drop(job.file);
                if answer.send((job.slot, result)).is_err() {
                    return;
                }
                let _ = nix::unistd::write(&done, &1u64.to_ne_bytes());
            }
        };
        let thread = std::thread::Builder::new()
            .name("polldisk-file".into())
            .stack_size(64 << 10)
            .spawn(work)
            .map_err(Error::os("start a thread"))?;
        Ok(Helper { jobs: Some(jobs), results, thread: Some(thread), busy: 0 })
    }

    /// Hands over a `Sync` or `Allocate`.
    pub(crate) fn push(&mut self, slot: u16, file: &Arc<File>, io: Io, offset: u64) {
        let job = Job { slot, file: file.clone(), io, offset };
        let jobs = self.jobs.as_ref().expect("there until the drop");
        jobs.send(job).unwrap_or_else(|_| unreachable!("the thread ends after this handle"));
        self.busy += 1;
    }

    /// The next result, if one is there.
    pub(crate) fn next(&mut self) -> Option<(u16, i64)> {
        if self.busy == 0 {
            return None;
        }
        let result = self.results.try_recv().ok()?;
        self.busy -= 1;
        Some(result)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The thread sees that no job can come any more, and ends.
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The result as the kernel's interfaces give it: 0 or a negative errno.
fn run(job: &Job) -> i64 {
    let done = match job.io {
        Io::Sync => nix::unistd::fdatasync(&*job.file),
        Io::Allocate { mode, len } => match (i64::try_from(job.offset), i64::try_from(len)) {
            (Ok(at), Ok(len)) => {
                fallocate(&*job.file, FallocateFlags::from_bits_retain(mode), at, len)
            }
            _ => Err(nix::Error::EFBIG),
        },
        Io::Read | Io::Write { .. } => Err(nix::Error::EINVAL),
    };
    done.map_or_else(|e| -i64::from(e as i32), |()| 0)
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    fd.try_clone_to_owned().map_err(Error::os("duplicate an eventfd"))
}

/// The eventfd of an AIO queue.
pub(crate) fn event_fd() -> Result<EventFd, Error> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|e| Error::os("eventfd")(e.into()))
}
