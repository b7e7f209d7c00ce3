//! [`Growing`]: makes more of a volume known to the image in it, while that runs and whatever else is
//! done to it.

use std::sync::Arc;

use block::Port;
use qcow::run::Space;
use reactor::sync::Mutex;
use volume::{Id, Map};

use super::lease::extended;
use crate::device::Device;
use crate::door::Door;
use crate::{Disk, Error, Image, Leaf, ReactorCore};

/// A volume that a layer of a running image lies in.
pub(crate) struct TopVolume {
    volume: Id,
    writable: bool,
    port: Port,
    /// The lease's.
    map: Arc<Mutex<Map>>,
}

/// For one thread beside whoever changes the image. Does not keep the image from its end.
#[derive(Clone)]
pub struct Growing {
    door: Door,
    space: Arc<Space>,
    /// [`Disk::volume`].
    volume: Arc<Mutex<Option<TopVolume>>>,
}

impl Growing {
    /// How much of its volume the image uses.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The volume that the image writes to by now, and its bytes. `None` if it writes to none, or is
    /// being closed.
    pub fn volume(&self) -> Option<(Id, u64)> {
        let volume = self.volume.lock();
        volume.as_ref().map(|v| (v.volume, v.map.lock().len()))
    }

    /// Tells the image whether its volume is made larger when it becomes full, so that requests wait
    /// for that: see [`qcow::run::Image::may_grow`].
    pub fn may_grow(&self, yes: bool) {
        // Locked: an image that has ended may have left its number to another one.
        let volume = self.volume.lock();
        if volume.is_some() {
            self.on_image(move |image| image.may_grow(yes));
        }
    }

    /// The volume has grown and lies as the map says: what found no space in it goes on. Returns `false`
    /// if the image writes to another one by now, or is being closed.
    ///
    /// # Errors
    /// If the map is of another volume, or one that was moved; if a reactor has ended.
    pub fn has_grown(&self, volume: Id, map: &Map) -> Result<bool, Error> {
        // Kept: the image stays with this volume as long.
        let top = self.volume.lock();
        let Some(top) = top.as_ref().filter(|top| top.volume == volume) else { return Ok(false) };
        let fail = |why: String| Error::node(self.door.name(), why);
        extend(&self.door, top.port, &top.map, map).map_err(fail)?;
        let size = map.len();
        self.on_image(move |image| image.has_more_space(size));
        Ok(true)
    }

    fn on_image(&self, f: impl FnOnce(&mut qcow::run::Image) + Send + 'static) {
        let index = self.door.image();
        // Of a reactor that has ended nobody waits for anything.
        let _ = self.door.ask(move |core| {
            if let Some(Image::Qcow(image)) = core.image(index) {
                f(image);
            }
        });
    }
}

/// Tells all reactors of an image that one of its volumes, which lies at `port`, has grown; before any
/// request goes past the old end.
fn extend(door: &Door, port: Port, known: &Mutex<Map>, map: &Map) -> Result<(), String> {
    extended(&mut known.lock(), map.clone())?;
    for entry in door.entries() {
        let map = map.clone();
        let grown = entry.mailbox.ask(move |core: &mut ReactorCore| {
            match core.leaves().get_mut(usize::from(port.leaf)) {
                Some(Leaf::Volume(queue)) => queue.grow(port.unit, map),
                _ => Err("the volume has no queue".to_owned()),
            }
        });
        grown.unwrap_or_else(|| Err("its reactor has ended".to_owned()))?;
    }
    Ok(())
}

impl Disk {
    /// A volume that one of the layers lies in has grown to what the map says. If it is the one that is
    /// written to, that is for [`Disk::growing`] to say.
    ///
    /// # Errors
    /// If no layer lies in it, or the map is none of it.
    pub fn volume_has_grown(&self, volume: Id, map: &Map) -> Result<(), Error> {
        let fail = |why: &str| Error::node(self.rest.name(), why);
        let mut layers = (0..self.layers().len()).filter_map(|n| self.volume_of(n));
        let found = layers.find(|found| found.volume == volume);
        let found = found.ok_or_else(|| fail("no layer lies in that volume"))?;
        extend(&self.door(), found.port, &found.map, map).map_err(|e| fail(&e))
    }

    /// What makes more of its volume known to the image. `None` if it is no QCOW2 image, or writes to no
    /// volume.
    pub fn growing(&self) -> Option<Growing> {
        self.volume.lock().as_ref()?;
        let space = self.on_image(|image, _| image.space()).ok()?;
        Some(Growing { door: self.door(), space, volume: self.volume.clone() })
    }

    /// The volume that a layer lies in, if it does.
    fn volume_of(&self, layer: usize) -> Option<TopVolume> {
        let layer = self.layers().get(layer)?;
        let Device::Volume(lease) = self.rest.devices.get(layer.lies.device()?)? else {
            return None;
        };
        let (volume, writable, map) = (lease.volume(), lease.writable(), lease.map());
        Some(TopVolume { volume, writable, port: layer.port, map })
    }

    /// The volume that is written to if this layer is the first one.
    pub(crate) fn top_volume(&self, layer: usize) -> Option<TopVolume> {
        self.volume_of(layer).filter(|volume| volume.writable)
    }
}
