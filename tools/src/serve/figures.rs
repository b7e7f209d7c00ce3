//! [`Figures`]: what the reactors, the guests' disks and the exports over NBD have done up to now. All who
//! are told figures are told these: `ctl stats` and `top`, Prometheus, the toolstack's rrdd.

use std::sync::Arc;

use blkif::State;
use reactor::Distribution;
use serde_json::{Value, json};
use xen::store::{Error as StoreError, Nodes as _, Store};

use super::device::Id;
use super::devices::Devices;
use super::images::Images;
use super::repositories::Place;

/// Counters, which only grow while a disk is there, and what is now.
#[derive(Clone, Default, Debug)]
pub(crate) struct Io {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) errors: u64,
    /// Requests now.
    pub(crate) in_flight: u64,
    /// Their time in flight, of all requests together, in nanoseconds.
    pub(crate) in_flight_ns: u64,
    /// Of a fair sample where it is a ring: see [`blkif::Stats`].
    pub(crate) read_latency: Distribution,
    pub(crate) write_latency: Distribution,
}

impl Io {
    fn of_rings(rings: &[Arc<blkif::Stats>]) -> Io {
        let mut io = Io::default();
        for ring in rings {
            io.reads += ring.reads();
            io.writes += ring.writes();
            io.flushes += ring.flushes.get() + ring.barriers.get();
            io.discards += ring.discards.get();
            io.read_bytes += ring.read_bytes.get();
            io.written_bytes += ring.written_bytes.get();
            io.errors += ring.errors.get();
            io.in_flight += ring.in_flight.get();
            io.in_flight_ns += ring.in_flight_ns.get();
            io.read_latency += &ring.read_latency.read();
            io.write_latency += &ring.write_latency.read();
        }
        io
    }

    /// What was done since an earlier moment, and what is now. Counters that are smaller than they were
    /// have begun anew: a guest has connected again.
    pub(crate) fn since(&self, last: &Io) -> Io {
        let grown = |f: fn(&Io) -> u64| f(self).checked_sub(f(last)).unwrap_or(f(self));
        Io {
            reads: grown(|io| io.reads),
            writes: grown(|io| io.writes),
            flushes: grown(|io| io.flushes),
            discards: grown(|io| io.discards),
            read_bytes: grown(|io| io.read_bytes),
            written_bytes: grown(|io| io.written_bytes),
            errors: grown(|io| io.errors),
            in_flight: self.in_flight,
            in_flight_ns: grown(|io| io.in_flight_ns),
            read_latency: self.read_latency.since(&last.read_latency),
            write_latency: self.write_latency.since(&last.write_latency),
        }
    }

    /// Those of another disk besides.
    pub(crate) fn add(&mut self, other: &Io) {
        for (n, more) in [
            (&mut self.reads, other.reads),
            (&mut self.writes, other.writes),
            (&mut self.flushes, other.flushes),
            (&mut self.discards, other.discards),
            (&mut self.read_bytes, other.read_bytes),
            (&mut self.written_bytes, other.written_bytes),
            (&mut self.errors, other.errors),
            (&mut self.in_flight, other.in_flight),
            (&mut self.in_flight_ns, other.in_flight_ns),
        ] {
            *n = n.saturating_add(more);
        }
        self.read_latency += &other.read_latency;
        self.write_latency += &other.write_latency;
    }

    /// What all clients of a server have done.
    pub(crate) fn of_nbd(server: &::nbd::Server) -> Io {
        let (took, total) = (server.latencies(), server.totals().1);
        // Those who have left may have left requests without an end.
        let present = server.connections();
        let in_flight = present.iter().map(|c| c.counters.begun.saturating_sub(c.counters.ended));
        Io {
            reads: total.reads,
            writes: total.writes,
            flushes: total.flushes,
            discards: total.trims,
            read_bytes: total.read_bytes,
            written_bytes: total.written_bytes,
            errors: total.errors,
            in_flight: in_flight.sum(),
            in_flight_ns: took.read.sum().saturating_add(took.write.sum()),
            read_latency: took.read,
            write_latency: took.write,
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "reads": self.reads,
            "writes": self.writes,
            "flushes": self.flushes,
            "discards": self.discards,
            "read-bytes": self.read_bytes,
            "written-bytes": self.written_bytes,
            "errors": self.errors,
            "in-flight": self.in_flight,
            "in-flight-ns": self.in_flight_ns,
            "read-latency": distribution(&self.read_latency),
            "write-latency": distribution(&self.write_latency),
        })
    }
}

