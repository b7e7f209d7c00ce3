//! [`usage`]: runs a command to its end and tells what it took, by the kernel's account of it.

use std::io::{Error as Io, ErrorKind};
use std::process::{Command, Stdio};
use std::time::Duration;

use reactor::Clock;
use serde::Serialize;

use crate::Error;

/// What a process took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Usage {
    /// From start to end.
    pub seconds: f64,
    /// Processor time, in the kernel too.
    pub cpu_seconds: f64,
    /// The most memory that was resident at a time, in bytes; at least that of who started it.
    pub peak_bytes: u64,
}

/// Runs a command that must succeed; `None` if there is no such program.
pub(crate) fn usage(command: &mut Command) -> Result<Option<Usage>, Error> {
    let clock = Clock::real();
    let began = clock.now();
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::other(e)),
    };
    let pid = i32::try_from(child.id()).map_err(Error::other)?;
    let (status, used) = wait(pid).map_err(Error::other)?;
    let seconds = (clock.now() - began) as f64 / 1e9;
    if status != 0 {
        return Err(Error::other(format!("{command:?}: wait status {status:#x}")));
    }
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok(Some(Usage {
        seconds,
        cpu_seconds: (time(used.ru_utime) + time(used.ru_stime)).as_secs_f64(),
        peak_bytes: used.ru_maxrss as u64 * 1024,
    }))
}

/// Waits for a child to end.
fn wait(pid: i32) -> Result<(i32, libc::rusage), Io> {
    let mut status = 0;
    let mut used = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    loop {
        // SAFETY: both pointers are to locals that are valid for the call, and only written to.
        let got = unsafe { libc::wait4(pid, &raw mut status, 0, used.as_mut_ptr()) };
        let error = Io::last_os_error();
        if got == pid {
            // SAFETY: all bytes were zeroed, which is a valid `rusage` of plain numbers.
            return Ok((status, unsafe { used.assume_init() }));
        }
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
