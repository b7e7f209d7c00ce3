//! Putting the plugins in place.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::{Kind, query};
use crate::image::print::line;
use crate::serve::REPOSITORY_TYPE;

/// One method. Python, since that is what the toolstack runs each by when it is traced; descriptors that
/// it leaves open are not handed on: whoever still has one of them would be waited for.
fn script(binary: &str, kind: Kind, method: &str) -> String {
    let kind = kind.name();
    format!(
        "#!/usr/bin/env python3\n\
         # {method} of polldisk's {kind} plugin; made by polldisk smapiv3 install.\n\
         import os\n\
         os.closerange(3, os.sysconf(\"SC_OPEN_MAX\"))\n\
         os.execv({binary:?}, [{binary:?}, \"smapiv3\", \"call\", \"{kind}\", \"{method}\"])\n"
    )
}

/// `polldisk smapiv3 install`.
pub(super) fn run(root: &Path, binary: Option<PathBuf>) -> anyhow::Result<u8> {
    let binary = match binary {
        Some(binary) => binary,
        None => std::env::current_exe().context("where this program is")?,
    };
    let Some(binary) = binary.to_str().filter(|path| path.bytes().all(|b| b > b' ' && b != b'"'))
    else {
        bail!(
            "{}: a path with spaces or quotes in it cannot be put into scripts",
            binary.display()
        );
    };
    let name = format!("org.xen.xapi.storage.{REPOSITORY_TYPE}");
    let volume = root.join("volume").join(name);
    install(&volume, binary, Kind::Volume, &query::VOLUME)?;
    // By the name of the scheme of disks' addresses.
    let datapath = root.join("datapath").join(REPOSITORY_TYPE);
    install(&datapath, binary, Kind::Datapath, &query::DATAPATH)?;
    Ok(0)
}

/// Writes a plugin elsewhere and moves it to its place: the toolstack looks as soon as it is there.
fn install(folder: &Path, binary: &str, kind: Kind, methods: &[&str]) -> anyhow::Result<()> {
    let at = || folder.display().to_string();
    // The one above is being watched, so it is never made anew, and only whole plugins come into it.
    let above = folder.parent().context("no folder")?;
    fs::create_dir_all(above).with_context(|| above.display().to_string())?;
    let root = above.parent().context("no folder")?;
    let new = tempfile::Builder::new().prefix(".polldisk-").tempdir_in(root).with_context(at)?;
    fs::set_permissions(new.path(), fs::Permissions::from_mode(0o755)).with_context(at)?;
    let all = methods.iter().copied().chain(["Plugin.query"]);
    for method in all.clone() {
        let path = new.path().join(method);
        fs::write(&path, script(binary, kind, method)).with_context(at)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).with_context(at)?;
    }
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(at)?;
    }
    fs::rename(new.path(), folder).with_context(at)?;
    // It is not there any more to be removed.
    let _moved = new.keep();
    line(&format!("{}: {} methods", folder.display(), all.count()))
}
