//! What a backend writes into its xenstore directory, and what it makes of a frontend's.
//!
//! Pure: whoever talks to xenstore writes the keys of [`Offer`] and hands [`agree`] a way to read
//! the frontend's, all in one transaction. Everything a frontend wrote is text of a guest: only
//! what is short, decimal and within what was offered is believed. Control threads only.

use block::DeviceInfo;

use crate::abi::{Abi, MAX_ORDER, SECTOR};
use crate::backend::Config;

/// Longest value that is looked at, in bytes.
const LONGEST: usize = 32;

/// What a backend offers for one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Largest ring, as a power of two of pages.
    pub max_ring_order: u8,
    /// Most rings.
    pub max_queues: u16,
    /// Most segments of an indirect request; 0 for none.
    pub max_indirect_segments: u16,
    /// Pages may stay granted.
    pub persistent: bool,
    /// The guest can flush.
    pub flush: bool,
    /// The guest can send barriers.
    pub barrier: bool,
    /// The guest can discard: the unit of that in bytes.
    pub discard: Option<u32>,
    /// The guest may not write.
    pub read_only: bool,
    /// Size of the disk in sectors of 512 bytes, whatever `sector_size` is.
    pub sectors: u64,
    /// What requests must be aligned to, in bytes.
    pub sector_size: u32,
    /// Below this a write costs more, in bytes.
    pub physical_sector_size: u32,
}

impl Offer {
    /// The usual offer for a disk: 512-byte sectors whatever lies below (frontends disagree about
    /// what other sizes mean), and limits that a guest's table of grants can bear.
    pub fn new(info: &DeviceInfo) -> Offer {
        Offer {
            max_ring_order: 2,
            max_queues: 4,
            max_indirect_segments: 32,
            persistent: true,
            flush: true,
            barrier: false,
            discard: info.discard.then_some(info.discard_granularity),
            read_only: info.read_only,
            sectors: info.size / u64::from(SECTOR),
            sector_size: SECTOR,
            physical_sector_size: info.physical_block_size.max(info.block_size),
        }
    }

    /// What is to be written before the state becomes InitWait.
    pub fn transport_keys(&self) -> Vec<(&'static str, String)> {
        let mut keys = vec![
            ("max-ring-page-order", self.max_ring_order.to_string()),
            ("max-ring-pages", (1u32 << self.max_ring_order).to_string()),
            ("multi-queue-max-queues", self.max_queues.to_string()),
        ];
        if self.max_indirect_segments > 0 {
            keys.push(("feature-max-indirect-segments", self.max_indirect_segments.to_string()));
        }
        keys
    }

    /// What is to be written before the state becomes Connected. All of it may be written earlier.
    pub fn device_keys(&self) -> Vec<(&'static str, String)> {
        let bit = |b: bool| u8::from(b).to_string();
        let mut keys = vec![
            ("feature-flush-cache", bit(self.flush)),
            ("feature-barrier", bit(self.barrier)),
            ("feature-persistent", bit(self.persistent)),
            ("feature-discard", bit(self.discard.is_some())),
        ];
        if let Some(unit) = self.discard {
            keys.push(("discard-granularity", unit.to_string()));
            keys.push(("discard-alignment", "0".into()));
            keys.push(("discard-secure", "0".into()));
        }
        keys.extend(self.size_keys());
        // VDISK_READONLY
        keys.push(("info", if self.read_only { "4" } else { "0" }.into()));
        keys
    }

    /// What is to be written when the size has changed, together with the state as it is.
    pub fn size_keys(&self) -> Vec<(&'static str, String)> {
        vec![
            ("sectors", self.sectors.to_string()),
            ("sector-size", self.sector_size.to_string()),
            ("physical-sector-size", self.physical_sector_size.to_string()),
        ]
    }
}

/// One ring of a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Grants of the ring's pages, in order.
    pub ring_refs: Vec<u32>,
    /// The frontend's port, to be bound to.
    pub event_channel: u32,
}

/// What a frontend chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Layout of the slots.
    pub abi: Abi,
    /// Pages of each ring, as a power of two.
    pub order: u8,
    /// Pages stay granted.
    pub persistent: bool,
    /// The rings: at least one.
    pub queues: Vec<Queue>,
}

impl Agreed {
    /// How each ring is to be served.
    pub fn config(&self, offer: &Offer, owner: u16) -> Config {
        let mut config = Config::new(owner, self.abi, self.order);
        config.max_indirect_segments = offer.max_indirect_segments;
        config.sector_size = offer.sector_size;
        config.read_only = offer.read_only;
        config.flush = offer.flush;
        config.barrier = offer.barrier;
        config.discard = offer.discard.is_some();
        if self.persistent {
            config.persistent_pages = config.usual_persistent_pages();
        }
        config
    }
}

