//! [`Stats`], what the daemon tells, and [`Rates`], what follows from two of them.

use std::collections::HashMap;

use reactor::Distribution;
use serde::Deserialize;
use serde_json::{Value, json};

/// Counters of the daemon: the answer to `stats`.
#[derive(Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Stats {
    reactors: Vec<OfReactor>,
    disks: Vec<OfDisk>,
}

#[derive(Clone, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct OfReactor {
    turns: u64,
    sleeps: u64,
    busy_ns: u64,
    idle_ns: u64,
}

/// Which disk: an image and who uses it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Which {
    pub(super) image: String,
    pub(super) frontend: String,
    pub(super) domid: Option<u16>,
    pub(super) devid: Option<u32>,
    pub(super) vbd: Option<String>,
    pub(super) vm: Option<String>,
}

#[derive(Clone, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct OfDisk {
    #[serde(flatten)]
    which: Which,
    reads: u64,
    writes: u64,
    read_bytes: u64,
    written_bytes: u64,
    errors: u64,
    in_flight: u64,
    in_flight_ns: u64,
    read_latency: Latency,
    write_latency: Latency,
}

#[derive(Clone, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
struct Latency {
    /// Where each ends in nanoseconds, and how many are in it.
    buckets: Vec<(u64, u64)>,
}

impl Latency {
    fn distribution(&self) -> Distribution {
        let mut all = Distribution::default();
        self.buckets.iter().for_each(|&(end, count)| all.put(end, count));
        all
    }
}

/// What a reactor did in an interval.
#[derive(Debug)]
pub(super) struct Reactor {
    /// From 0 to 1.
    pub(super) busy: f64,
    pub(super) turns: f64,
    pub(super) sleeps: f64,
}

/// Requests of one kind in an interval; times in nanoseconds, if there were any.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) iops: f64,
    pub(super) bytes: f64,
    pub(super) p50: Option<u64>,
    pub(super) p99: Option<u64>,
    pub(super) p999: Option<u64>,
}

/// What a disk did in an interval.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) which: Which,
    pub(super) read: Kind,
    pub(super) write: Kind,
    /// Requests in flight: now, and on average.
    pub(super) in_flight: u64,
    pub(super) depth: f64,
    /// In all.
    pub(super) errors: u64,
}

/// What all did in an interval.
#[derive(Debug)]
pub(super) struct Rates {
    pub(super) seconds: f64,
    pub(super) reactors: Vec<Reactor>,
    /// Those with the most requests first.
    pub(super) disks: Vec<Disk>,
}

/// The growth of a counter in a second. One that is smaller than it was has begun anew.
fn rate(now: u64, then: u64, seconds: f64) -> f64 {
    now.checked_sub(then).unwrap_or(now) as f64 / seconds
}

impl Kind {
    fn of(iops: f64, bytes: f64, times: &Distribution) -> Kind {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| times.quantile(share));
        Kind { iops, bytes, p50, p99, p999 }
    }

    fn as_json(&self) -> Value {
        json!({
            "iops": self.iops,
            "bytes-per-s": self.bytes,
            "p50-ns": self.p50,
            "p99-ns": self.p99,
            "p999-ns": self.p999,
        })
    }
}

impl Disk {
    fn between(then: &OfDisk, now: &OfDisk, seconds: f64) -> Disk {
        let of = |f: fn(&OfDisk) -> u64| rate(f(now), f(then), seconds);
        let took =
            |f: fn(&OfDisk) -> &Latency| f(now).distribution().since(&f(then).distribution());
        Disk {
            which: now.which.clone(),
            read: Kind::of(of(|d| d.reads), of(|d| d.read_bytes), &took(|d| &d.read_latency)),
            write: Kind::of(of(|d| d.writes), of(|d| d.written_bytes), &took(|d| &d.write_latency)),
            in_flight: now.in_flight,
            depth: of(|d| d.in_flight_ns) / 1e9,
            errors: now.errors,
        }
    }

    pub(super) fn iops(&self) -> f64 {
        self.read.iops + self.write.iops
    }

    fn as_json(&self) -> Value {
        json!({
            "image": self.which.image,
            "frontend": self.which.frontend,
            "domid": self.which.domid,
            "devid": self.which.devid,
            "vbd": self.which.vbd,
            "vm": self.which.vm,
            "read": self.read.as_json(),
            "write": self.write.as_json(),
            "in-flight": self.in_flight,
            "queue-depth": self.depth,
            "errors": self.errors,
        })
    }
}

