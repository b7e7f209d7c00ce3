//! A reader that shares nothing with ours nor with QEMU's: the crate imago. It knows neither extended
//! L2 entries nor zstd.

use std::path::Path;

use anyhow::{Result, ensure};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

use crate::pick::Shape;

/// Whether it knows images of this shape.
pub(crate) fn can_read(shape: &Shape) -> bool {
    !shape.extended && shape.compression != Some("zstd")
}

/// Reads the whole disk and compares.
pub(crate) fn compare(path: &Path, want: &[u8]) -> Result<()> {
    let image = Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default())?;
    let image = FormatAccess::new(image);
    ensure!(image.size() == want.len() as u64, "{} bytes, not {}", image.size(), want.len());
    let mut seen = vec![0; 1_234_432];
    let mut at = 0;
    for part in want.chunks(seen.len()) {
        let seen = &mut seen[..part.len()];
        image.read(&mut *seen, at)?;
        if let Some(byte) = seen.iter().zip(part).position(|(a, b)| a != b) {
            anyhow::bail!(
                "byte {}: {:#04x}, not {:#04x}",
                at + byte as u64,
                seen[byte],
                part[byte]
            );
        }
        at += part.len() as u64;
    }
    Ok(())
}
