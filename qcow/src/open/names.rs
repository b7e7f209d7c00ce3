//! Names of backing files and external data files as they stand in images, and what they may open.
//!
//! An image is not trusted: a name in it must not make us read a device that hangs, a socket, a
//! URL, or a file whose format would be guessed from contents that a guest wrote.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Format of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// QCOW2.
    Qcow2,
    /// Bytes as they are.
    Raw,
}

impl Format {
    /// The name that images and options use.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }

    /// The format of that name, if it is done here.
    pub fn from_name(name: &str) -> Option<Format> {
        match name {
            "qcow2" => Some(Format::Qcow2),
            "raw" => Some(Format::Raw),
            _ => None,
        }
    }
}

/// What a file is to the image that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The backing file: a layer of its own.
    Backing,
    /// The external data file: where the image's guest clusters stand.
    Data,
}

impl Role {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::Backing => "backing file",
            Role::Data => "data file",
        }
    }
}

/// A backing file (or external data file) as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// What it is to that image.
    pub role: Role,
    /// The image that names it, for messages.
    pub named_by: String,
    /// The name as it stands in the image.
    pub name: String,
    /// Where that leads: absolute, or relative to the directory of the image.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its place in the chain: 1 for the top image's backing file, 0 for its data file.
    pub depth: usize,
}

impl BackingRef {
    /// Takes a name from an image. `image_path` is the path under which the image itself was
    /// opened (`None` if it is not a file), `stated` the format that stands in the image,
    /// `default_format` the one that the user gave for images that state none.
    ///
    /// # Errors
    /// If the name or the format is not one that may be opened.
    pub fn new(
        named_by: &str,
        name: &[u8],
        image_path: Option<&Path>,
        stated: Option<&str>,
        default_format: Option<Format>,
        depth: usize,
    ) -> Result<BackingRef> {
        let refuse = |reason: String| Error::refused(named_by, reason);
        let format = match (stated, default_format) {
            (Some(s), _) => Format::from_name(s).ok_or_else(|| {
                let name = String::from_utf8_lossy(name);
                refuse(format!(
                    "backing file {name:?} has format {s:?}; only qcow2 and raw are supported"
                ))
            })?,
            (None, Some(f)) => f,
            (None, None) => {
                let name = String::from_utf8_lossy(name);
                return Err(refuse(format!(
                    "backing file {name:?} has no format stated in the image, and formats are not \
                     guessed; state it with --backing-format"
                )));
            }
        };
        Self::with_role(Role::Backing, named_by, name, image_path, format, depth)
    }

    /// Takes an external data file's name from the image at `depth`. Its format is raw.
    ///
    /// # Errors
    /// If the name is not one that may be opened.
    pub fn data_file(
        named_by: &str,
        name: &[u8],
        image_path: Option<&Path>,
        depth: usize,
    ) -> Result<BackingRef> {
        Self::with_role(Role::Data, named_by, name, image_path, Format::Raw, depth)
    }

    fn with_role(
        role: Role,
        named_by: &str,
        name: &[u8],
        image_path: Option<&Path>,
        format: Format,
        depth: usize,
    ) -> Result<BackingRef> {
        let what = role.name();
        let refuse = |reason: String| Error::refused(named_by, reason);
        let Ok(name) = std::str::from_utf8(name) else {
            let lossy = String::from_utf8_lossy(name).into_owned();
            return Err(refuse(format!("{what} name {lossy:?} is not UTF-8")));
        };
        if name.contains('\0') {
            return Err(refuse(format!("{what} name {name:?} contains a NUL byte")));
        }
        let plain = name.strip_prefix("file:").unwrap_or(name);
        if let Some(prefix) = protocol(plain) {
            return Err(refuse(format!(
                "{what} name {name:?} starts with {prefix:?}; only paths of files and block \
                 devices are opened"
            )));
        }
        if plain.is_empty() {
            return Err(refuse(format!("{what} name {name:?} is empty")));
        }
        let path = Path::new(plain);
        let path = match (path.is_absolute(), image_path) {
            (true, _) => path.to_owned(),
            (false, Some(image)) => image.parent().unwrap_or(Path::new("")).join(path),
            (false, None) => {
                return Err(refuse(format!(
                    "{what} name {name:?} is relative, but the image is not a file that \
                     stands in a directory"
                )));
            }
        };
        let name = name.to_owned();
        Ok(BackingRef { role, named_by: named_by.to_owned(), name, path, format, depth })
    }
}

/// The protocol prefix with its colon, as QEMU sees it: a colon before the first slash.
fn protocol(name: &str) -> Option<&str> {
    let colon = name.find(':')?;
    (!name[..colon].contains('/')).then(|| &name[..=colon])
}

/// Which file something is, however it was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device of the file system; for a block device 0.
    pub dev: u64,
    /// Inode; for a block device its own number.
    pub ino: u64,
}

impl FileId {
    /// The identity of a file, or of the device that a device node names.
    pub fn of(metadata: &fs::Metadata) -> FileId {
        if metadata.file_type().is_block_device() {
            FileId { dev: 0, ino: metadata.rdev() }
        } else {
            FileId { dev: metadata.dev(), ino: metadata.ino() }
        }
    }
}

/// A file or block device that a name in an image may open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFile {
    /// Its path without symbolic links. Open this one, not the name.
    pub path: PathBuf,
    /// Its identity, for [`super::Opened::id`]; compare it again after opening.
    pub id: FileId,
}

/// Checks what a backing name leads to: it must be a regular file or a block device and, if
/// `allow` is not empty, lie in one of these directories (after following symbolic links).
///
/// # Errors
/// With the image, the name and the reason.
pub fn allowed_host_file(backing: &BackingRef, allow: &[PathBuf]) -> Result<HostFile> {
    let refuse = |reason: String| {
        let what = backing.role.name();
        Error::refused(&backing.named_by, format!("{what} {:?} {reason}", backing.name))
    };
    let cannot =
        |e: std::io::Error| refuse(format!("cannot be opened at {}: {e}", backing.path.display()));
    let path = fs::canonicalize(&backing.path).map_err(cannot)?;
    let metadata = fs::metadata(&path).map_err(cannot)?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse(format!(
            "is {} at {}; only regular files and block devices are opened",
            kind_name(kind),
            path.display()
        )));
    }
    if !allow.is_empty() {
        let mut inside = false;
        for dir in allow {
            let dir = fs::canonicalize(dir).map_err(|e| {
                refuse(format!("is not opened: allowed directory {}: {e}", dir.display()))
            })?;
            inside |= path.starts_with(dir);
        }
        if !inside {
            return Err(refuse(format!(
                "lies at {}, outside of the directories that --allow-backing names",
                path.display()
            )));
        }
    }
    Ok(HostFile { path, id: FileId::of(&metadata) })
}

fn kind_name(kind: fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "neither file nor device"
    }
}
