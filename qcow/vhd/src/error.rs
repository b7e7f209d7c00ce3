//! [`Error`]: what went wrong with which file.

use block::StorageError;

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be opened, read or made. The text names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device or file below failed.
    #[error("{file}: {what}: {source}")]
    Io {
        /// The image.
        file: String,
        /// What was being read or written, e.g. "block allocation table".
        what: &'static str,
        /// The failed access.
        source: StorageError,
    },
    /// Something on disk is not possible, not done here, or not permitted.
    #[error("{file}: {why}")]
    Refused {
        /// The image.
        file: String,
        /// Why, in full.
        why: String,
    },
}

impl Error {
    /// A failed access of this file; for `map_err`.
    pub fn io<'a>(file: &'a str, what: &'static str) -> impl FnOnce(StorageError) -> Error + 'a {
        move |source| Error::Io { file: file.to_owned(), what, source }
    }

    /// Something refused, with the reason.
    pub fn refused(file: &str, why: impl Into<String>) -> Error {
        Error::Refused { file: file.to_owned(), why: why.into() }
    }
}
