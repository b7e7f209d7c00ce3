//! [`Admin`]: a controller as a whole, opened to be looked at or formatted, without I/O queues.
//!
//! No thread of its own: the caller's steps the controller while it waits. For the `device`
//! commands.

use std::sync::Arc;
use std::time::Duration;

use file::ImageLock;
use nvme::{
    BlockFormat, Controller, ControllerInfo, DmaMapper, Format, Namespace, Options, Refused,
};
use nvme_model::{RegionMemory, ThreadDriver};
use nvme_spec::{SecureErase, SmartLog};
use qcow::open::Format as ImageFormat;
use reactor::Clock;
use vfio::{Address, Device};

use crate::chain::{OpenOptions, open_model_file};
use crate::model::power_up;
use crate::remote::connect;
use crate::spec::namespace_id;
use crate::transport::Transport;
use crate::vfio::{VfioBar, VfioMapper, open_device};
use crate::{Error, ModelSpec, NodeSpec, RemoteSpec};

/// A controller as it is named on a command line: the node of a namespace, or a node without its
/// namespace; an address alone is one of `vfio:`.
#[derive(Clone, PartialEq, Debug)]
pub enum DeviceSpec {
    /// An in-process controller over a file.
    Model(ModelSpec),
    /// A device that is bound to vfio-pci.
    Vfio {
        /// Where it is.
        address: Address,
        /// The namespace that is meant, if one was named.
        nsid: Option<u32>,
    },
    /// A controller that another process offers.
    Remote(RemoteSpec),
}

impl DeviceSpec {
    /// Parses `vfio:ADDRESS[/NSID]`, `ADDRESS[/NSID]`, `vfio-user:SOCKET/NSID` or `model:…`.
    ///
    /// # Errors
    /// Says what is wrong with it and what is possible.
    pub fn parse(text: &str) -> Result<DeviceSpec, Error> {
        let bad = |why: String| Error::Spec { node: text.to_owned(), why };
        if text.starts_with("model:") || text.starts_with("vfio-user:") {
            return match NodeSpec::parse(text)? {
                NodeSpec::Model(model) => Ok(DeviceSpec::Model(model)),
                NodeSpec::Remote(remote) => Ok(DeviceSpec::Remote(remote)),
                other => Err(bad(format!("{other} is no controller"))),
            };
        }
        let rest = text.strip_prefix("vfio:").unwrap_or(text);
        let (address, nsid) = match rest.split_once('/') {
            Some((address, nsid)) => (address, Some(namespace_id(nsid).map_err(bad)?)),
            None => (rest, None),
        };
        match address.parse() {
            Ok(address) => Ok(DeviceSpec::Vfio { address, nsid }),
            Err(e) => Err(bad(format!(
                "{e}; a device is vfio:ADDRESS[/NSID], vfio-user:SOCKET/NSID or model:PATH"
            ))),
        }
    }

    /// The namespace that is meant, if one was named: a model has one.
    pub fn nsid(&self) -> Option<u32> {
        match self {
            DeviceSpec::Model(_) => Some(1),
            DeviceSpec::Vfio { nsid, .. } => *nsid,
            DeviceSpec::Remote(remote) => Some(remote.nsid),
        }
    }
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceSpec::Model(m) => write!(f, "model:{}", m.path.display()),
            DeviceSpec::Remote(r) => r.fmt(f),
            DeviceSpec::Vfio { address, nsid: None } => write!(f, "vfio:{address}"),
            DeviceSpec::Vfio { address, nsid: Some(n) } => write!(f, "vfio:{address}/{n}"),
        }
    }
}

/// The driver's clock, and what is done while it waits.
struct Waiting {
    clock: Clock,
    pauses: u32,
    device: Option<Arc<Device>>,
}

impl nvme::Clock for Waiting {
    fn now(&mut self) -> u64 {
        self.clock.now()
    }

    fn pause(&mut self) {
        // Most answers come at once; a format takes hours.
        self.pauses = self.pauses.saturating_add(1);
        let short = self.pauses < 2000;
        std::thread::sleep(Duration::from_micros(if short { 50 } else { 5000 }));
        if let Some(device) = self.device.as_ref().filter(|d| d.requested()) {
            log::warn!("{}: the kernel wants it back (unplugged, or unbound)", device.address());
            device.release();
        }
    }
}

/// A model below a controller.
struct Below {
    device: ThreadDriver<RegionMemory>,
    /// Held as long as the file is in use.
    _locks: Vec<ImageLock>,
}

/// An opened controller.
pub struct Admin {
    node: String,
    waiting: Waiting,
    controller: Controller<Transport>,
    below: Option<Below>,
}