impl Rates {
    /// Between two moments that are so many nanoseconds apart.
    pub(super) fn between(then: &Stats, now: &Stats, passed_ns: u64) -> Rates {
        let seconds = passed_ns.max(1) as f64 / 1e9;
        let reactors = now.reactors.iter().enumerate().map(|(n, now)| {
            let then = then.reactors.get(n).unwrap_or(now);
            let of = |f: fn(&OfReactor) -> u64| rate(f(now), f(then), seconds);
            let (busy, idle) = (of(|r| r.busy_ns), of(|r| r.idle_ns));
            // A reactor adds up in turns, of which one may be longer than the interval.
            let busy = if busy + idle > 0.0 { busy / (busy + idle) } else { 0.0 };
            Reactor { busy, turns: of(|r| r.turns), sleeps: of(|r| r.sleeps) }
        });
        let before: HashMap<_, _> = then.disks.iter().map(|disk| (&disk.which, disk)).collect();
        // Of one that has just come nothing is known of before.
        let disks = now.disks.iter().map(|disk| {
            Disk::between(before.get(&disk.which).copied().unwrap_or(disk), disk, seconds)
        });
        let mut disks: Vec<Disk> = disks.collect();
        disks.sort_by(|a, b| b.iops().total_cmp(&a.iops()).then_with(|| a.which.cmp(&b.which)));
        Rates { seconds, reactors: reactors.collect(), disks }
    }

    pub(super) fn as_json(&self) -> Value {
        let reactors = self
            .reactors
            .iter()
            .map(|r| json!({"busy": r.busy, "turns-per-s": r.turns, "sleeps-per-s": r.sleeps}));
        json!({
            "seconds": self.seconds,
            "reactors": reactors.collect::<Value>(),
            "disks": self.disks.iter().map(Disk::as_json).collect::<Value>(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A daemon with disks named so, each with so many reads and writes of 4 KiB.
    pub(crate) fn stats(disks: &[(&str, u64, u64)], busy_ns: u64) -> Stats {
        let disks = disks.iter().map(|&(image, reads, writes)| {
            json!({
                "image": image, "frontend": "blkif", "domid": 3, "devid": 51712, "vbd": "xvda",
                "reads": reads, "writes": writes, "flushes": 0, "discards": 0,
                "read-bytes": reads * 4096, "written-bytes": writes * 4096, "errors": 1,
                "in-flight": 2, "in-flight-ns": reads * 1_000_000,
                "read-latency": {"sum-ns": 0, "buckets": [[9216, reads], [1_048_576, reads / 100]]},
                "write-latency": {"sum-ns": 0, "buckets": []},
            })
        });
        let reactor = json!({"turns": busy_ns, "sleeps": 4, "busy-ns": busy_ns, "idle-ns": 1000});
        let told = json!({"reactors": [reactor], "disks": disks.collect::<Value>(), "devices": []});
        Stats::deserialize(told).unwrap()
    }

    #[test]
    fn rates_are_differences_and_the_busiest_comes_first() {
        let then = stats(&[("a", 1000, 10), ("b", 0, 0), ("gone", 5, 5)], 0);
        let now = stats(&[("a", 2000, 20), ("b", 90_000, 0), ("new", 70, 7)], 3000);
        let rates = Rates::between(&then, &now, 2_000_000_000);
        let names: Vec<_> = rates.disks.iter().map(|d| d.which.image.as_str()).collect();
        assert_eq!(names, ["b", "a", "new"]);
        let [b, a, new] = &rates.disks[..] else { panic!() };
        assert_eq!((a.read.iops, a.write.iops, a.read.bytes), (500.0, 5.0, 500.0 * 4096.0));
        assert_eq!((b.depth, b.in_flight, b.errors), (45.0, 2, 1));
        assert_eq!(b.read.p50, Some(9216));
        assert!(b.read.p999.unwrap() >= 1_048_576 && b.write.p50.is_none());
        assert_eq!((new.iops(), new.read.p50), (0.0, None));
        assert_eq!((rates.reactors[0].busy, rates.reactors[0].sleeps), (1.0, 0.0));
    }

    #[test]
    fn counters_that_begin_anew_are_no_huge_rates() {
        let then = stats(&[("a", 1000, 10)], 900);
        let now = stats(&[("a", 10, 1)], 100);
        let rates = Rates::between(&then, &now, 1_000_000_000);
        assert_eq!((rates.disks[0].read.iops, rates.disks[0].write.iops), (10.0, 1.0));
        assert_eq!(rates.disks[0].read.p50, Some(9216));
        assert!(rates.as_json()["disks"][0]["read"]["p999-ns"].is_u64());
        // No time has passed, or no daemon of ours tells it.
        assert!(Rates::between(&then, &now, 0).disks[0].read.iops.is_finite());
        assert!(Stats::deserialize(&json!({"reactors": []})).is_err());
    }
}
