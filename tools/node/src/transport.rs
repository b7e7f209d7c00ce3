//! [`Transport`]: registers of an NVMe controller, whichever way they are reached.
//!
//! One type for all ways, so that there is one kind of queue pair, and its code once. What differs
//! is how a doorbell is written, and that costs a match twice a turn, not for each request.

use nvme::{Bar, Doorbell, ResetError};

use crate::model::{ModelBar, ModelDoorbell};
use crate::remote::{RemoteBar, RemoteDoorbell};
use crate::vfio::{VfioBar, VfioDoorbell};

/// Registers of a controller.
pub enum Transport {
    /// In this process.
    Model(ModelBar),
    /// A PCI function that this process drives.
    Vfio(VfioBar),
    /// In another process.
    Remote(RemoteBar),
}

/// One doorbell of a controller.
pub enum TransportDoorbell {
    /// In this process.
    Model(ModelDoorbell),
    /// Of a PCI function.
    Vfio(VfioDoorbell),
    /// In another process.
    Remote(RemoteDoorbell),
}

macro_rules! each {
    ($kind:ident, $self:expr, $b:ident => $e:expr) => {
        match $self {
            $kind::Model($b) => $e,
            $kind::Vfio($b) => $e,
            $kind::Remote($b) => $e,
        }
    };
}

impl Doorbell for TransportDoorbell {
    #[inline]
    fn ring(&self, value: u32) {
        each!(TransportDoorbell, self, d => d.ring(value));
    }
}

impl Bar for Transport {
    type Doorbell = TransportDoorbell;

    fn read32(&self, offset: u64) -> u32 {
        each!(Transport, self, b => b.read32(offset))
    }

    fn read64(&self, offset: u64) -> u64 {
        each!(Transport, self, b => b.read64(offset))
    }

    fn write32(&self, offset: u64, value: u32) {
        each!(Transport, self, b => b.write32(offset, value));
    }

    fn write64(&self, offset: u64, value: u64) {
        each!(Transport, self, b => b.write64(offset, value));
    }

    fn doorbell(&self, offset: u64) -> Option<TransportDoorbell> {
        match self {
            Transport::Model(b) => b.doorbell(offset).map(TransportDoorbell::Model),
            Transport::Vfio(b) => b.doorbell(offset).map(TransportDoorbell::Vfio),
            Transport::Remote(b) => b.doorbell(offset).map(TransportDoorbell::Remote),
        }
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        each!(Transport, self, b => b.function_reset())
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        each!(Transport, self, b => b.bus_master_off())
    }

    fn bus_master_on(&self) -> Result<(), ResetError> {
        each!(Transport, self, b => b.bus_master_on())
    }
}