/// Why a frontend cannot be connected to: which of its keys is wrong, and how.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frontend key {key}: {problem}")]
pub struct Refusal {
    /// The key, relative to the frontend's directory.
    pub key: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is not there.
    #[error("is missing")]
    Missing,
    /// It is longer than any right value.
    #[error("is too long")]
    TooLong,
    /// It is not a decimal number.
    #[error("is not a number")]
    NotANumber,
    /// It is a number that was not offered.
    #[error("is not within {0} to {1}")]
    OutOfRange(u32, u32),
    /// It is a word that means nothing here.
    #[error("is not known")]
    Unknown,
}

/// Reads a frontend's directory by `read` (the value of a key relative to it, or `None`) and says
/// what was agreed.
///
/// # Errors
/// If a key is missing or wrong. Nothing is guessed.
pub fn agree(offer: &Offer, read: impl Fn(&str) -> Option<Vec<u8>>) -> Result<Agreed, Refusal> {
    let keys = Keys(read);
    let abi = match keys.text("protocol")?.as_deref() {
        Some(b"x86_64-abi" | b"arm-abi") => Abi::X86_64,
        // Without the key it is what Linux's backend takes it for.
        Some(b"x86_32-abi") | None => Abi::X86_32,
        Some(_) => return Err(refusal("protocol", Problem::Unknown)),
    };
    let most = u32::from(offer.max_ring_order.min(MAX_ORDER));
    let order = match keys.number("ring-page-order", 0, most)? {
        Some(order) => order,
        None => {
            let key = "num-ring-pages";
            let range = (1, 1 << most);
            let pages = keys.number(key, range.0, range.1)?.unwrap_or(1);
            if !pages.is_power_of_two() {
                return Err(refusal(key, Problem::OutOfRange(range.0, range.1)));
            }
            pages.ilog2()
        }
    };
    let persistent = keys.number("feature-persistent", 0, 1)? == Some(1) && offer.persistent;
    let most = u32::from(offer.max_queues.max(1));
    let count = keys.number("multi-queue-num-queues", 1, most)?.unwrap_or(1);
    let queues = (0..count)
        .map(|i| {
            let dir = if count == 1 { String::new() } else { format!("queue-{i}/") };
            keys.queue(&dir, 1 << order)
        })
        .collect::<Result<_, _>>()?;
    Ok(Agreed { abi, order: order as u8, persistent, queues })
}

fn refusal(key: impl Into<String>, problem: Problem) -> Refusal {
    Refusal { key: key.into(), problem }
}

struct Keys<R>(R);

impl<R: Fn(&str) -> Option<Vec<u8>>> Keys<R> {
    fn text(&self, key: &str) -> Result<Option<Vec<u8>>, Refusal> {
        match (self.0)(key) {
            Some(v) if v.len() > LONGEST => Err(refusal(key, Problem::TooLong)),
            other => Ok(other),
        }
    }

