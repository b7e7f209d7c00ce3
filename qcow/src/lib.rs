//! QCOW2 images, versions 2 and 3: the format, backing chains, creating, checking and repairing.
//!
//! - [`format`] is pure: bytes to fields and back, no I/O.
//! - [`open`] opens one image ([`ImageMeta`]) or a chain of backing files ([`Chain`]).
//! - [`ChainReader`] reads a chain slowly and independently of the datapath; [`extents`] lists
//!   what is allocated where, [`info`] tells about an image, [`create`] makes one, [`build`] makes
//!   one with contents, [`check`] finds and repairs damage.
//! - [`run`] is the datapath: an image on a reactor; [`map`] is where it looks clusters up.
//! - [`Decompressor`] unpacks compressed clusters, [`Compressor`] packs them.
//!
//! All of these work on blocking [`block::Storage`] and belong to the control path; no reactor
//! that serves a guest calls them, except for the entries of [`format`] and the decompressor.
//!
//! Whatever stands in an image is treated as hostile: every number is checked before it is used
//! as a size, a shift or an index, and no memory is taken for a size that the file cannot back.

#![forbid(unsafe_code)]

pub mod build;
pub mod check;
pub mod create;
pub mod edit;
pub mod extents;
pub mod format;
pub mod info;
pub mod map;
pub mod open;
pub mod run;

mod bitmaps;
mod compress;
mod compressor;
mod error;
mod reader;

mod atomics {
    //! What the shared parts ([`crate::map`], [`crate::run`]) are made of; in a test, a model of
    //! memory.

    pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

    pub(crate) use dma::prefetch;

    /// So many words are worth pages of 2 MiB: 4 MiB of them.
    const LARGE: usize = 1 << 19;

    /// `n` words of zero, which take memory as they are used (2 MiB at a time, if they are many and the
    /// kernel has such pages); `None` if there is none.
    pub(crate) fn zeroed(n: usize) -> Option<Box<[AtomicU64]>> {
        let words: Box<[AtomicU64]> = zerocopy::FromZeros::new_box_zeroed_with_elems(n).ok()?;
        if n >= LARGE {
            dma::prefer_huge_pages(&words);
        }
        Some(words)
    }
}

pub use bitmaps::{Bitmap, BitmapInfo, BitmapRun};
pub use compress::{DecompressError, Decompressor};
pub use compressor::Compressor;
pub use error::{Error, Result};
pub use open::{Chain, ImageMeta, MetadataSet, Mode};
pub use reader::{ChainReader, Source, Span};
