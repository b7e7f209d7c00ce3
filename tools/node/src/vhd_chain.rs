//! [`open_vhd`]: a VHD file with its parents, opened under the rules and locks that backing files
//! have.

use std::io::ErrorKind;

use qcow::open::BackingRef;
use vhd::{ChainOptions, Opened, ParentRef};

use crate::chain::open_backing;
use crate::{Error, NodeSpec, OpenOptions, Source, open_source};

/// A VHD file with its parents, opened.
pub type VhdChain = vhd::Chain<Source>;

/// Opens a VHD file and its parents for reading. The format in `options` does not count.
///
/// # Errors
/// If a layer cannot be opened, is in use, is refused, or is no image.
pub fn open_vhd(spec: &NodeSpec, options: &OpenOptions) -> Result<VhdChain, Error> {
    let options =
        &OpenOptions { writable: false, format: qcow::open::Format::Raw, ..options.clone() };
    let storage = open_source(spec, options)?;
    let top = Opened {
        id: storage.id.map(|id| (id.dev, id.ino)),
        storage,
        path: spec.path().map(std::path::Path::to_path_buf),
        name: spec.to_string(),
    };
    let chain_options = ChainOptions { top_only: options.top_only };
    Ok(VhdChain::open(top, chain_options, &mut |parent| open_parent(parent, options))?)
}

/// The first of the names that leads to something counts, as for tapdisk.
fn open_parent(parent: &ParentRef, options: &OpenOptions) -> vhd::Result<Opened<Source>> {
    let refused = |e: qcow::Error| match e {
        qcow::Error::Refused { file, reason } => vhd::Error::Refused { file, why: reason },
        other => vhd::Error::refused(&parent.named_by, other.to_string()),
    };
    let mut last = None;
    for name in &parent.names {
        let (by, child) = (&parent.named_by, parent.child.as_deref());
        let named = BackingRef::new(by, name.as_bytes(), child, Some("raw"), None, parent.depth);
        let backing = match named {
            Ok(backing) => backing,
            Err(e) => {
                last = Some(refused(e));
                continue;
            }
        };
        if std::fs::symlink_metadata(&backing.path).is_err_and(|e| e.kind() == ErrorKind::NotFound)
        {
            continue;
        }
        let found = open_backing(&backing, options).map_err(refused)?;
        let id = found.id.map(|id| (id.dev, id.ino));
        let qcow::open::Opened { storage, path, name, .. } = found;
        return Ok(Opened { storage, path, name, id });
    }
    Err(last.unwrap_or_else(|| {
        let names: Vec<String> = parent.names.iter().map(|n| format!("{n:?}")).collect();
        let why = format!("its parent is not there; its names are {}", names.join(", "));
        vhd::Error::refused(&parent.named_by, why)
    }))
}
