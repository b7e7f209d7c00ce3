//! Bring-up (§7.6.1): from whatever state the registers are in to a controller that serves.

use std::sync::Arc;

use nvme_spec::{
    AdminOpcode, Aqa, AsyncEventConfig, Cap, Cc, Cns, FeatureId, FeatureSelect, IdentifyController,
    QueueCounts, SetFeatures, Sqe, Version, VolatileWriteCache, offset,
};

use super::{Controller, MS, Phase};
use crate::Error;
use crate::admin::{ENTRIES, Job, Reply};
use crate::bar::Bar;
use crate::identify::ControllerInfo;
use crate::shadow::ShadowBuffers;

/// How far bring-up has come. `until`: when patience ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Boot {
    /// Nothing was touched yet.
    Begin,
    /// Somebody was enabling it; EN may be cleared only once it is ready.
    WaitReady { until: u64 },
    /// EN is 0; RDY must follow.
    WaitDisabled { until: u64 },
    /// EN is 1; RDY must follow.
    WaitEnabled { until: u64 },
    /// Identify Controller was sent.
    Identify,
    /// Set Features, Number of Queues, was sent.
    QueueCount,
    /// Get Features, Volatile Write Cache, was sent.
    Cache,
    /// Identify, I/O Command Set specific controller data, was sent.
    Limits,
    /// The search for namespaces runs.
    Scan,
    /// Set Features, Asynchronous Event Configuration, was sent.
    EventConfig,
    /// Doorbell Buffer Config was sent.
    Doorbells,
}

/// From where bring-up began: tells what to try next if it fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// The controller is being opened.
    Open,
    /// It was lost, and is taken up again.
    Restart,
    /// It was reset by CC.EN.
    Disable,
    /// Its PCI function was reset.
    FunctionReset,
}

/// CNS of Identify for data of the controller that is specific to a command set (2.0 §5.17.2.6),
/// and where Write Zeroes Size Limit stands in it for the NVM command set (NVM §4.1.5.2).
const CNS_COMMAND_SET_CONTROLLER: u32 = 0x06;
const WZSL_OFFSET: usize = 1;

impl<B: Bar> Controller<B> {
    /// How long RDY may take to follow EN, in nanoseconds. A value of 0 is taken as one unit.
    pub(super) fn ready_timeout(&self) -> u64 {
        u64::from(self.cap.timeout_ms().max(500)) * MS
    }

    /// Clears CC.EN, and SHN so that no shutdown is asked for.
    pub(super) fn disable(&self) {
        let cc = Cc(self.bar.read32(offset::CC));
        self.bar.write32(offset::CC, cc.with_en(0).with_shn(0).0);
    }

