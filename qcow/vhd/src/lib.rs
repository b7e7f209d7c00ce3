//! VHD images, as Virtual PC, Hyper-V and tapdisk (XenServer, XCP-ng) know them: fixed, dynamic and
//! differencing ones are read, fixed and dynamic ones are made. Nothing is written to an image that
//! exists.
//!
//! - [`format`] is pure: bytes to fields and back, no I/O.
//! - [`Image`] is the metadata of one file, [`Chain`] a file with its parents.
//! - [`Reader`] reads a chain blockingly, [`check`] looks for damage, [`build`] makes an image with
//!   contents: control path, on [`block::Storage`].
//! - [`run`] serves a chain on a reactor, for reading.
//!
//! Whatever stands in an image is treated as hostile: every number is checked before it is used as
//! a size, a shift or an index, and no memory is taken for a size that the file cannot back.

#![forbid(unsafe_code)]

pub mod build;
pub mod check;
pub mod format;
pub mod run;

mod chain;
mod error;
mod image;
mod map;
mod reader;

pub use chain::{Chain, ChainOptions, Kind, Layer, MAX_DEPTH, Opened, ParentRef};
pub use error::{Error, Result};
pub use image::{Block, Image};
pub use map::{Source, Span};
pub use reader::Reader;
