//! [`Status`]: how a request ended, in one byte; and the one table that maps it to errno values.

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
// Of the size of what stands beside it in a [`crate::Completion`]: both are stored at once.
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request itself was wrong: range, alignment, segments.
    Invalid = 1,
    /// A write to something that may only be read.
    ReadOnly = 2,
    /// No space left to store the data.
    NoSpace = 3,
    /// The operation is not known here.
    Unsupported = 4,
    /// The medium failed: an unrecovered read or write error.
    Medium = 5,
    /// The device did not answer before the deadline; it was reset.
    Timeout = 6,
    /// The device is no longer there.
    Gone = 7,
    /// Metadata on disk contradicts itself; nothing was written.
    Corrupt = 8,
}

impl Status {
    /// Every value, for tables and tests.
    pub const ALL: [Status; 9] = [
        Status::Ok,
        Status::Invalid,
        Status::ReadOnly,
        Status::NoSpace,
        Status::Unsupported,
        Status::Medium,
        Status::Timeout,
        Status::Gone,
        Status::Corrupt,
    ];

    /// Whether the request was carried out.
    #[inline]
    pub fn is_ok(self) -> bool {
        self == Status::Ok
    }

    /// The Linux errno value that says the same; 0 for [`Status::Ok`].
    pub fn errno(self) -> i32 {
        match self {
            Status::Ok => 0,
            Status::Invalid => 22,                                   // EINVAL
            Status::ReadOnly => 1, // EPERM, as NBD and qemu answer a write to a read-only disk
            Status::NoSpace => 28, // ENOSPC
            Status::Unsupported => 95, // EOPNOTSUPP
            Status::Medium | Status::Timeout | Status::Corrupt => 5, // EIO
            Status::Gone => 108,   // ESHUTDOWN
        }
    }

    /// The nearest status to an errno value from the kernel.
    pub fn from_errno(errno: i32) -> Status {
        match errno {
            0 => Status::Ok,
            22 => Status::Invalid,
            1 | 9 | 13 | 30 => Status::ReadOnly, // EPERM, EBADF (not open for it), EACCES, EROFS
            27 | 28 | 122 => Status::NoSpace,    // EFBIG, ENOSPC, EDQUOT
            38 | 95 => Status::Unsupported,      // ENOSYS, EOPNOTSUPP
            62 | 110 => Status::Timeout,         // ETIME, ETIMEDOUT
            6 | 19 | 108 => Status::Gone,        // ENXIO, ENODEV, ESHUTDOWN
            _ => Status::Medium,
        }
    }

    /// A few words for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Invalid => "invalid request",
            Status::ReadOnly => "read-only",
            Status::NoSpace => "no space left",
            Status::Unsupported => "operation not supported",
            Status::Medium => "medium error",
            Status::Timeout => "device timed out",
            Status::Gone => "device is gone",
            Status::Corrupt => "metadata is corrupt",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_and_back() {
        for s in Status::ALL {
            let back = Status::from_errno(s.errno());
            match s {
                // These three share EIO, which reads back as the plainest of them.
                Status::Timeout | Status::Corrupt => assert_eq!(back, Status::Medium),
                _ => assert_eq!(back, s),
            }
        }
        assert_eq!(Status::from_errno(9999), Status::Medium);
    }
}