    /// One step of bring-up.
    pub(super) fn boot(&mut self, now: u64) -> Result<(), Error> {
        let Phase::Boot(stage) = self.phase else { return Ok(()) };
        match stage {
            Boot::Begin => {
                let cap = Cap(self.bar.read64(offset::CAP));
                if cap.0 == u64::MAX {
                    return Err(Error::Gone);
                }
                if cap != self.cap {
                    let text = format!("CAP was {:#x} and is {:#x}", self.cap.0, cap.0);
                    return Err(Error::Changed(text));
                }
                let (cc, csts) = (Cc(self.bar.read32(offset::CC)), self.csts());
                let until = now.saturating_add(self.ready_timeout());
                if cc.en() == 1 && csts.rdy() == 0 && csts.cfs() == 0 && csts.shst() == 0 {
                    self.phase = Phase::Boot(Boot::WaitReady { until });
                } else {
                    if cc.en() == 1 {
                        self.disable();
                    }
                    self.phase = Phase::Boot(Boot::WaitDisabled { until });
                }
            }
            Boot::WaitReady { until } => {
                let csts = self.csts();
                if csts.rdy() == 1 || csts.cfs() == 1 || now >= until {
                    self.disable();
                    let until = now.saturating_add(self.ready_timeout());
                    self.phase = Phase::Boot(Boot::WaitDisabled { until });
                }
            }
            Boot::WaitDisabled { until } => {
                let csts = self.csts();
                if csts == nvme_spec::Csts::GONE {
                    return Err(Error::Gone);
                }
                if csts.rdy() == 0 {
                    self.enable(now)?;
                } else if now >= until {
                    return Err(self.not_ready("disabled"));
                }
            }
            Boot::WaitEnabled { until } => {
                let csts = self.healthy_csts()?;
                if csts.rdy() == 1 {
                    self.phase = Phase::Boot(Boot::Identify);
                    self.send_identify(now, "Identify (controller)", Cns::Controller, 0);
                } else if now >= until {
                    return Err(self.not_ready("ready"));
                }
            }
            _ => {
                self.healthy_csts()?;
                self.admin.late(now)?;
                while let Some(reply) = self.admin.reap() {
                    if let Phase::Boot(stage) = self.phase
                        && reply.job == Job::Step
                    {
                        self.boot_reply(now, stage, reply)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn not_ready(&self, what: &'static str) -> Error {
        Error::NotReady { what, ms: self.ready_timeout() / MS }
    }

    /// Tells the device where the admin queue is and enables it (§7.6.1 steps 3 to 5).
    fn enable(&mut self, now: u64) -> Result<(), Error> {
        // Not a moment earlier: until it is disabled it may use memory of another time.
        if let Err(e) = self.bar.bus_master_on() {
            return Err(Error::Unsupported(format!("it cannot master the bus: {e}")));
        }
        self.admin.reset();
        let [asq, acq, _] = self.admin.bus();
        let aqa = Aqa(0).with_asqs(ENTRIES - 1).with_acqs(ENTRIES - 1);
        self.bar.write32(offset::AQA, aqa.0);
        self.bar.write64(offset::ASQ, asq);
        self.bar.write64(offset::ACQ, acq);
        let cc = Cc(0)
            .with_en(1)
            .with_mps(self.memory.page_shift() - 12)
            .with_iosqes(nvme_spec::SQE_SIZE.ilog2())
            .with_iocqes(nvme_spec::CQE_SIZE.ilog2());
        self.bar.write32(offset::CC, cc.0);
        let until = now.saturating_add(self.ready_timeout());
        self.phase = Phase::Boot(Boot::WaitEnabled { until });
        Ok(())
    }

    /// The answer to the command of a stage: takes it, and sends the next.
    fn boot_reply(&mut self, now: u64, stage: Boot, reply: Reply) -> Result<(), Error> {
        match stage {
            Boot::Identify => {
                reply.ok()?;
                self.identified()?;
                let n = self.options.io_queues.max(1);
                let counts = SetFeatures::NumberOfQueues(QueueCounts { sq: n, cq: n });
                self.phase = Phase::Boot(Boot::QueueCount);
                self.send_step(now, "Set Features (number of queues)", |cid| {
                    Sqe::set_features(cid, counts)
                });
            }
            Boot::QueueCount => {
                let n = QueueCounts::from_dword(reply.ok()?);
                self.granted = n.sq.min(n.cq).min(self.options.io_queues.max(1));
                if self.info_ref().volatile_cache {
                    self.phase = Phase::Boot(Boot::Cache);
                    let (id, now_) = (FeatureId::VolatileWriteCache, FeatureSelect::Current);
                    self.send_step(now, "Get Features (volatile write cache)", |cid| {
                        Sqe::get_features(cid, id, now_)
                    });
                } else {
                    self.ask_limits(now);
                }
            }
            Boot::Cache => {
                // If it does not say, the cache is on: a flush too many does no harm.
                let on = reply.ok().map_or(1, |r| VolatileWriteCache(r).enabled());
                if let Some(info) = &mut self.info {
                    info.cache_enabled = on == 1;
                }
                self.ask_limits(now);
            }
            Boot::Limits => {
                let shift = match (reply.ok(), self.admin.data::<[u8; 16]>()) {
                    (Ok(_), Some(data)) => u32::from(data[WZSL_OFFSET]),
                    _ => 0,
                };
                let page = self.cap.mpsmin() as u32 + 12;
                if let Some(info) = &mut self.info {
                    // 0: no limit (NVM §4.1.5.2). MDTS is about data that moves, and none does.
                    let none = shift == 0 || shift + page > 62;
                    info.zeroes_limit = (!none).then(|| 1 << (shift + page));
                }
                self.begin_scan(now);
            }
            Boot::Scan => {
                if self.scan_reply(now, reply)? {
                    self.ask_events(now);
                }
            }
            Boot::EventConfig => {
                if let Err(e) = reply.ok() {
                    log::warn!("nvme {}: {e}", self.name());
                }
                self.offer_doorbells(now);
            }
            Boot::Doorbells => {
                match (reply.ok(), &self.shadow) {
                    (Ok(_), Some(shadow)) => shadow.set(true),
                    (Err(e), _) => log::warn!("nvme {}: {e}", self.name()),
                    (Ok(_), None) => {}
                }
                self.become_ready(now);
            }
            Boot::Begin
            | Boot::WaitReady { .. }
            | Boot::WaitDisabled { .. }
            | Boot::WaitEnabled { .. } => {}
        }
        Ok(())
    }

    /// Takes what Identify Controller said. After a reset it must be the same device.
    fn identified(&mut self) -> Result<(), Error> {
        let what = "Identify (controller)";
        let no_data = Error::Memory { what, why: "no data".to_owned() };
        let id: IdentifyController = self.admin.data().ok_or(no_data)?;
        let vs = Version(self.bar.read32(offset::VS));
        let info = ControllerInfo::new(&id, self.cap, vs)?;
        if let Some(old) = &self.info {
            let is = |i: &ControllerInfo| format!("{} {:?}", i.model, i.serial);
            if is(old) != is(&info) {
                return Err(Error::Changed(format!("it was {} and is {}", is(old), is(&info))));
            }
            if info.max_command < old.max_command || info.oncs != old.oncs {
                return Err(Error::Changed("it can do less than before".to_owned()));
            }
        }
        self.info = Some(info);
        Ok(())
    }

    fn ask_limits(&mut self, now: u64) {
        if self.info_ref().version.0 < Version::V2_0.0 {
            return self.begin_scan(now);
        }
        self.phase = Phase::Boot(Boot::Limits);
        self.admin.clear_data();
        let data = self.admin.bus()[2];
        self.send_step(now, "Identify (command set)", |cid| {
            Sqe::new(AdminOpcode::Identify.code(), cid, 0)
                .with_prps(data, 0)
                .with_cdw(0, CNS_COMMAND_SET_CONTROLLER)
        });
    }

    fn begin_scan(&mut self, now: u64) {
        self.phase = Phase::Boot(Boot::Scan);
        self.scan_begin(now);
    }

    fn ask_events(&mut self, now: u64) {
        let notices = u32::from(self.info_ref().namespace_events);
        let config = AsyncEventConfig(0).with_smart(0x1f).with_namespace(notices);
        self.phase = Phase::Boot(Boot::EventConfig);
        self.send_step(now, "Set Features (asynchronous events)", |cid| {
            Sqe::set_features(cid, SetFeatures::AsyncEventConfig(config))
        });
    }

    /// Tells the device of shadow doorbells if it wants any. A reset made it forget them. Until it
    /// agrees, as for all queues if it does not, the registers are written.
    fn offer_doorbells(&mut self, now: u64) {
        if let Some(shadow) = &self.shadow {
            shadow.set(false);
            shadow.clear();
        }
        if self.info_ref().doorbell_buffer && self.shadow.is_none() {
            match ShadowBuffers::new(&self.memory, self.cap.dstrd() as u8) {
                Ok(shadow) => self.shadow = Some(Arc::new(shadow)),
                Err(e) => log::warn!("nvme {}: {e}", self.name()),
            }
        }
        let offered = self.shadow.as_ref().filter(|_| self.info_ref().doorbell_buffer);
        let Some([values, events]) = offered.map(|s| s.bus()) else {
            return self.become_ready(now);
        };
        self.phase = Phase::Boot(Boot::Doorbells);
        self.send_step(now, "Doorbell Buffer Config", |cid| {
            Sqe::doorbell_buffer_config(cid, values, events)
        });
    }

    fn become_ready(&mut self, now: u64) {
        let info = self.info_ref();
        log::info!(
            "nvme {}: {} firmware {}, NVMe {}.{}, {} namespaces, {} I/O queues, {} KiB per command{}",
            info.serial,
            info.model,
            info.firmware,
            info.version.major(),
            info.version.minor(),
            self.namespaces.len(),
            self.granted,
            info.max_command >> 10,
            if info.cache_enabled { ", volatile cache" } else { "" },
        );
        for r in &self.refused {
            log::warn!("nvme {}: namespace {} is not used: {}", info.serial, r.nsid, r.why);
        }
        self.service.begin(now);
        self.phase = Phase::Ready;
    }
}
