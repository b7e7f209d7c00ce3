//! [`open_vhd`]: a VHD file with its parents, opened under the rules and locks that backing files
//! have.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

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
        path: spec.path().map(Path::to_path_buf),
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
    let places = parent.child.as_deref().map(places).unwrap_or_default();
    // A child that is no file: absolute names still lead somewhere.
    let children: Vec<Option<&Path>> = match places.is_empty() {
        true => vec![None],
        false => places.iter().map(|p| Some(p.as_path())).collect(),
    };
    let mut last = None;
    for name in &parent.names {
        for &child in &children {
            let (by, depth) = (&parent.named_by, parent.depth);
            let named = BackingRef::new(by, name.as_bytes(), child, Some("raw"), None, depth);
            let backing = match named {
                Ok(backing) => backing,
                Err(e) => {
                    last = Some(refused(e));
                    break;
                }
            };
            let seen = std::fs::symlink_metadata(&backing.path);
            if seen.is_err_and(|e| e.kind() == ErrorKind::NotFound) {
                continue;
            }
            let found = open_backing(&backing, options).map_err(refused)?;
            let id = found.id.map(|id| (id.dev, id.ino));
            let qcow::open::Opened { storage, name, .. } = found;
            // What was opened has no links in its path. The names in it do not know that path.
            return Ok(Opened { storage, path: Some(backing.path), name, id });
        }
    }
    Err(last.unwrap_or_else(|| {
        let names: Vec<String> = parent.names.iter().map(|n| format!("{n:?}")).collect();
        let why = format!("its parent is not there; its names are {}", names.join(", "));
        vhd::Error::refused(&parent.named_by, why)
    }))
}

/// Where a child stands: as it was named, and as programs may have seen it that wrote names into
/// it. A relative name is looked for beside each of them, in this order.
///
/// A logical volume `/dev/VG/LV` is a link to a device node `/dev/dm-5`, beside which its parent is
/// not. tapdisk takes names in it to be relative to `/dev/mapper`, where volumes have links too, and
/// in its early versions to `/dev/VG`. Names in a file it takes to be relative to the file without
/// links.
fn places(child: &Path) -> Vec<PathBuf> {
    let mut places = vec![child.to_owned()];
    if let Ok(volume) = child.strip_prefix("/dev")
        && volume.components().count() == 2
    {
        places.extend(volume.file_name().map(|lv| Path::new("/dev/mapper").join(lv)));
    }
    places.extend(std::fs::canonicalize(child).ok());
    let mut seen = Vec::new();
    places.retain(|p| {
        let folder = p.parent().map(Path::to_owned);
        let new = !seen.contains(&folder);
        seen.push(folder);
        new
    });
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_looked_for_in_three_folders() {
        let folders = |child: &str| {
            let of = |p: &PathBuf| p.parent().unwrap().display().to_string();
            places(Path::new(child)).iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(folders("/dev/VG_X/VHD-a"), ["/dev/VG_X", "/dev/mapper"]);
        assert_eq!(folders("/dev/mapper/VG_X-VHD--a"), ["/dev/mapper"]);
        assert_eq!(folders("/dev/none"), ["/dev"]);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let names = [dir.join("vg"), dir.join("real")];
        names.iter().for_each(|n| std::fs::create_dir(n).unwrap());
        std::fs::write(names[1].join("dm-5"), "").unwrap();
        std::os::unix::fs::symlink("../real/dm-5", names[0].join("b")).unwrap();
        let link = names[0].join("b").display().to_string();
        assert_eq!(folders(&link), names.each_ref().map(|n| n.display().to_string()));
        assert_eq!(folders("a.vhd"), [""]);
    }
}
