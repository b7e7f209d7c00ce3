//! QCOW2 images, versions 2 and 3: the format, backing chains, creating, checking and repairing.
//!
//! - [`format`] is pure: bytes to fields and back, no I/O.
//! - Everything else here works on blocking [`block::Storage`] and belongs to the control path; no
//!   reactor that serves a guest calls it.
//!
//! Whatever stands in an image is treated as hostile: every number is checked before it is used
//! as a size, a shift or an index, and no memory is taken for a size that the file cannot back.

#![forbid(unsafe_code)]

pub mod format;

mod error;

pub use error::{Error, Result};
