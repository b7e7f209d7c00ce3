//! [`Error`]: why something in a repository could not be done.

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The volume group.
    #[error(transparent)]
    Group(#[from] volume::Error),
    /// An image.
    #[error(transparent)]
    Image(#[from] qcow::Error),
    /// There is no such disk.
    #[error("there is no volume {0} in the repository")]
    NoDisk(String),
    /// The group is no repository of ours.
    #[error("the volume group {0} is no storage repository of polldisk's: it has no tag pd:sr=…")]
    NoRepository(String),
    /// What changed between two is not known.
    #[error("what changed from {from} to {to} is not known: {why}; make a full backup")]
    NoChanges {
        /// The one.
        from: String,
        /// The other.
        to: String,
        /// Why not.
        why: String,
    },
    /// Not done because it would be wrong.
    #[error("{0}")]
    Refused(String),
    /// What the group's tags say contradicts itself.
    #[error("{0}; look at it with lvs -o name,tags")]
    Corrupt(String),
}

pub(crate) fn refused<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Refused(why.into()))
}

pub(crate) fn corrupt<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Corrupt(why.into()))
}