/// Pairs: where a bucket ends in nanoseconds, and how many requests are in it.
fn distribution(of: &Distribution) -> Value {
    json!({"sum-ns": of.sum(), "buckets": of.buckets().collect::<Vec<_>>()})
}

/// A guest's device as it was when its thread last looked; the counters of its rings go on.
#[derive(Clone, Debug)]
pub(crate) struct Vbd {
    pub(crate) id: Id,
    /// The disk's name in the guest, as "xvda".
    pub(crate) name: String,
    /// The guest's UUID, if there is a toolstack that gave it one.
    pub(crate) vm: Option<String>,
    pub(crate) image: Option<String>,
    pub(crate) state: State,
    pub(crate) rings: Vec<Arc<blkif::Stats>>,
}

impl Vbd {
    /// As it is listed, with each of its rings.
    pub(crate) fn as_json(&self) -> Value {
        json!({
            "domid": self.id.domid,
            "devid": self.id.devid,
            "vbd": self.name,
            "vm": self.vm,
            "image": self.image,
            "state": format!("{:?}", self.state),
            "rings": self.rings.iter().map(|stats| ring(stats)).collect::<Value>(),
        })
    }
}

fn ring(stats: &blkif::Stats) -> Value {
    json!({
        "reads": stats.reads(),
        "writes": stats.writes(),
        "flushes": stats.flushes.get(),
        "discards": stats.discards.get(),
        "read-bytes": stats.read_bytes.get(),
        "written-bytes": stats.written_bytes.get(),
        "page-hits": stats.page_hits(),
        "page-misses": stats.page_misses.get(),
        "copy-batches": stats.copy_batches.get(),
        "events": stats.events.get(),
        "errors": stats.errors.get(),
        "bad-requests": stats.bad_requests.get(),
        "in-flight": stats.in_flight.get(),
    })
}

/// The guest's UUID, if the toolstack says it: where `vm` of the domain points to. While a guest migrates
/// its domain has one of two others, beside which stands the real one (as xcp-rrdd-iostat has it).
pub(crate) fn vm_of(store: &Store, domid: u16) -> Result<Option<String>, StoreError> {
    let uuid = |value: Option<Vec<u8>>| -> Option<String> {
        let text = String::from_utf8(value?).ok()?;
        let last = text.rsplit('/').next()?;
        uuid::Uuid::try_parse(last).ok().filter(|_| last.len() == 36).map(|_| last.to_owned())
    };
    let Some(vm) = uuid(store.read(format!("/local/domain/{domid}/vm"))?) else { return Ok(None) };
    let real = match &vm[24..] {
        "000000000000" => "origin-uuid",
        "000000000001" => "final-uuid",
        _ => return Ok(Some(vm)),
    };
    Ok(uuid(store.read(format!("/vm/{vm}/{real}"))?).or(Some(vm)))
}

/// The name of a disk in a guest by its number (Xen's docs/man/xen-vbd-interface.7), as the toolstack
/// names it: the Xen disks whole, others' by their number.
pub(crate) fn vbd_name(devid: u32) -> String {
    let (disk, partition) = match devid {
        0xca00..=0xcaff => (devid >> 4 & 0xf, devid & 0xf),
        0x1000_0000..=0x1fff_ffff => (devid >> 8 & 0xf_ffff, devid & 0xff),
        _ => return devid.to_string(),
    };
    // Base 26 without a zero: a to z, aa, ab, …
    let mut letters = Vec::new();
    let mut rest = disk + 1;
    while rest > 0 {
        letters.insert(0, char::from(b'a' + ((rest - 1) % 26) as u8));
        rest = (rest - 1) / 26;
    }
    let letters: String = letters.into_iter().collect();
    match partition {
        0 => format!("xvd{letters}"),
        n => format!("xvd{letters}{n}"),
    }
}

