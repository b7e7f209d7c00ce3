//! [`Reference`]: what an image held before the demo began, read by somebody else's code.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use node::{NodeSpec, OpenOptions, Source};
use qcow::ChainReader;
use qcow::open::Format;

use crate::Error;
use crate::stamp::BLOCK;

/// The contents of an image, for comparison.
pub(crate) enum Reference {
    /// `qemu-img convert` made a raw file of it.
    Raw(File),
    /// Without qemu-img: our own blocking reader, which shares nothing with the datapath but the
    /// decoding of entries and of compressed clusters.
    Reader(Box<ChainReader<Source>>),
}

impl Reference {
    /// Reads the image at `path` by qemu-img if there is one, and says which way was taken.
    pub(crate) fn new(
        path: &Path,
        format: Format,
        scratch: &Path,
    ) -> Result<(Reference, &'static str), Error> {
        let raw = scratch.join("reference.raw");
        let converted = Command::new("qemu-img")
            .args(["convert", "-U", "-f", format.name(), "-O", "raw"])
            .args([path, &raw])
            .output();
        match converted {
            Ok(out) if out.status.success() => {
                let file = File::open(&raw).map_err(Error::other)?;
                Ok((Reference::Raw(file), "qemu-img's raw conversion"))
            }
            Ok(out) => {
                let text = String::from_utf8_lossy(&out.stderr).trim().to_owned();
                Err(Error::other(format!("qemu-img convert: {text}")))
            }
            Err(_) => {
                let spec = NodeSpec::File(path.to_path_buf());
                let options = OpenOptions { force_share: true, ..OpenOptions::read(format) };
                let chain = node::open_chain(&spec, &options)?;
                let reader = Box::new(ChainReader::new(chain));
                Ok((Reference::Reader(reader), "a blocking reader (qemu-img is not installed)"))
            }
        }
    }

    /// Whether `block` is what the image held at block `lba`.
    pub(crate) fn matches(&mut self, lba: u64, block: &[u8]) -> bool {
        let mut want = [0; BLOCK];
        let at = lba * BLOCK as u64;
        let read = match self {
            Reference::Raw(file) => file.read_exact_at(&mut want, at).is_ok(),
            Reference::Reader(reader) => reader.read_at(at, &mut want).is_ok(),
        };
        read && block == want
    }
}
