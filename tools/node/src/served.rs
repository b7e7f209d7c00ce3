//! [`ServedModel`]: the NVMe controller model as another process's PCI device, over vfio-user.
//!
//! Everything runs on the thread that calls [`ServedModel::serve`]. A client sees a function with
//! configuration space, BAR0 (registers by messages, doorbells in a page that it may map, MSI-X
//! table) and one interrupt vector per queue.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use dma::{PageSize, Region};
use file::ImageLock;
use nvme_model::{
    BarLayout, CONFIG_LEN, ConfigError, Controller, DmaFault, HostMemory, MSIX_ENTRY,
    NamespaceConfig, Options, PciConfig, Store,
};
use nvme_spec::{Cqe, offset};
use vfio_user::wire::{Area, pci};
use vfio_user::{Bus, BusFault, Server, Shape};
use zerocopy::IntoBytes;

use crate::chain::open_model_file;
use crate::{Error, ModelSpec, NodeSpec, OpenOptions};

/// How long a client may take for the rest of a message, or for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Doorbells are `4 << DSTRD` bytes apart: each has a cache line, and 31 queues fit in the page.
const DSTRD: u8 = 4;

/// A controller that is ready to be served.
pub struct ServedModel {
    node: String,
    namespaces: Vec<NamespaceConfig>,
    options: Options,
    /// Held as long as the files are in use.
    _locks: Vec<ImageLock>,
}

impl ServedModel {
    /// Opens the nodes (`model:` or `mem:`), which become namespaces 1, 2 and so on of one
    /// controller. What the controller is like is said by the `model:` nodes, which must agree.
    ///
    /// # Errors
    /// If there is none, a file cannot be opened or is in use, or the nodes do not agree.
    pub fn open(nodes: &[NodeSpec], options: &OpenOptions) -> Result<ServedModel, Error> {
        let mut namespaces = Vec::new();
        let mut locks = Vec::new();
        let mut like: Option<&ModelSpec> = None;
        for spec in nodes {
            let node = spec.to_string();
            let fail = |e: &dyn std::fmt::Display| Error::node(&node, e);
            let (store, capacity, lba) = match spec {
                NodeSpec::Mem(size) => (Store::memory(), *size, 512),
                NodeSpec::Model(model) => {
                    let first = *like.get_or_insert(model);
                    let same = (first.vwc, first.mdts, &first.faults)
                        == (model.vwc, model.mdts, &model.faults);
                    if !same {
                        return Err(fail(
                            &"vwc, mdts and fault are the controller's: they must be \
                                          the same for all namespaces",
                        ));
                    }
                    let file = open_model_file(model, &node, options)?;
                    locks.extend(file.locks);
                    let store = Store::file(file.host.into_file(), true).map_err(|e| fail(&e))?;
                    (store, file.capacity, model.lba)
                }
                _ => return Err(fail(&"only model: and mem: can be served")),
            };
            let blocks = capacity / u64::from(lba);
            namespaces.push(NamespaceConfig { store, blocks, lba, read_only: !options.writable });
        }
        let like = like.cloned().unwrap_or_else(|| ModelSpec::new(""));
        let options = Options {
            vwc: like.vwc,
            mdts: like.mdts,
            faults: like.faults,
            dstrd: DSTRD,
            ..Options::default()
        };
        let node = nodes.first().ok_or_else(|| Error::node("model", "no node was given"))?;
        Ok(ServedModel { node: node.to_string(), namespaces, options, _locks: locks })
    }

    /// Serves one client after the other until `stop` is set; then makes everything durable.
    ///
    /// # Errors
    /// If the listening socket fails, memory is short, or the files cannot be written.
    pub fn serve(self, listener: UnixListener, stop: &AtomicBool) -> Result<(), Error> {
        let ServedModel { node, namespaces, options, _locks } = self;
        let fail = |e: &dyn std::fmt::Display| Error::node(&node, e);
        let layout = BarLayout::new(options.bar_len(), options.queues);
        let length = options.bar_len() as usize;
        let doorbells = Region::new(length, PageSize::Small).map_err(|e| fail(&e))?;
        let server = Server::new(listener, PATIENCE, |bus| {
            let (memory, bar) = (ClientMemory { bus, master: false }, doorbells.clone());
            let controller = Controller::with_shared_doorbells(options, namespaces, memory, bar)?;
            Ok(Function::new(controller, layout, doorbells))
        });
        let server = server.map_err(|e| fail(&e))?.map_err(|e: ConfigError| fail(&e))?;
        let controller = server.run(stop).map_err(|e| fail(&e))?.controller;
        controller.into_stores().map(drop).map_err(|e| fail(&e))
    }
}