    /// A number from `least` to `most`; nothing but digits.
    fn number(&self, key: &str, least: u32, most: u32) -> Result<Option<u32>, Refusal> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
            return Err(refusal(key, Problem::NotANumber));
        }
        let add = |n: u32, d: &u8| n.checked_mul(10)?.checked_add(u32::from(d - b'0'));
        text.iter()
            .try_fold(0, add)
            .filter(|n| (least..=most).contains(n))
            .map(Some)
            .ok_or_else(|| refusal(key, Problem::OutOfRange(least, most)))
    }

    fn needed(&self, key: String, least: u32) -> Result<u32, Refusal> {
        self.number(&key, least, u32::MAX)?.ok_or_else(|| refusal(key, Problem::Missing))
    }

    fn queue(&self, dir: &str, pages: u32) -> Result<Queue, Refusal> {
        let numbered = |i| format!("{dir}ring-ref{i}");
        // A ring of one page has either spelling.
        let old = pages == 1 && (self.0)(&numbered(0)).is_none();
        let ring_refs = if old {
            vec![self.needed(format!("{dir}ring-ref"), 0)?]
        } else {
            (0..pages).map(|i| self.needed(numbered(i), 0)).collect::<Result<_, _>>()?
        };
        let event_channel = self.needed(format!("{dir}event-channel"), 1)?;
        Ok(Queue { ring_refs, event_channel })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            max_ring_order: 2,
            max_queues: 4,
            max_indirect_segments: 32,
            persistent: true,
            flush: true,
            barrier: false,
            discard: Some(65536),
            read_only: false,
            sectors: 1 << 21,
            sector_size: 512,
            physical_sector_size: 4096,
        }
    }

    fn agree_on(keys: &[(&str, &str)]) -> Result<Agreed, Refusal> {
        let read =
            |key: &str| keys.iter().rfind(|(k, _)| *k == key).map(|(_, v)| v.as_bytes().to_vec());
        agree(&offer(), read)
    }

    const LINUX: &[(&str, &str)] = &[
        ("protocol", "x86_64-abi"),
        ("ring-ref", "8"),
        ("event-channel", "15"),
        ("feature-persistent", "1"),
    ];

    fn with(more: &[(&'static str, &'static str)]) -> Result<Agreed, Refusal> {
        agree_on(&[LINUX, more].concat())
    }

    #[test]
    fn a_linux_frontend() {
        let a = with(&[]).unwrap();
        let queues = vec![Queue { ring_refs: vec![8], event_channel: 15 }];
        assert_eq!(a, Agreed { abi: Abi::X86_64, order: 0, persistent: true, queues });
        let c = a.config(&offer(), 7);
        assert_eq!((c.owner, c.persistent_pages, c.max_indirect_segments), (7, 32 * 33, 32));
    }

    #[test]
    fn several_queues_of_several_pages() {
        let mut keys: Vec<(String, String)> = vec![
            ("protocol".into(), "x86_32-abi".into()),
            ("ring-page-order".into(), "2".into()),
            ("multi-queue-num-queues".into(), "3".into()),
        ];
        for q in 0..3 {
            keys.push((format!("queue-{q}/event-channel"), format!("{}", 20 + q)));
            for p in 0..4 {
                keys.push((format!("queue-{q}/ring-ref{p}"), format!("{}", 100 + 10 * q + p)));
            }
        }
        let read =
            |key: &str| keys.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone().into_bytes());
        let a = agree(&offer(), read).unwrap();
        assert_eq!((a.abi, a.order, a.persistent, a.queues.len()), (Abi::X86_32, 2, false, 3));
        assert_eq!(a.queues[2], Queue { ring_refs: vec![120, 121, 122, 123], event_channel: 22 });
        assert_eq!(a.config(&offer(), 1).persistent_pages, 0);
        // One page missing.
        let without = |key: &str| read(key).filter(|_| key != "queue-1/ring-ref3");
        let e = agree(&offer(), without).unwrap_err();
        assert_eq!(e.to_string(), "frontend key queue-1/ring-ref3: is missing");
    }

    #[test]
    fn spellings_and_defaults() {
        for (more, order) in [
            (&[("ring-page-order", "0")][..], 0),
            (&[("num-ring-pages", "1")], 0),
            (&[("ring-ref0", "8"), ("ring-page-order", "0")], 0),
            (&[("ring-ref0", "8"), ("ring-ref1", "9"), ("num-ring-pages", "2")], 1),
            (&[("ring-ref0", "8"), ("ring-ref1", "9"), ("ring-page-order", "1")], 1),
            (&[("multi-queue-num-queues", "1")], 0),
        ] {
            assert_eq!(with(more).unwrap().order, order, "{more:?}");
        }
        for (protocol, abi) in
            [("x86_64-abi", Abi::X86_64), ("x86_32-abi", Abi::X86_32), ("arm-abi", Abi::X86_64)]
        {
            assert_eq!(with(&[("protocol", protocol)]).unwrap().abi, abi);
        }
        assert_eq!(agree_on(&LINUX[1..]).unwrap().abi, Abi::X86_32);
        assert!(!with(&[("feature-persistent", "0")]).unwrap().persistent);
        assert!(!agree_on(&LINUX[..3]).unwrap().persistent);
        // Offered by one side only.
        let read = |k: &str| LINUX.iter().find(|e| e.0 == k).map(|e| e.1.as_bytes().to_vec());
        assert!(!agree(&Offer { persistent: false, ..offer() }, read).unwrap().persistent);
    }

    #[test]
    fn wrong_keys_are_named() {
        use Problem::{Missing, NotANumber, OutOfRange, TooLong, Unknown};
        const ANY: Problem = OutOfRange(0, u32::MAX);
        for (key, value, problem) in [
            ("protocol", "", Unknown),
            ("protocol", "x86_64-abi ", Unknown),
            ("protocol", "X86_64-ABI", Unknown),
            ("protocol", "x86_64-abix86_64-abix86_64-abix86_64-abi", TooLong),
            ("ring-page-order", "3", OutOfRange(0, 2)),
            ("ring-page-order", "-1", NotANumber),
            ("ring-page-order", "", NotANumber),
            ("num-ring-pages", "0", OutOfRange(1, 4)),
            ("num-ring-pages", "3", OutOfRange(1, 4)),
            ("num-ring-pages", "8", OutOfRange(1, 4)),
            ("multi-queue-num-queues", "0", OutOfRange(1, 4)),
            ("multi-queue-num-queues", "5", OutOfRange(1, 4)),
            ("multi-queue-num-queues", "4294967297", OutOfRange(1, 4)),
            ("feature-persistent", "2", OutOfRange(0, 1)),
            ("feature-persistent", "yes", NotANumber),
            ("ring-ref", "4294967296", ANY),
            ("ring-ref", "99999999999999999999999999999999", ANY),
            ("ring-ref", "999999999999999999999999999999999", TooLong),
            ("ring-ref", "+8", NotANumber),
            ("ring-ref", " 8", NotANumber),
            ("ring-ref", "8\n", NotANumber),
            ("ring-ref", "0x8", NotANumber),
            ("ring-ref", "8\0", NotANumber),
            ("ring-ref0", "x", NotANumber),
            ("event-channel", "0", OutOfRange(1, u32::MAX)),
        ] {
            let expected = Refusal { key: key.into(), problem };
            assert_eq!(with(&[(key, value)]).unwrap_err(), expected, "{key} = {value:?}");
        }
        for key in ["ring-ref", "event-channel"] {
            let without: Vec<_> = LINUX.iter().copied().filter(|k| k.0 != key).collect();
            assert_eq!(
                agree_on(&without).unwrap_err(),
                Refusal { key: key.into(), problem: Missing }
            );
        }
        // Two queues look for their keys elsewhere.
        let e = with(&[("multi-queue-num-queues", "2")]).unwrap_err();
        assert_eq!((e.key.as_str(), e.problem), ("queue-0/ring-ref", Missing));
        // Two pages need numbers.
        let e = with(&[("ring-page-order", "1")]).unwrap_err();
        assert_eq!((e.key.as_str(), e.problem), ("ring-ref0", Missing));
    }

    #[test]
    fn what_is_written() {
        let find = |keys: Vec<(&'static str, String)>, key: &str| {
            keys.into_iter().find(|k| k.0 == key).map(|k| k.1)
        };
        let o = offer();
        let transport = |k: &str| find(o.transport_keys(), k);
        assert_eq!(transport("max-ring-page-order").as_deref(), Some("2"));
        assert_eq!(transport("max-ring-pages").as_deref(), Some("4"));
        assert_eq!(transport("multi-queue-max-queues").as_deref(), Some("4"));
        assert_eq!(transport("feature-max-indirect-segments").as_deref(), Some("32"));
        let none = Offer { max_indirect_segments: 0, ..offer() };
        assert_eq!(find(none.transport_keys(), "feature-max-indirect-segments"), None);
        for (key, value) in [
            ("feature-flush-cache", "1"),
            ("feature-barrier", "0"),
            ("feature-persistent", "1"),
            ("feature-discard", "1"),
            ("discard-granularity", "65536"),
            ("discard-alignment", "0"),
            ("discard-secure", "0"),
            ("sectors", "2097152"),
            ("sector-size", "512"),
            ("physical-sector-size", "4096"),
            ("info", "0"),
        ] {
            assert_eq!(find(o.device_keys(), key).as_deref(), Some(value), "{key}");
        }
        let ro = Offer { read_only: true, discard: None, ..offer() };
        assert_eq!(find(ro.device_keys(), "info").as_deref(), Some("4"));
        assert_eq!(find(ro.device_keys(), "feature-discard").as_deref(), Some("0"));
        assert_eq!(find(ro.device_keys(), "discard-granularity"), None);
    }

    #[test]
    fn a_disk_of_4_kib_blocks_is_offered_with_sectors_of_512_bytes() {
        let info = DeviceInfo {
            size: 1 << 30,
            block_size: 4096,
            physical_block_size: 4096,
            read_only: true,
            volatile_cache: true,
            write_zeroes: true,
            discard: true,
            discard_granularity: 4096,
            max_transfer: 1 << 20,
        };
        let o = Offer::new(&info);
        assert_eq!((o.sectors, o.sector_size, o.physical_sector_size), (1 << 21, 512, 4096));
        assert!(o.read_only);
    }
}
