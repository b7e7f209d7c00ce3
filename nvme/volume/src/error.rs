//! [`Error`]: why volumes could not be read or changed. Names what it is about in full.

use block::StorageError;

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a volume group could not be opened, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device below failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being read or written, e.g. "metadata area header".
        what: &'static str,
        /// The failed access.
        source: StorageError,
    },
    /// What is on the disk is damaged or contradicts itself.
    #[error("{0}")]
    Corrupt(String),
    /// It is valid, but uses something that is not done here: it is left as it is.
    #[error("{0} not supported here")]
    Unsupported(String),
    /// Not done because it would be wrong or is not permitted.
    #[error("{0}")]
    Refused(String),
    /// The group belongs to another host.
    #[error("volume group {group} belongs to the system `{owner}`, not to `{ours}`")]
    Foreign {
        /// Name of the group.
        group: String,
        /// Its system ID.
        owner: String,
        /// Our system ID; empty if we have none.
        ours: String,
    },
    /// No such volume.
    #[error("no volume {0}")]
    NoVolume(String),
    /// Not enough free extents, or none of a shape that is needed.
    #[error("no space in volume group {group}: {wanted} extents wanted, {free} free")]
    NoSpace {
        /// Name of the group.
        group: String,
        /// Extents that were asked for.
        wanted: u64,
        /// Extents that are free on devices that may be allocated from.
        free: u64,
    },
    /// The metadata would not fit into a metadata area beside the copy that is in force.
    #[error(
        "metadata of {size} bytes does not fit beside the present {live} into an area of {room}"
    )]
    MetadataFull {
        /// Bytes of the new text.
        size: u64,
        /// Bytes of the text in force.
        live: u64,
        /// Bytes for texts in the area.
        room: u64,
    },
}

impl Error {
    /// A failed access; for `map_err`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(StorageError) -> Error {
        move |source| Error::Io { what, source }
    }
}

/// Longest message, in characters.
const MESSAGE: usize = 400;

/// A message as it may be shown: what it quotes may come from a disk.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::new();
    for c in text.chars().take(MESSAGE) {
        if c == ' ' || c.is_ascii_graphic() || c.is_alphanumeric() {
            plain.push(c);
        } else {
            plain.extend(c.escape_default());
        }
    }
    plain
}

/// Damage, in full.
pub(crate) fn corrupt<T>(text: impl AsRef<str>) -> Result<T> {
    Err(Error::Corrupt(plain(text.as_ref())))
}

/// A refusal, in full.
pub(crate) fn refused<T>(text: impl AsRef<str>) -> Result<T> {
    Err(Error::Refused(plain(text.as_ref())))
}

/// Something that is not done here, as the subject of "… not supported here".
pub(crate) fn unsupported<T>(text: impl AsRef<str>) -> Result<T> {
    Err(Error::Unsupported(plain(text.as_ref())))
}
