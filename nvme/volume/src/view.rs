//! [`View`]: a volume seen as [`Storage`], for the control path.

use block::{Status, Storage, StorageError};

use crate::group::Device;
use crate::map::{Extent, Map};

/// A volume as storage. Its size is fixed; it holds the group's devices as long as it is.
#[derive(Debug)]
pub struct View<'a, S> {
    map: Map,
    /// It may only be read.
    read_only: bool,
    devices: Devices<'a, S>,
}

#[derive(Debug)]
enum Devices<'a, S> {
    Group(&'a mut [Device<S>]),
    Own(Vec<S>),
}

impl<S> Devices<'_, S> {
    fn at(&mut self, pv: usize) -> Option<&mut S> {
        match self {
            Devices::Group(devices) => devices.get_mut(pv).map(|device| &mut device.storage),
            Devices::Own(devices) => devices.get_mut(pv),
        }
    }
}

impl<S: Storage> View<'static, S> {
    /// Over devices of its own, in the order of [`crate::Vg::pvs`].
    pub fn own(map: Map, read_only: bool, devices: Vec<S>) -> View<'static, S> {
        View { map, read_only, devices: Devices::Own(devices) }
    }
}

impl<'a, S: Storage> View<'a, S> {
    pub(crate) fn new(map: Map, read_only: bool, devices: &'a mut [Device<S>]) -> View<'a, S> {
        View { map, read_only, devices: Devices::Group(devices) }
    }

    /// Calls `each` with the extents of a range: the device, where on it, and which bytes of the
    /// range. `past` is how it ends where the range goes on past the volume.
    fn each(
        &mut self,
        (what, offset, len): (&'static str, u64, u64),
        past: Status,
        mut each: impl FnMut(&mut S, u64, std::ops::Range<u64>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let failed = |status| StorageError { what, offset, len, status, detail: 0 };
        let mut at = 0;
        while at < len {
            let place = offset.checked_add(at).and_then(|byte| self.map.find(byte));
            let Some(Extent { pv, offset, len: run }) = place else { return Err(failed(past)) };
            let run = run.min(len - at);
            let device = self.devices.at(pv).ok_or_else(|| failed(Status::Gone))?;
            each(device, offset, at..at + run)?;
            at += run;
        }
        Ok(())
    }

    /// A range is inside the volume and may be written: nothing of it is done otherwise.
    fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), StorageError> {
        let status = match offset.checked_add(len) {
            _ if self.read_only => Status::ReadOnly,
            Some(end) if end <= self.map.len() => return Ok(()),
            _ => Status::NoSpace,
        };
        Err(StorageError { what, offset, len, status, detail: 0 })
    }
}

impl<S: Storage> Storage for View<'_, S> {
    fn len(&self) -> u64 {
        self.map.len()
    }

    fn capacity(&self) -> u64 {
        self.map.len()
    }

    fn read_only(&self) -> bool {
        self.read_only
            || match &self.devices {
                Devices::Group(devices) => devices.iter().any(|device| device.storage.read_only()),
                Devices::Own(devices) => devices.iter().any(Storage::read_only),
            }
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let range = ("read", offset, into.len() as u64);
        self.each(range, Status::Invalid, |storage, at, part| {
            storage.read_at(at, &mut into[part.start as usize..part.end as usize])
        })
    }

    fn will_read(&mut self, offset: u64, len: u64) {
        // A hint: what goes on past the end is left out.
        let _ = self.each(("read", offset, len), Status::Invalid, |storage, at, part| {
            storage.will_read(at, part.end - part.start);
            Ok(())
        });
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let range = ("write", offset, from.len() as u64);
        self.check(range.0, range.1, range.2)?;
        self.each(range, Status::NoSpace, |storage, at, part| {
            storage.write_at(at, &from[part.start as usize..part.end as usize])
        })
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        let range = ("write of zeroes", offset, len);
        self.check(range.0, range.1, range.2)?;
        self.each(range, Status::NoSpace, |storage, at, part| {
            storage.write_zeroes_at(at, part.end - part.start)
        })
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        if self.read_only {
            return;
        }
        let _ = self.each(("discard", offset, len), Status::Invalid, |storage, at, part| {
            storage.discard_at(at, part.end - part.start);
            Ok(())
        });
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        match &mut self.devices {
            Devices::Group(devices) => devices.iter_mut().try_for_each(|d| d.storage.flush()),
            Devices::Own(devices) => devices.iter_mut().try_for_each(Storage::flush),
        }
    }

    fn set_len(&mut self, _len: u64) -> Result<(), StorageError> {
        Ok(())
    }
}
