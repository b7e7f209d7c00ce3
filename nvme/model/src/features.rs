//! Set Features and Get Features (§5.21, §5.13).

use nvme_spec::{
    AsyncEventConfig, FeatureId, FeatureSelect, QueueCounts, Sqe, StatusCode, VolatileWriteCache,
};

use crate::config::Options;
use crate::controller::{Answer, Controller, deny};
use crate::memory::HostMemory;

/// SV in CDW10 of Set Features: save over power cycles, which this device cannot.
const SAVE: u32 = 1 << 31;

/// Values of all features, indexed by identifier. They start anew with each reset.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    values: [u32; 16],
}

impl Features {
    pub(crate) fn new(options: &Options) -> Features {
        let mut features = Features { values: [0; 16] };
        let queues = QueueCounts { sq: options.queues, cq: options.queues };
        *features.at(FeatureId::NumberOfQueues) = queues.to_dword();
        *features.at(FeatureId::VolatileWriteCache) = options.vwc.into();
        // Arbitration burst: no limit. Temperature thresholds: 70 degrees Celsius.
        *features.at(FeatureId::Arbitration) = 7;
        *features.at(FeatureId::TemperatureThreshold) = 343;
        features
    }

    fn at(&mut self, id: FeatureId) -> &mut u32 {
        &mut self.values[usize::from(id.code() & 15)]
    }

    fn get(&self, id: FeatureId) -> u32 {
        self.values[usize::from(id.code() & 15)]
    }

    pub(crate) fn async_events(&self) -> AsyncEventConfig {
        AsyncEventConfig(self.get(FeatureId::AsyncEventConfig))
    }

    /// I/O queues that may be created.
    pub(crate) fn queues(&self) -> QueueCounts {
        QueueCounts::from_dword(self.get(FeatureId::NumberOfQueues))
    }
}

impl<M: HostMemory> Controller<M> {
    fn feature_of(&self, sqe: &Sqe) -> Result<FeatureId, nvme_spec::Status> {
        let id = FeatureId::from_code(sqe.dword(0) as u8);
        let id = id.ok_or(deny(StatusCode::INVALID_FIELD))?;
        if id == FeatureId::VolatileWriteCache && !self.options.vwc {
            // §5.21.1.6: no cache, no feature.
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        Ok(id)
    }

    pub(crate) fn set_features(&mut self, sqe: &Sqe) -> Answer {
        let id = self.feature_of(sqe)?;
        if sqe.dword(0) & SAVE != 0 {
            return Err(deny(StatusCode::FEATURE_NOT_SAVEABLE));
        }
        let value = sqe.dword(1);
        match id {
            FeatureId::NumberOfQueues => return self.set_queue_counts(value),
            FeatureId::VolatileWriteCache => {
                let on = VolatileWriteCache(value).enabled() == 1;
                if !on {
                    let flushed = self.flush_all();
                    flushed.map_err(|_| deny(StatusCode::INTERNAL_ERROR))?;
                }
                for ns in &mut self.namespaces {
                    ns.cached = on;
                }
            }
            FeatureId::PowerManagement if value & 0x1f != 0 => {
                // Only power state 0 exists.
                return Err(deny(StatusCode::INVALID_FIELD));
            }
            _ => {}
        }
        *self.features.at(id) = value;
        Ok(0)
    }

    fn set_queue_counts(&mut self, value: u32) -> Answer {
        if value & 0xffff == 0xffff || value >> 16 == 0xffff {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        if self.queues.any_io() {
            return Err(deny(StatusCode::SEQUENCE_ERROR));
        }
        let asked = QueueCounts::from_dword(value);
        let most = self.options.queues;
        let granted = QueueCounts { sq: asked.sq.min(most), cq: asked.cq.min(most) };
        *self.features.at(FeatureId::NumberOfQueues) = granted.to_dword();
        Ok(granted.to_dword())
    }

    pub(crate) fn get_features(&mut self, sqe: &Sqe) -> Answer {
        let id = self.feature_of(sqe)?;
        match FeatureSelect::from_code((sqe.dword(0) >> 8) as u8 & 7) {
            Some(FeatureSelect::Current) => Ok(self.features.get(id)),
            Some(FeatureSelect::Default | FeatureSelect::Saved) => {
                Ok(Features::new(&self.options).get(id))
            }
            // Changeable, neither saveable nor per namespace.
            Some(FeatureSelect::Capabilities) => Ok(4),
            None => Err(deny(StatusCode::INVALID_FIELD)),
        }
    }
}