/// The client's memory, as far as the function may master the bus.
struct ClientMemory {
    bus: Bus,
    master: bool,
}

impl ClientMemory {
    fn access<T>(
        &self,
        addr: u64,
        write: bool,
        how: impl FnOnce(&Bus) -> Result<T, BusFault>,
    ) -> Result<T, DmaFault> {
        if !self.master {
            return Err(DmaFault { addr, write });
        }
        how(&self.bus).map_err(|e| DmaFault { addr: e.addr, write })
    }
}

impl HostMemory for ClientMemory {
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        self.access(addr, false, |bus| bus.read(addr, into))
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.access(addr, true, |bus| bus.write(addr, from))
    }

    fn read_u32(&mut self, addr: u64) -> Result<u32, DmaFault> {
        self.access(addr, false, |bus| bus.read_u32(addr))
    }

    fn write_u32(&mut self, addr: u64, value: u32) -> Result<(), DmaFault> {
        self.access(addr, true, |bus| bus.write_u32(addr, value))
    }

    fn write_cqe(&mut self, addr: u64, cqe: &Cqe) -> Result<(), DmaFault> {
        let mut halves = [0u64; 2];
        for (half, bytes) in halves.iter_mut().zip(cqe.as_bytes().chunks_exact(8)) {
            *half = bytes.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b));
        }
        self.access(addr, true, |bus| bus.publish(addr, halves))
    }

    fn raise(&mut self, vector: u16) {
        if self.master {
            self.bus.raise(vector);
        }
    }
}

/// The model as a PCI function.
struct Function {
    controller: Controller<ClientMemory>,
    config: PciConfig,
    layout: BarLayout,
    doorbells: Arc<Region>,
    /// The MSI-X table: kept for the client, which is told of interrupts by other means.
    table: Vec<u8>,
}

impl Function {
    fn new(
        controller: Controller<ClientMemory>,
        layout: BarLayout,
        doorbells: Arc<Region>,
    ) -> Function {
        let table = vec![0; usize::from(layout.vectors) * MSIX_ENTRY as usize];
        Function { controller, config: PciConfig::new(layout), layout, doorbells, table }
    }

    fn read_bar(&self, offset: u64, into: &mut [u8]) {
        let registers = self.controller.registers();
        for (at, to) in (offset..).zip(into.iter_mut()) {
            *to = match at.checked_sub(self.layout.table) {
                None => registers.read32(at & !3).to_le_bytes()[(at & 3) as usize],
                Some(at) => self.table.get(at as usize).copied().unwrap_or(0),
            };
        }
    }

    fn write_bar(&mut self, offset: u64, from: &[u8]) {
        if let Some(at) = offset.checked_sub(self.layout.table) {
            let at = at as usize;
            if let Some(part) = self.table.get_mut(at..at + from.len()) {
                part.copy_from_slice(from);
            }
            return;
        }
        let registers = self.controller.registers();
        // Other accesses are not possible (§3.1, "Controller Registers").
        if let Ok(word) = from.try_into().map(u32::from_le_bytes) {
            registers.write32(offset, word);
        } else if let Ok(long) = from.try_into().map(u64::from_le_bytes)
            && offset < offset::DOORBELLS
        {
            registers.write64(offset, long);
        }
    }
}

impl vfio_user::Device for Function {
    fn shape(&self, index: u32) -> Shape {
        match index {
            pci::BAR0 => {
                let size = self.layout.registers - offset::DOORBELLS;
                let areas = vec![Area { offset: offset::DOORBELLS, size }];
                let shared = Some((self.doorbells.clone(), areas));
                Shape { size: self.layout.size, write: true, shared }
            }
            pci::CONFIG => Shape { size: CONFIG_LEN as u64, write: true, shared: None },
            _ => Shape::default(),
        }
    }

    fn vectors(&self) -> u32 {
        u32::from(self.layout.vectors)
    }

    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        match region {
            pci::CONFIG => self.config.read(offset, into),
            _ => self.read_bar(offset, into),
        }
    }

    fn write(&mut self, region: u32, offset: u64, from: &[u8]) {
        if region == pci::CONFIG {
            self.config.write(offset, from);
            self.controller.memory().master = self.config.bus_master();
        } else {
            self.write_bar(offset, from);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.table.fill(0);
        self.controller.function_reset();
        self.controller.memory().master = false;
    }

    fn step(&mut self, now: u64) -> bool {
        self.controller.step(now) || self.controller.has_in_flight()
    }
}
