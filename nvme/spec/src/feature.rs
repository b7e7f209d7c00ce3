//! Features (§5.21.1): identifiers and the dwords of those that are used.

use crate::bits::{bitfields, codes};

codes! {
    /// Feature identifiers (§5.21.1, figure 271).
    pub enum FeatureId(u8) {
        /// Arbitration (§5.21.1.1).
        Arbitration = 0x01,
        /// Power Management (§5.21.1.2).
        PowerManagement = 0x02,
        /// Temperature Threshold (§5.21.1.4).
        TemperatureThreshold = 0x04,
        /// Error Recovery (§5.21.1.5).
        ErrorRecovery = 0x05,
        /// Volatile Write Cache (§5.21.1.6).
        VolatileWriteCache = 0x06,
        /// Number of Queues (§5.21.1.7).
        NumberOfQueues = 0x07,
        /// Interrupt Coalescing (§5.21.1.8).
        InterruptCoalescing = 0x08,
        /// Interrupt Vector Configuration (§5.21.1.9).
        InterruptVector = 0x09,
        /// Write Atomicity Normal (§5.21.1.10).
        WriteAtomicity = 0x0a,
        /// Asynchronous Event Configuration (§5.21.1.11).
        AsyncEventConfig = 0x0b,
    }
}

codes! {
    /// SEL of Get Features (§5.13, figure 183).
    pub enum FeatureSelect(u8) {
        /// Value in use.
        Current = 0,
        /// Value after a reset.
        Default = 1,
        /// Value kept over resets and power cycles.
        Saved = 2,
        /// What can be done with the feature: bit 0 saveable, 1 per namespace, 2 changeable.
        Capabilities = 3,
    }
}

/// Queue counts of the Number of Queues feature, 1's based, 1 to 65535 each; the wire format is
/// 0's based. Used for what is asked for and for what the controller grants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueCounts {
    /// I/O submission queues.
    pub sq: u16,
    /// I/O completion queues.
    pub cq: u16,
}

impl QueueCounts {
    /// CDW11 of Set Features, or dword 0 of the completion.
    pub const fn to_dword(self) -> u32 {
        (self.sq.saturating_sub(1) as u32) | (self.cq.saturating_sub(1) as u32) << 16
    }

    /// From CDW11 or dword 0 of a completion. The value FFFFh is not allowed by the
    /// specification and gives 65535.
    pub const fn from_dword(dword: u32) -> QueueCounts {
        QueueCounts {
            sq: (dword as u16).saturating_add(1),
            cq: ((dword >> 16) as u16).saturating_add(1),
        }
    }
}

bitfields! {
    /// Dword of the Volatile Write Cache feature (§5.21.1.6).
    pub struct VolatileWriteCache(u32) {
        /// WCE: the cache is on.
        enabled / with_enabled: 0, 1;
    }
}

bitfields! {
    /// Dword of the Asynchronous Event Configuration feature (§5.21.1.11).
    pub struct AsyncEventConfig(u32) {
        /// SMART / health critical warnings, as the bits of the log page's first byte.
        smart / with_smart: 0, 8;
        /// Namespace attribute notices.
        namespace / with_namespace: 8, 1;
        /// Firmware activation notices.
        firmware / with_firmware: 9, 1;
        /// Telemetry log notices.
        telemetry / with_telemetry: 10, 1;
    }
}

/// A feature to set, for those that need no data buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetFeatures {
    /// Ask for queues.
    NumberOfQueues(QueueCounts),
    /// Turn the volatile write cache on or off.
    VolatileWriteCache(VolatileWriteCache),
    /// Choose the asynchronous events that are reported.
    AsyncEventConfig(AsyncEventConfig),
    /// Arbitration: burst (log2, 7 for no limit) in bits 2:0, weights above.
    Arbitration(u32),
}

impl SetFeatures {
    /// The feature's identifier and CDW11.
    pub const fn encode(self) -> (FeatureId, u32) {
        match self {
            SetFeatures::NumberOfQueues(n) => (FeatureId::NumberOfQueues, n.to_dword()),
            SetFeatures::VolatileWriteCache(v) => (FeatureId::VolatileWriteCache, v.0),
            SetFeatures::AsyncEventConfig(v) => (FeatureId::AsyncEventConfig, v.0),
            SetFeatures::Arbitration(v) => (FeatureId::Arbitration, v),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_counts() {
        let n = QueueCounts { sq: 1, cq: 65535 };
        assert_eq!(n.to_dword(), 0xfffe_0000);
        assert_eq!(QueueCounts::from_dword(n.to_dword()), n);
        assert_eq!(QueueCounts::from_dword(0xffff_ffff), QueueCounts { sq: 65535, cq: 65535 });
    }

    #[test]
    fn event_config() {
        let c = AsyncEventConfig(0).with_smart(0x1f).with_namespace(1);
        assert_eq!(SetFeatures::AsyncEventConfig(c).encode(), (FeatureId::AsyncEventConfig, 0x11f));
    }
}
