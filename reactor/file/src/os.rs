//! System calls that have no safe wrapper. Control path only.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Once;

/// Alignments that the file demands of direct I/O, in bytes: (memory, offset and length), both 0 if
/// it takes none. `None` if the kernel does not say (before Linux 6.1, and some file systems).
pub(crate) fn dio_alignment(file: &File) -> Option<(u32, u32)> {
    const DIOALIGN: u32 = 0x2000;
    // struct statx of linux/stat.h: 256 bytes; the mask first, the two alignments at 0x98. Called by
    // number, since the C libraries of the hosts that this must start on have no such function.
    let mut buf = [0u32; 64];
    // SAFETY: an open descriptor, an empty path, and a buffer of the size of struct statx.
    let done = unsafe {
        libc::syscall(
            libc::SYS_statx,
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            DIOALIGN,
            buf.as_mut_ptr(),
        )
    };
    (done == 0 && buf[0] & DIOALIGN != 0).then(|| (buf[0x98 / 4], buf[0x9c / 4]))
}

/// Logical block size of a block device, in bytes.
pub(crate) fn block_size(file: &File) -> io::Result<u32> {
    const BLKSSZGET: libc::Ioctl = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: an open descriptor, and the ioctl writes one int.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut size) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Makes a write beyond the process's file size limit fail with EFBIG instead of killing it.
pub(crate) fn survive_file_size_limit() {
    static ONCE: Once = Once::new();
    // SAFETY: ignoring a signal installs no handler; no other thread's memory is concerned.
    ONCE.call_once(|| unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    });
}
