//! What a controller is made with, and the checks of it.

use nvme_spec::{Cap, Fna, Oacs, Oncs, offset};

use crate::fault::Faults;
use crate::namespace::NamespaceConfig;

/// Options of a controller. [`Options::default`] is a small drive without a volatile cache.
#[derive(Clone, Debug)]
pub struct Options {
    /// I/O queue pairs that are granted at most: 1 to 1024.
    pub queues: u16,
    /// Entries of an I/O queue at most (CAP.MQES + 1): 2 to 65536.
    pub entries: u32,
    /// Doorbells are `4 << dstrd` bytes apart: 0 to 10.
    pub dstrd: u8,
    /// Largest transfer is `4096 << mdts` bytes, 0 for no limit; 0 to 16.
    pub mdts: u8,
    /// Largest memory page is `4096 << mpsmax` bytes: 0 to 4.
    pub mpsmax: u8,
    /// CAP.TO: how long getting ready may take, in units of 500 ms.
    pub timeout_500ms: u8,
    /// A volatile write cache is there (and on after each reset).
    pub vwc: bool,
    /// Bytes that the cache of a namespace holds before it evicts.
    pub cache_bytes: u64,
    /// Write Zeroes is supported.
    pub write_zeroes: bool,
    /// Dataset Management is supported.
    pub dsm: bool,
    /// Doorbell Buffer Config is supported.
    pub doorbell_buffer: bool,
    /// Format NVM is supported, with these attributes.
    pub format: Option<Fna>,
    /// Asynchronous Event Requests that may be outstanding, 0's based.
    pub aerl: u8,
    /// Serial number, at most 20 ASCII characters.
    pub serial: String,
    /// Model number, at most 40 ASCII characters.
    pub model: String,
    /// Carry out I/O commands in a random order drawn from this seed, instead of in the order of
    /// the queues.
    pub shuffle: Option<u64>,
    /// What goes wrong.
    pub faults: Faults,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            queues: 16,
            entries: 1024,
            dstrd: 0,
            mdts: 5,
            mpsmax: 0,
            timeout_500ms: 4,
            vwc: false,
            cache_bytes: 16 << 20,
            write_zeroes: true,
            dsm: true,
            doorbell_buffer: false,
            format: Some(Fna(0).with_crypto(1)),
            aerl: 3,
            serial: "PDMODEL0001".to_owned(),
            model: "polldisk NVMe model".to_owned(),
            shuffle: None,
            faults: Faults::none(),
        }
    }
}

/// A controller cannot be made this way.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An option is out of range.
    #[error("controller model: {name} is {value}, allowed is {allowed}")]
    Range {
        /// The option.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The serial or model number is too long or not printable ASCII.
    #[error("controller model: {name} {text:?} is not at most {most} printable ASCII characters")]
    Text {
        /// The option.
        name: &'static str,
        /// Its value.
        text: String,
        /// Characters allowed.
        most: usize,
    },
}

/// Namespaces at most.
pub(crate) const MAX_NAMESPACES: usize = 1024;

/// Largest size of a namespace in bytes.
pub(crate) const MAX_BYTES: u64 = 1 << 63;

impl Options {
    pub(crate) fn check(&self, namespaces: &[NamespaceConfig]) -> Result<(), ConfigError> {
        let range = |name, value: u64, min: u64, max: u64, allowed| {
            let fine = (min..=max).contains(&value);
            if fine { Ok(()) } else { Err(ConfigError::Range { name, value, allowed }) }
        };
        range("queues", self.queues.into(), 1, 1024, "1 to 1024")?;
        range("entries", self.entries.into(), 2, 65536, "2 to 65536")?;
        range("dstrd", self.dstrd.into(), 0, 10, "0 to 10")?;
        range("mdts", self.mdts.into(), 0, 16, "0 to 16")?;
        range("mpsmax", self.mpsmax.into(), 0, 4, "0 to 4")?;
        range("timeout_500ms", self.timeout_500ms.into(), 1, 255, "1 to 255")?;
        range("namespaces", namespaces.len() as u64, 0, MAX_NAMESPACES as u64, "0 to 1024")?;
        for ns in namespaces {
            let lba = u64::from(ns.lba);
            if lba != 512 && lba != 4096 {
                let allowed = "512 or 4096";
                return Err(ConfigError::Range { name: "lba", value: lba, allowed });
            }
            range("blocks", ns.blocks, 1, MAX_BYTES / lba, "1 to 2^63 bytes")?;
        }
        for (name, text, most) in [("serial", &self.serial, 20), ("model", &self.model, 40)] {
            if text.len() > most || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
                return Err(ConfigError::Text { name, text: text.clone(), most });
            }
        }
        Ok(())
    }

    pub(crate) fn cap(&self) -> Cap {
        Cap(0)
            .with_mqes(u64::from(self.entries) - 1)
            .with_cqr(1)
            .with_to(self.timeout_500ms.into())
            .with_dstrd(self.dstrd.into())
            .with_css(Cap::CSS_NVM)
            .with_mpsmax(self.mpsmax.into())
    }

    pub(crate) fn oacs(&self) -> Oacs {
        Oacs(0)
            .with_format(self.format.is_some().into())
            .with_doorbell_buffer(self.doorbell_buffer.into())
    }

    pub(crate) fn oncs(&self) -> Oncs {
        Oncs(0).with_dsm(self.dsm.into()).with_write_zeroes(self.write_zeroes.into())
    }

    /// Bytes of BAR0 that hold registers and doorbells, rounded up to a page.
    pub fn bar_len(&self) -> u64 {
        let doorbells = (u64::from(self.queues) + 1) * 2;
        (offset::DOORBELLS + (doorbells << (2 + self.dstrd))).next_multiple_of(4096)
    }

    /// Largest transfer in bytes.
    pub(crate) fn max_transfer(&self) -> u64 {
        if self.mdts == 0 { u64::MAX } else { 4096 << self.mdts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn what_cannot_be_is_refused() {
        let ns =
            |lba, blocks| NamespaceConfig { store: Store::memory(), blocks, lba, read_only: false };
        let fine = Options::default();
        assert!(fine.check(&[ns(512, 1), ns(4096, 1 << 51)]).is_ok());
        for bad in [ns(1024, 1), ns(512, 0), ns(4096, (1 << 51) + 1), ns(0, 1)] {
            assert!(fine.check(&[bad]).is_err());
        }
        let text = Options { serial: "x".repeat(21), ..Options::default() }.check(&[]).unwrap_err();
        assert!(text.to_string().contains("serial"));
        assert!(Options { model: "\u{e9}".into(), ..Options::default() }.check(&[]).is_err());
        assert!(Options { queues: 0, ..Options::default() }.check(&[]).is_err());
        assert!(Options { entries: 65537, ..Options::default() }.check(&[]).is_err());
    }
}