impl Admin {
    /// Opens a controller; nobody else may use it. `writable`: it is to be changed.
    ///
    /// # Errors
    /// If it is in use, cannot be had, or does not come up.
    pub fn open(spec: &DeviceSpec, writable: bool, clock: Clock) -> Result<Admin, Error> {
        let node = spec.to_string();
        let mut waiting = Waiting { clock, pauses: 0, device: None };
        let mut below = None;
        let (bar, mapper) = match spec {
            DeviceSpec::Model(model) => {
                let how = match writable {
                    true => OpenOptions::write(ImageFormat::Raw),
                    false => OpenOptions::read(ImageFormat::Raw),
                };
                let file = open_model_file(model, &node, &how)?;
                // Nothing writes to the namespace but a format, for which the file is open so.
                let power = power_up(model, file.host.into_file(), file.capacity, false, &node)?;
                below = Some(Below { device: power.device, _locks: file.locks });
                (power.bar, power.mapper)
            }
            DeviceSpec::Vfio { address, .. } => {
                let (container, device) = open_device(None, *address, &node)?;
                waiting.device = Some(device.clone());
                let mapper: Arc<dyn DmaMapper> = Arc::new(VfioMapper::new(container));
                (Transport::Vfio(VfioBar::new(device)), mapper)
            }
            DeviceSpec::Remote(spec) => connect(spec, &node)?,
        };
        let options = Options { io_queues: 1, ..Options::default() };
        let controller = Controller::open(bar, mapper, options, &mut waiting)
            .map_err(|e| Error::node(&node, format!("the controller does not come up: {e}")))?;
        Ok(Admin { node, waiting, controller, below })
    }

    /// What the controller is.
    ///
    /// # Errors
    /// If it is not known, since the controller was lost.
    pub fn info(&self) -> Result<&ControllerInfo, Error> {
        let info = self.controller.info();
        info.ok_or_else(|| Error::node(&self.node, nvme::Error::NotOpen))
    }

    /// The namespaces that can be used.
    pub fn namespaces(&self) -> &[Namespace] {
        self.controller.namespaces()
    }

    /// The namespaces that cannot, each with why.
    pub fn refused(&self) -> &[Refused] {
        self.controller.refused()
    }

    /// The LBA formats that a namespace may be given.
    ///
    /// # Errors
    /// If there is no such namespace, or the controller does not say.
    pub fn block_formats(&mut self, nsid: u32) -> Result<Vec<BlockFormat>, Error> {
        let Admin { node, waiting, controller, .. } = self;
        controller.block_formats(nsid, waiting).map_err(|e| Error::node(&*node, e))
    }

    /// The health log, as it is now.
    ///
    /// # Errors
    /// If the controller does not give it.
    pub fn smart(&mut self) -> Result<SmartLog, Error> {
        let Admin { node, waiting, controller, .. } = self;
        controller.read_smart(waiting).map_err(|e| Error::node(&*node, e))
    }

    /// The namespaces that a format touches, of those that are seen.
    pub fn format_touches(&self, nsid: u32, erase: SecureErase) -> Vec<u32> {
        self.controller.format_touches(nsid, erase)
    }

    /// Formats a namespace; see [`Controller::format`].
    ///
    /// # Errors
    /// As there.
    pub fn format(
        &mut self,
        format: &Format,
        progress: &mut dyn FnMut(Option<u8>),
    ) -> Result<(), Error> {
        let Admin { node, waiting, controller, .. } = self;
        controller.format(format, waiting, progress).map_err(|e| Error::node(&*node, e))
    }

    /// Shuts the controller down.
    ///
    /// # Errors
    /// If the shutdown does not end in order, or a model's file cannot be written.
    pub fn close(self) -> Result<(), Error> {
        let Admin { node, mut waiting, controller, below } = self;
        waiting.pauses = 0;
        controller.close(&mut waiting).map_err(|e| Error::node(&node, format!("shutdown: {e}")))?;
        let Some(below) = below else { return Ok(()) };
        let device = below.device.stop();
        let device = device.ok_or_else(|| Error::node(&node, "the device's thread is gone"))?;
        device.into_stores().map(drop).map_err(|e| Error::node(&node, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_named_with_and_without_a_namespace() {
        let parse = |text: &str| DeviceSpec::parse(text).map(|d| (d.to_string(), d.nsid()));
        let vfio = "vfio:0000:0a:00.1";
        for text in ["0000:0a:00.1", "vfio:0000:0a:00.1"] {
            assert_eq!(parse(text).unwrap(), (vfio.to_owned(), None));
            assert_eq!(parse(&format!("{text}/3")).unwrap(), (format!("{vfio}/3"), Some(3)));
        }
        let remote = "vfio-user:/run/a.sock/2";
        assert_eq!(parse(remote).unwrap(), (remote.to_owned(), Some(2)));
        assert_eq!(parse("model:/x?lba=4096").unwrap(), ("model:/x".to_owned(), Some(1)));
        for bad in [
            "",
            "x",
            "mem:1M",
            "file:/x",
            "0000:0a:00.1/",
            "0000:0a:00.1/0",
            "vfio:",
            "vfio-user:/x",
            "model:",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
