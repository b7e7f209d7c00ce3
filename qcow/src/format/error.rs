//! [`FieldError`]: a field that holds something impossible.

/// A field on disk with an impossible value: which, where, what was found, what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at offset {offset} is {found}; {allowed}")]
pub struct FieldError {
    /// The field, with the structure it stands in: "header field cluster_bits".
    pub what: String,
    /// Where the field stands in the file, in bytes.
    pub offset: u64,
    /// What was found there.
    pub found: String,
    /// What is allowed, as a sentence: "9 to 21 are possible".
    pub allowed: String,
}

impl FieldError {
    /// An error about any structure.
    pub fn new(
        what: impl Into<String>,
        offset: u64,
        found: impl std::fmt::Display,
        allowed: impl Into<String>,
    ) -> FieldError {
        FieldError { what: what.into(), offset, found: found.to_string(), allowed: allowed.into() }
    }

    /// An error about a header field.
    pub(crate) fn header(
        name: &str,
        offset: usize,
        found: impl std::fmt::Display,
        allowed: impl Into<String>,
    ) -> FieldError {
        FieldError::new(format!("header field {name}"), offset as u64, found, allowed)
    }
}