/// Who uses a disk.
#[derive(Clone, Debug)]
pub(crate) enum User {
    /// A guest, by its device.
    Guest { id: Id, name: String, vm: Option<String> },
    /// Clients of NBD, all together.
    Nbd,
}

/// An image as one of its users sees it.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) image: String,
    /// The UUID of the repository that it is in, if it is in one.
    pub(crate) sr: Option<String>,
    pub(crate) user: User,
    pub(crate) io: Io,
}

impl Disk {
    fn as_json(&self) -> Value {
        let mut disk = self.io.as_json();
        disk["image"] = json!(self.image);
        disk["sr"] = json!(self.sr);
        match &self.user {
            User::Nbd => disk["frontend"] = json!("nbd"),
            User::Guest { id, name, vm } => {
                disk["frontend"] = json!("blkif");
                disk["domid"] = json!(id.domid);
                disk["devid"] = json!(id.devid);
                disk["vbd"] = json!(name);
                disk["vm"] = json!(vm);
            }
        }
        disk
    }
}

/// What a reactor has done.
#[derive(Clone, Debug)]
pub(crate) struct OfReactor {
    pub(crate) turns: u64,
    pub(crate) idle_turns: u64,
    pub(crate) sleeps: u64,
    pub(crate) completions: u64,
    pub(crate) strays: u64,
    pub(crate) busy_ns: u64,
    pub(crate) idle_ns: u64,
}

impl OfReactor {
    fn of(stats: &reactor::Stats) -> OfReactor {
        OfReactor {
            turns: stats.turns.get(),
            idle_turns: stats.idle_turns.get(),
            sleeps: stats.sleeps.get(),
            completions: stats.completions.get(),
            strays: stats.strays.get(),
            busy_ns: stats.busy_ns.get(),
            idle_ns: stats.idle_ns.get(),
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "turns": self.turns,
            "idle-turns": self.idle_turns,
            "sleeps": self.sleeps,
            "completions": self.completions,
            "busy-ns": self.busy_ns,
            "idle-ns": self.idle_ns,
            "strays": self.strays,
        })
    }
}

/// Who says the figures as they are now.
pub(crate) type Source = Box<dyn Fn() -> Figures + Send + Sync>;

/// All of it, at about one moment: nobody stands still for it.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// By number.
    pub(crate) reactors: Vec<OfReactor>,
    /// Guests' disks, then exports.
    pub(crate) disks: Vec<Disk>,
}

impl Figures {
    pub(crate) fn of(images: &Images, devices: Option<&Devices>) -> Figures {
        let reactors = images.reactors().iter().map(|r| OfReactor::of(r.stats())).collect();
        let vbds = devices.map(Devices::list).unwrap_or_default();
        let guests = vbds.into_iter().filter_map(|vbd| {
            let Vbd { id, name, vm, image, rings, .. } = vbd;
            Some((image?, User::Guest { id, name, vm }, Io::of_rings(&rings)))
        });
        let exports = images.nbd_io().into_iter().map(|(image, io)| (image, User::Nbd, io));
        let disks = guests.chain(exports).map(|(image, user, io)| {
            let place = images.disk(&image);
            let sr = place.as_ref().and_then(Place::repository).map(str::to_owned);
            Disk { image, sr, user, io }
        });
        Figures { reactors, disks: disks.collect() }
    }

    pub(crate) fn as_json(&self) -> Value {
        json!({
            "reactors": self.reactors.iter().map(OfReactor::as_json).collect::<Value>(),
            "disks": self.disks.iter().map(Disk::as_json).collect::<Value>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::vbd_name;

    #[test]
    fn disks_have_the_names_that_guests_give_them() {
        for (devid, name) in [
            (51712, "xvda"),
            (51713, "xvda1"),
            (51728, "xvdb"),
            (51952, "xvdp"),
            (1 << 28 | 16 << 8, "xvdq"),
            (1 << 28 | 26 << 8 | 3, "xvdaa3"),
            (1 << 28 | 701 << 8, "xvdzz"),
            (1 << 28 | 702 << 8, "xvdaaa"),
            (768, "768"),
            (0, "0"),
            (u32::MAX, "4294967295"),
        ] {
            assert_eq!(vbd_name(devid), name, "{devid}");
        }
    }
}
