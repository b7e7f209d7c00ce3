//! Changing images that nobody uses: size, internal snapshots, bitmaps, the backing file, committing
//! into it. Blocking, on the control path.
//!
//! All of it stands on a transaction ([`tx`]): tables, refcount blocks and new data go to clusters
//! that the image on disk does not use, and are flushed; then one write of the header's first
//! sector makes the new state the image. A cut at any point leaves the old image or the new one,
//! without a leak. A failure leaves the old one.

mod amend;
mod bitmap;
mod bitmaps;
mod commit;
mod counts;
mod data;
mod differ;
mod header;
mod rebase;
mod redo;
mod resize;
mod snapshot;
mod table;
mod tree;
mod tx;

pub use amend::{Amend, amend};
pub use bitmap::{BitmapAction, change_bitmap, mark_held};
pub(crate) use bitmaps::give_bits_places;
pub use commit::{Committed, Watch, commit};
pub use differ::{ClusterSet, differing};
pub use header::set_backing;
pub use rebase::{NewBacking, Rebased, rebase};
pub use redo::redo;
pub use resize::resize;
pub use snapshot::{apply_snapshot, create_snapshot, delete_snapshot};
pub(crate) use table::check_l1;
pub use table::{SnapshotKey, find_snapshot};

use block::Storage;

use crate::{Error, Result};

/// Writes a table of `len` bytes: these words, then zeroes.
fn write_words(
    st: &mut dyn Storage,
    name: &str,
    what: &'static str,
    offset: u64,
    len: u64,
    words: &[u64],
) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let mut at = 0;
    let mut words = words.iter();
    let mut buffer = Vec::with_capacity(len.min(PIECE) as usize);
    while at < len {
        let piece = (len - at).min(PIECE) as usize;
        buffer.clear();
        buffer.extend(words.by_ref().take(piece / 8).flat_map(|w| w.to_be_bytes()));
        buffer.resize(piece, 0);
        st.write_at(offset + at, &buffer).map_err(Error::io(name, what))?;
        at += piece as u64;
    }
    Ok(())
}
