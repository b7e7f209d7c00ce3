//! Read cases: an image served read-only is read back by two independent clients and must be the
//! disk, byte for byte.

use anyhow::{Result, bail};

use super::Room;
use super::disk;
use crate::cmd::{self, program};

/// Reads `image` through the server with nbdcopy and with qemu-img.
pub(crate) fn case(room: &Room<'_>, image: &str) -> Result<String> {
    let (disk, image) = (room.lab.assets.disk(), room.lab.assets.image(image));
    let before = disk::looks(&image)?;
    let server = room.serve_read_only(&image)?;
    let back = room.folder.join("back.raw");
    cmd::ok(program("nbdcopy", [server.uri()]).arg(&back))?;
    disk::same(&disk, &back, |_| true)?;
    let mut compare = program("qemu-img", ["compare", "-f", "raw", "-F", "raw"]);
    cmd::ok(compare.arg(&disk).arg(server.uri()))?;
    let memory = server.peak_memory()?;
    server.stop()?;
    if disk::looks(&image)? != before {
        bail!("the image was changed although it was served read-only");
    }
    Ok(format!("server used {memory} MiB"))
}
