//! [`PciConfig`]: the configuration space of the function that a controller would be on a PCI bus,
//! for hosts that look for one: class code, one 64-bit BAR, MSI-X.
//!
//! Owned by whoever serves the model as a PCI device. Nothing here is asked for per request.

/// Bytes of configuration space.
pub const CONFIG_LEN: usize = 256;

/// Bytes of an entry of the MSI-X table (PCI 3.0 §6.8.2).
pub const MSIX_ENTRY: u64 = 16;

const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const MSIX: usize = 0x40;
/// Memory space, bus master, interrupt disable.
const COMMAND_BITS: u16 = 1 << 1 | COMMAND_MASTER | 1 << 10;
const COMMAND_MASTER: u16 = 1 << 2;

/// Where things are in BAR0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BarLayout {
    /// Registers and doorbells: whole pages from 0 on.
    pub registers: u64,
    /// Where the MSI-X table begins.
    pub table: u64,
    /// Where the pending bits begin.
    pub pending: u64,
    /// Size of the BAR, a power of two.
    pub size: u64,
    /// MSI-X vectors: at most 2048.
    pub vectors: u16,
}

impl BarLayout {
    /// For a controller with this much of registers and so many I/O queues: a vector for each, and
    /// one for the admin queue. Each thing has pages of its own.
    pub fn new(registers: u64, io_queues: u16) -> BarLayout {
        let page = |n: u64| n.next_multiple_of(4096);
        let vectors = io_queues.saturating_add(1).min(2048);
        let table = page(registers);
        let pending = page(table + u64::from(vectors) * MSIX_ENTRY);
        let size = (pending + 4096).next_power_of_two();
        BarLayout { registers: table, table, pending, size, vectors }
    }
}

/// Configuration space of an NVMe function.
#[derive(Clone, Debug)]
pub struct PciConfig {
    bytes: [u8; CONFIG_LEN],
    /// Bits that can be written.
    mask: [u8; CONFIG_LEN],
    layout: BarLayout,
}

impl PciConfig {
    /// As it is after power-on.
    pub fn new(layout: BarLayout) -> PciConfig {
        let mut config = PciConfig { bytes: [0; CONFIG_LEN], mask: [0; CONFIG_LEN], layout };
        // Type 0 header (PCI 3.0 §6.1). The vendor is the one that Identify names.
        config.set(0x00, &crate::identify::VENDOR.to_le_bytes());
        config.set(0x02, &0x0010u16.to_le_bytes());
        // Status: there is a list of capabilities.
        config.set(0x06, &(1u16 << 4).to_le_bytes());
        // Class: mass storage, non-volatile memory, NVM Express (NVMe 1.4 §2.1.5).
        config.set(0x08, &[0, 0x02, 0x08, 0x01]);
        config.set(0x2c, &crate::identify::VENDOR.to_le_bytes());
        config.set(0x34, &[MSIX as u8]);
        // A 64-bit BAR.
        config.set(BAR0, &[0b100]);
        config.mask[BAR0..BAR0 + 8].copy_from_slice(&(!(layout.size - 1)).to_le_bytes());
        config.mask[BAR0] = 0;
        // MSI-X (PCI 3.0 §6.8.2): table and pending bits in BAR0.
        config.set(MSIX, &[0x11, 0]);
        config.set(MSIX + 2, &(layout.vectors - 1).to_le_bytes());
        config.set(MSIX + 4, &(layout.table as u32).to_le_bytes());
        config.set(MSIX + 8, &(layout.pending as u32).to_le_bytes());
        config.mask[MSIX + 3] = 0xc0;
        config.mask[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_BITS.to_le_bytes());
        // Interrupt line: for the host to keep what it likes.
        config.mask[0x3c] = 0xff;
        config
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads bytes; those outside read as ones, as on a bus where nobody answers.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (i, to) in into.iter_mut().enumerate() {
            *to = inside(offset, i).map_or(0xff, |at| self.bytes[at]);
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        for (i, &byte) in from.iter().enumerate() {
            let Some(at) = inside(offset, i) else { return };
            let mask = self.mask[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// Whether the function may access memory.
    pub fn bus_master(&self) -> bool {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        command & COMMAND_MASTER != 0
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        *self = PciConfig::new(self.layout);
    }
}

/// Index of a byte behind `offset`, if it is one of configuration space.
fn inside(offset: u64, behind: usize) -> Option<usize> {
    let at = usize::try_from(offset).ok()?.checked_add(behind)?;
    (at < CONFIG_LEN).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read32(c: &PciConfig, at: u64) -> u32 {
        let mut b = [0; 4];
        c.read(at, &mut b);
        u32::from_le_bytes(b)
    }

    #[test]
    fn layouts_are_apart_and_a_power_of_two() {
        for queues in [1, 16, 255, 256, 1024, u16::MAX] {
            let l = BarLayout::new(8192, queues);
            assert_eq!((l.registers, l.table), (8192, 8192));
            assert!(l.pending >= l.table + u64::from(l.vectors) * MSIX_ENTRY);
            assert!(l.size.is_power_of_two() && l.size >= l.pending + u64::from(l.vectors) / 8);
        }
        assert_eq!(BarLayout::new(8192, 16).size, 16384);
    }

    #[test]
    fn an_nvme_function_with_msix() {
        let c = PciConfig::new(BarLayout::new(8192, 16));
        assert_eq!(read32(&c, 8) >> 8, 0x01_0802);
        let cap = u64::from(read32(&c, 0x34) as u8);
        let msix = read32(&c, cap);
        assert_eq!((msix as u8, msix >> 8 & 0xff, msix >> 16), (0x11, 0, 16));
        assert_eq!((read32(&c, cap + 4), read32(&c, cap + 8)), (0x2000, 0x3000));
        assert_eq!(read32(&c, 0x3c) >> 8 & 0xff, 0, "no interrupt pin");
    }

    #[test]
    fn only_what_can_be_written_is() {
        let mut c = PciConfig::new(BarLayout::new(8192, 16));
        assert!(!c.bus_master());
        let before = c.bytes;
        c.write(0, &[0xff; CONFIG_LEN]);
        assert!(c.bus_master());
        // Sizing the BAR (PCI 3.0 §6.2.5.1).
        assert_eq!((read32(&c, 0x10), read32(&c, 0x14)), (0xffff_c004, u32::MAX));
        assert_eq!(read32(&c, 0x40) >> 16, 0xc010);
        assert_eq!((read32(&c, 0), read32(&c, 0x18)), (0x0010_1b36, 0));
        c.reset();
        assert_eq!(c.bytes, before);
        // Around the end, and far outside.
        c.write(254, &[1; 8]);
        c.write(u64::MAX, &[1; 8]);
        let mut tail = [0; 4];
        c.read(254, &mut tail);
        assert_eq!(tail, [0, 0, 0xff, 0xff]);
        assert_eq!(read32(&c, u64::MAX), u32::MAX);
    }
}
