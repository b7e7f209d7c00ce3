//! A new overlay in front of a running image whose layers are volumes.

use qcow::open::Format;

use crate::running::{Lies, RunningLayer};
use crate::source::Kind;
use crate::{Disk, Error, Source};

impl Disk {
    /// Puts the overlay that lies in a volume of the image's group in front of it, as
    /// [`Disk::snapshot`] does with a file: it is empty, of the image's size, and names the image's volume
    /// as its backing file (`/dev/GROUP/VOLUME`; `name` is its own, `GROUP/VOLUME`).
    ///
    /// # Errors
    /// If the overlay is not like that, or something fails. The image goes on as it was then.
    pub fn snapshot_onto(&mut self, overlay: Source, name: &str) -> Result<(), Error> {
        let fail = |e: &str| Error::node(name, e);
        self.on_image(|_, _| ())?;
        let Kind::Volume(view, Some(lease)) = overlay.kind else {
            return Err(fail("is no volume that could be written to"));
        };
        drop(view);
        let (device, port) = self.add_volume(lease)?;
        let mut new = RunningLayer {
            port,
            alone: false,
            lies: Lies::Device(device),
            name: name.to_owned(),
            path: None,
            format: Format::Qcow2,
            id: None,
            backing: None,
            locks: Vec::new(),
        };
        match self.check_overlay(&mut new) {
            Ok(mut overlay) => self.switch_to(new, &mut overlay)?,
            Err(e) => {
                self.forget(vec![new]);
                return Err(e);
            }
        }
        Ok(())
    }
}
