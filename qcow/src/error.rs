//! [`Error`]: what the control path reports; always names the file it is about.

use block::StorageError;

use crate::format::FieldError;

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be opened, read, checked or made. The text names the file and, where
/// there is one, the offset and the field.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device or file below failed.
    #[error("{file}: {what}: {source}")]
    Io {
        /// The image.
        file: String,
        /// What was being read or written, e.g. "L1 table".
        what: &'static str,
        /// The failed access.
        source: StorageError,
    },
    /// A field on disk holds something that is not possible.
    #[error("{file}: {source}")]
    Field {
        /// The image.
        file: String,
        /// Which field, where, and what is allowed.
        source: FieldError,
    },
    /// The image is valid, but uses something that is not done here.
    #[error("{file}: {feature} not supported")]
    Unsupported {
        /// The image.
        file: String,
        /// The feature, as the subject of "… is/are": e.g. "extended L2 entries (subclusters) are".
        feature: String,
    },
    /// Not done because it would be wrong or is not permitted.
    #[error("{file}: {reason}")]
    Refused {
        /// The image.
        file: String,
        /// Why, in full.
        reason: String,
    },
}

impl Error {
    /// A field error of this file.
    pub fn field(file: &str, source: FieldError) -> Error {
        Error::Field { file: file.to_owned(), source }
    }

    /// A failed access of this file; for `map_err`.
    pub fn io<'a>(file: &'a str, what: &'static str) -> impl FnOnce(StorageError) -> Error + 'a {
        move |source| Error::Io { file: file.to_owned(), what, source }
    }

    /// Something refused, with the reason.
    pub fn refused(file: &str, reason: impl Into<String>) -> Error {
        Error::Refused { file: file.to_owned(), reason: reason.into() }
    }

    /// A feature that is not done here.
    pub fn unsupported(file: &str, feature: impl Into<String>) -> Error {
        Error::Unsupported { file: file.to_owned(), feature: feature.into() }
    }
}
