//! [`Model`]: an in-process NVMe controller over a file, with the real driver on it.
//!
//! Two threads of its own while it is in use: one steps the device, one is the driver's control
//! thread. The device's thread can be taken over by a caller who has a thread to spare
//! ([`Model::take_device`]), as the demo does on a machine of two processors.

use std::fs::File;
use std::sync::Arc;

use block::Claims;
use dma::Region;
use nvme::{Bar, DmaMapper, Doorbell, IovaMap, Options};
use nvme_model::{Iommu, NamespaceConfig, RegionMemory, Registers, Store, ThreadDriver};
use reactor::{Clock, sync::Mutex};

use crate::control::Control;
use crate::transport::Transport;
use crate::{Error, Leaf, MOST_REACTORS, ModelSpec};

/// The device's half, for whoever steps it.
pub type ModelController = nvme_model::Controller<RegionMemory>;

/// Counters of the device, readable while it runs.
pub use nvme_model::Stats as ModelStats;

/// Those counters at a moment.
pub use nvme_model::StatsSnapshot as ModelCounts;

/// Registers of the model as the driver reaches them.
pub struct ModelBar(Arc<Registers>);

/// One doorbell of the model.
pub struct ModelDoorbell {
    registers: Arc<Registers>,
    offset: u64,
}

impl Doorbell for ModelDoorbell {
    #[inline]
    fn ring(&self, value: u32) {
        self.registers.write32(self.offset, value);
    }
}

impl Bar for ModelBar {
    type Doorbell = ModelDoorbell;

    fn read32(&self, offset: u64) -> u32 {
        self.0.read32(offset)
    }

    fn read64(&self, offset: u64) -> u64 {
        self.0.read64(offset)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.0.write32(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.0.write64(offset, value);
    }

    fn doorbell(&self, offset: u64) -> Option<ModelDoorbell> {
        let end = offset.checked_add(4)?;
        (end <= self.0.len()).then(|| ModelDoorbell { registers: self.0.clone(), offset })
    }
}

/// Gives regions bus addresses behind the model's IOMMU.
struct ModelMapper(Mutex<Iommu>);

impl DmaMapper for ModelMapper {
    fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String> {
        let mapped = self.0.lock().map(region);
        mapped.map(IovaMap::Contiguous).map_err(|e| e.to_string())
    }

    fn unmap(&self, region: &Region) {
        if let Err(e) = self.0.lock().unmap(region) {
            log::error!("NVMe model: {e}");
        }
    }
}

/// A model that has power, for a driver to be put onto it.
pub(crate) struct Power {
    pub(crate) device: ThreadDriver<RegionMemory>,
    pub(crate) bar: Transport,
    pub(crate) mapper: Arc<dyn DmaMapper>,
    stats: Arc<ModelStats>,
}

/// Powers a model up over `file`, with a thread that steps it.
///
/// # Errors
/// If the file cannot be used, or there is no thread to be had.
pub(crate) fn power_up(
    spec: &ModelSpec,
    file: File,
    capacity: u64,
    read_only: bool,
    node: &str,
) -> Result<Power, Error> {
    let fail = |what: &str, e: &dyn std::fmt::Display| Error::node(node, format!("{what}: {e}"));
    let store = Store::file(file, true).map_err(|e| fail("cannot use the file", &e))?;
    let blocks = capacity / u64::from(spec.lba);
    let namespace = NamespaceConfig { store, blocks, lba: spec.lba, read_only };
    let options = nvme_model::Options {
        vwc: spec.vwc,
        mdts: spec.mdts,
        faults: spec.faults.clone(),
        ..nvme_model::Options::default()
    };
    let (iommu, memory) = nvme_model::iommu();
    let device = ModelController::new(options, vec![namespace], memory)
        .map_err(|e| fail("cannot make the controller", &e))?;
    let bar = Transport::Model(ModelBar(device.registers().clone()));
    let stats = device.stats().clone();
    let mapper = Arc::new(ModelMapper(Mutex::new(iommu)));
    let device =
        ThreadDriver::spawn(device, || {}).map_err(|e| fail("cannot start a thread", &e))?;
    Ok(Power { device, bar, mapper, stats })
}

/// An NVMe controller in this process and the driver's control thread for it.
pub struct Model {
    node: String,
    device: Option<ThreadDriver<RegionMemory>>,
    stats: Arc<ModelStats>,
    control: Option<Control>,
    claims: Arc<Claims>,
}

impl Model {
    /// Powers the model up over `file` and brings the driver up. Returns it with one queue.
    ///
    /// # Errors
    /// Why the driver could not bring it up, or that there is no thread to be had.
    pub fn start(
        spec: &ModelSpec,
        file: File,
        capacity: u64,
        read_only: bool,
        clock: Clock,
    ) -> Result<(Model, Leaf), Error> {
        let node = format!("model:{}", spec.path.display());
        let Power { device, bar, mapper, stats } =
            power_up(spec, file, capacity, read_only, &node)?;
        let control = Control::start(&node, bar, mapper, Options::default(), clock, ())?;
        if let Some(r) = control.refused().first() {
            return Err(Error::node(&node, format!("namespace: {}", r.why)));
        }
        let claims = Claims::new(MOST_REACTORS);
        let (device, control) = (Some(device), Some(control));
        let model = Model { node, device, stats, control, claims };
        let leaf = model.another_queue()?;
        Ok((model, leaf))
    }

    /// Another queue to the device, as another reactor would have. To be dropped before
    /// [`Model::close`].
    ///
    /// # Errors
    /// If the controller has none left, or is lost.
    pub fn another_queue(&self) -> Result<Leaf, Error> {
        let control = self.control.as_ref();
        let control = control.ok_or_else(|| Error::node(&self.node, "it was closed"))?;
        let pair = control.queue_pair()?;
        Leaf::nvme(pair, 0, &self.claims).map_err(|e| Error::node(&self.node, e))
    }

    /// Counters of the device.
    pub fn stats(&self) -> &Arc<ModelStats> {
        &self.stats
    }

    /// Stops the device's own thread and hands the device to the caller, who steps it from now on
    /// and gives it back before [`Model::close`].
    pub fn take_device(&mut self) -> Option<ModelController> {
        self.device.take()?.stop()
    }

    /// Takes the device back and steps it on a thread of its own again.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn give_device(&mut self, device: ModelController) -> Result<(), Error> {
        let thread = ThreadDriver::spawn(device, || {});
        self.device = Some(thread.map_err(|e| Error::node(&self.node, e))?);
        Ok(())
    }

    /// Shuts the controller down, after the queue pair is gone, and gives the file back.
    ///
    /// # Errors
    /// If the shutdown does not end in order, or the file cannot be written.
    pub fn close(mut self) -> Result<File, Error> {
        self.end()?;
        let device = self.device.take().and_then(ThreadDriver::stop);
        let device =
            device.ok_or_else(|| Error::node(&self.node, "the device's thread is gone"))?;
        let stores = device.into_stores().map_err(|e| Error::node(&self.node, e))?;
        let file = stores.into_iter().next().and_then(Store::into_file);
        file.ok_or_else(|| Error::node(&self.node, "the namespace is gone"))
    }

    fn end(&mut self) -> Result<(), Error> {
        self.control.take().map_or(Ok(()), Control::close)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("{e}");
        }
    }
}
