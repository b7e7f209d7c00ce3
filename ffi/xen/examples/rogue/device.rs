//! [`Device`]: the frontend's side of xenstore, and the walk from state to state with the backend.
//! It waits for what it expects, and an error says what stands there instead.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use reactor::Clock;
use xen::store::{Nodes, Store};

use crate::guest::{DOM0, Granted, Ports};
use crate::ring::Ring;
use crate::{Fault, Outcome};

/// A machine that is emulated on a busy one is slow by any factor.
pub(crate) const PATIENCE_NS: u64 = 90_000_000_000;
const LOOK: Duration = Duration::from_millis(20);

/// What stands in a frontend's folder before the frontend has written anything.
const TOOLSTACKS: [&str; 6] =
    ["backend", "backend-id", "device-type", "state", "trusted", "virtual-device"];

pub(crate) struct Device {
    pub(crate) store: Store,
    pub(crate) ports: Ports,
    /// Its folder; relative, so the domain's own.
    pub(crate) front: String,
    back: String,
}

impl Device {
    pub(crate) fn find() -> Result<Device, Fault> {
        let store = Store::connect_to(Path::new("/dev/xen/xenbus"))?;
        let disks = store.directory("device/vbd")?.ok_or("no disk")?;
        let [disk] = &disks[..] else { return Err("one disk is needed".into()) };
        let front = format!("device/vbd/{}", String::from_utf8_lossy(disk));
        let back = store.read(format!("{front}/backend"))?.ok_or("the disk has no backend")?;
        let back = String::from_utf8(back)?;
        Ok(Device { store, ports: Ports::new()?, front, back })
    }

    pub(crate) fn write(&self, key: &str, value: impl AsRef<[u8]>) -> Outcome {
        Ok(self.store.write(format!("{}/{key}", self.front), value)?)
    }

    /// What the backend wrote; nothing if the key is not there.
    pub(crate) fn said(&self, key: &str) -> String {
        let value = self.store.read(format!("{}/{key}", self.back));
        String::from_utf8_lossy(&value.ok().flatten().unwrap_or_default()).into_owned()
    }

    pub(crate) fn sectors(&self) -> Result<u64, Fault> {
        Ok(self.said("sectors").parse()?)
    }

    /// Waits for a state of the backend's.
    pub(crate) fn becomes(&self, state: &str) -> Outcome {
        let clock = Clock::real();
        let end = clock.now() + PATIENCE_NS;
        while self.said("state") != state {
            if clock.now() > end {
                let (now, why) = (self.said("state"), self.said("hotplug-error"));
                return Err(format!("the backend is in state {now}, not {state} ({why})").into());
            }
            sleep(LOOK);
        }
        Ok(())
    }

    /// Waits for the backend to refuse, with this in its words.
    pub(crate) fn refuses(&self, why: &str) -> Outcome {
        self.becomes("5")?;
        let said = self.said("hotplug-error");
        if !said.contains(why) {
            return Err(format!("the backend said {said:?}, not {why:?}").into());
        }
        Ok(())
    }

    /// Whatever was: back to where both sides wait for each other, as after a start, by the way that a
    /// kernel takes that finds a device in use.
    pub(crate) fn rewind(&self) -> Outcome {
        self.write("state", "6")?;
        self.becomes("6")?;
        for key in self.store.directory(&self.front)?.unwrap_or_default() {
            if !TOOLSTACKS.iter().any(|t| t.as_bytes() == key) {
                self.store.rm(format!("{}/{}", self.front, key.escape_ascii()))?;
            }
        }
        self.write("state", "1")?;
        self.becomes("2")
    }

    /// Right keys for a ring.
    pub(crate) fn offer(&self, ring: &Ring) -> Outcome {
        for (key, value) in keys(&ring.pages.grefs, ring.port) {
            self.write(&key, value)?;
        }
        Ok(())
    }

    /// A ring that the backend is connected to, which it has to be made for: 2 to the power of `order`
    /// pages, with these keys besides.
    pub(crate) fn connect(&self, order: u32, more: &[(&str, &str)]) -> Result<Ring<'_>, Fault> {
        let ring = self.ring(order)?;
        self.offer(&ring)?;
        for (key, value) in more {
            self.write(key, value)?;
        }
        self.write("state", "3")?;
        self.becomes("4")?;
        self.write("state", "4")?;
        Ok(ring)
    }

    /// A ring that the backend does not know yet.
    pub(crate) fn ring(&self, order: u32) -> Result<Ring<'_>, Fault> {
        let pages = Granted::new(DOM0, 1 << order, true)?;
        Ok(Ring::new(pages, &self.ports, self.ports.alloc(DOM0)?))
    }
}

/// The usual keys for one ring.
pub(crate) fn keys(grefs: &[u32], port: u32) -> Vec<(String, String)> {
    let mut keys = vec![
        ("protocol".into(), "x86_64-abi".into()),
        ("feature-persistent".into(), "0".into()),
        ("event-channel".into(), port.to_string()),
    ];
    if let [gref] = grefs {
        keys.push(("ring-ref".into(), gref.to_string()));
    } else {
        keys.push(("ring-page-order".into(), grefs.len().ilog2().to_string()));
        let each = grefs.iter().enumerate();
        keys.extend(each.map(|(i, gref)| (format!("ring-ref{i}"), gref.to_string())));
    }
    keys
}
