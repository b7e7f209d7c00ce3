//! [`Bar`]: the seam between the driver and a controller's registers.
//!
//! A transport (a mapped PCI function, a peer process, a model in this process) implements it. The
//! controller's owner reads and writes registers through it; each queue pair is given
//! [`Doorbell`] handles of its own, so that reactors never meet at the `Bar`.

/// A handle that writes one doorbell register. Used by one thread at a time.
pub trait Doorbell {
    /// Writes the register. Everything that this thread stored before is visible to the device
    /// before the write is: on x86 and an uncached mapping a plain volatile store does it.
    fn ring(&self, value: u32);
}

/// Why a hook of the reset ladder did nothing that can be relied on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResetError {
    /// The transport has no such thing.
    #[error("not supported by this transport")]
    Unsupported,
    /// It was tried, and it is not certain that it worked.
    #[error("{0}")]
    Failed(String),
}

/// Registers of one controller: BAR0 (§3.1). Writes arrive in the order in which they are made.
///
/// Offsets are bytes from the start of BAR0. A device that is no longer there reads as all ones
/// and swallows writes; no access may fault.
pub trait Bar {
    /// What writes one doorbell.
    type Doorbell: Doorbell;

    /// Reads a 32-bit register.
    fn read32(&self, offset: u64) -> u32;

    /// Reads a 64-bit register, in one access or as two halves.
    fn read64(&self, offset: u64) -> u64;

    /// Writes a 32-bit register.
    fn write32(&self, offset: u64, value: u32);

    /// Writes a 64-bit register, in one access or as two halves.
    fn write64(&self, offset: u64, value: u64);

    /// A handle to the doorbell at `offset`; `None` if that lies outside what can be reached.
    fn doorbell(&self, offset: u64) -> Option<Self::Doorbell>;

    /// Resets the PCI function (function level reset), waits until it is done, and leaves bus
    /// mastering on. May block its caller for some hundred milliseconds.
    ///
    /// # Errors
    /// If there is no such reset or it did not certainly happen.
    fn function_reset(&self) -> Result<(), ResetError> {
        Err(ResetError::Unsupported)
    }

    /// Stops the function from mastering the bus. `Ok` promises that it makes no further access to
    /// memory: the register read back, or the function certainly no longer on the bus.
    ///
    /// # Errors
    /// If that cannot be promised.
    fn bus_master_off(&self) -> Result<(), ResetError> {
        Err(ResetError::Unsupported)
    }

    /// Lets the function master the bus again, after [`Bar::bus_master_off`] or before first use.
    ///
    /// # Errors
    /// If the function does not take it.
    fn bus_master_on(&self) -> Result<(), ResetError> {
        Ok(())
    }
}
