//! Loads one device through its leaf queue: 4 KiB at random, as deep as asked, from one thread that
//! does nothing else. Says what the device gave, and what the driver cost.
//!
//! Against a slow target nearly every poll is empty, so time per request says nothing about the
//! driver. Its cost is fitted: over many short slices with more or fewer polls for each request,
//! `cycles = empty polls × a + requests × b`.

use std::sync::Arc;

use block::{BlockQueue, Completions, Flags, LeafAccess, Op, Request, Submit, Tag};
use dma::Region;
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use node::{Leaf, Parts};
use reactor::Clock;
use serde::Serialize;

use crate::{Error, Latency};

/// Bytes of each request.
const BYTES: u32 = 4096;

/// Deepest load; the queue may give less room.
pub const MAX_DEPTH: usize = 1024;

/// Length of a slice in nanoseconds.
const SLICE: u64 = 10_000_000;

/// Polls without new requests after each turn that submitted some, slice by slice: what makes the
/// slices differ, so that two costs can be told apart.
const PAUSES: [u32; 4] = [0, 8, 64, 400];

/// What to do to the device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requests in flight: 1 to [`MAX_DEPTH`].
    pub depth: usize,
    /// Write, which overwrites what the device holds; else read.
    pub write: bool,
    /// How long, in seconds.
    pub seconds: f64,
    /// The processor to run on.
    pub core: Option<usize>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `randread` or `randwrite`.
    pub rw: &'static str,
    /// Requests in flight.
    pub depth: usize,
    /// Of the main part, in seconds.
    pub seconds: f64,
    /// Requests per second in the main part.
    pub iops: f64,
    /// From submission to completion, in nanoseconds.
    pub latency_ns: Latency,
    /// Requests completed in the main part.
    pub requests: u64,
    /// Polls of the queue in the main part.
    pub polls: u64,
    /// Of these, polls that found nothing.
    pub empty_polls: u64,
    /// Writes of the submission queue's doorbell register in the main part; null for what is no
    /// NVMe queue.
    pub sq_doorbells: Option<u64>,
    /// The same of the completion queue's.
    pub cq_doorbells: Option<u64>,
    /// Cycles of the time stamp counter that a request costs this thread, its share of polls that
    /// found something included; null if the slices do not tell.
    pub cycles_per_request: Option<f64>,
    /// Cycles of a poll that finds nothing, with the loop around it.
    pub cycles_per_empty_poll: Option<f64>,
    /// How far the fit is off, as a share of a slice's time (root mean square).
    pub fit_error: Option<f64>,
    /// Slices behind the fit.
    pub fit_slices: usize,
    /// Times that the scheduler took the processor from this thread.
    pub involuntary_switches: u64,
    /// Time that the hypervisor gave to others, in milliseconds over all processors; null if the
    /// kernel does not say.
    pub steal_ms: Option<u64>,
}

/// Runs it on the calling thread.
///
/// # Errors
/// If the device is too small, a request fails, or the thread cannot run where it should.
pub fn run(parts: Parts, options: &Options) -> Result<Report, Error> {
    if let Some(core) = options.core {
        reactor::pin_current_thread(core).map_err(Error::other)?;
    }
    let (mut leaf, unit, rest) = parts.into_leaf();
    let result = load(&mut leaf, unit, options);
    drop(leaf);
    let report = result?;
    rest.finish_leaf()?;
    Ok(report)
}

fn load(leaf: &mut Leaf, unit: u16, options: &Options) -> Result<Report, Error> {
    let clock = Clock::real();
    let mut load = Load::new(leaf, unit, options.depth, options.write)?;
    let (switches, steal) = (switches()?, steal_ms());
    let total = (options.seconds * 1e9) as u64;
    // Warm up, then measure: three fifths for the rate, one for latencies, one for the fit.
    load.slice(&clock, (total / 20).min(100_000_000), 0, None)?;
    if load.peak < options.depth {
        return Err(Error::other(format!("the queue takes {} requests at most", load.peak)));
    }
    let before = load.leaf.nvme_stats();
    let main = load.slice(&clock, total * 3 / 5, 0, None)?;
    let after = load.leaf.nvme_stats();
    let bells = |of: fn(&node::QueueStats) -> u64| Some(of(&after?) - of(&before?));
    // Up to a minute: what takes longer has been given up by the driver.
    let mut latencies = Histogram::new_with_max(60_000_000_000, 3).map_err(Error::other)?;
    load.slice(&clock, total / 5, 0, Some(&mut latencies))?;
    let mut slices = Vec::new();
    let end = clock.now() + total / 5;
    while clock.now() < end || slices.len() < 2 * PAUSES.len() {
        let pause = PAUSES[slices.len() % PAUSES.len()];
        slices.push(load.slice(&clock, SLICE, pause, None)?);
    }
    load.drain(&clock)?;
    let fit = clock.ticks_per_ns().and_then(|rate| fit(&slices, rate));
    Ok(Report {
        rw: if options.write { "randwrite" } else { "randread" },
        depth: options.depth,
        seconds: main.ns as f64 / 1e9,
        iops: main.requests as f64 * 1e9 / main.ns as f64,
        latency_ns: Latency::of(&latencies),
        requests: main.requests,
        polls: main.polls,
        empty_polls: main.empty_polls,
        sq_doorbells: bells(|s| s.sq_doorbells),
        cq_doorbells: bells(|s| s.cq_doorbells),
        cycles_per_request: fit.map(|f| f.request),
        cycles_per_empty_poll: fit.map(|f| f.empty_poll),
        fit_error: fit.map(|f| f.error),
        fit_slices: fit.map_or(0, |f| f.slices),
        involuntary_switches: self::switches()?.saturating_sub(switches),
        steal_ms: steal_ms().zip(steal).map(|(b, a)| b.saturating_sub(a)),
    })
}

/// What happened in a slice of time.
#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    ns: u64,
    polls: u64,
    empty_polls: u64,
    requests: u64,
}

/// A device under load.
pub(crate) struct Load<'a> {
    leaf: &'a mut Leaf,
    unit: u16,
    op: Op,
    data: Arc<Region>,
    blocks: u64,
    random: u64,
    /// Slots that are free, and when each was last sent.
    free: Vec<u16>,
    sent: Vec<u64>,
    generation: u32,
    /// Most requests that were in flight.
    peak: usize,
    out: Completions,
}

impl<'a> Load<'a> {
    /// 4 KiB at random, reads or writes, `depth` in flight.
    pub(crate) fn new(
        leaf: &'a mut Leaf,
        unit: u16,
        depth: usize,
        write: bool,
    ) -> Result<Load<'a>, Error> {
        let info = leaf.info(unit).ok_or_else(|| Error::other("the device has no such unit"))?;
        // A file may grow; what is measured is what it has.
        let blocks = info.size.min(leaf.unit_len(unit)) / u64::from(BYTES);
        if blocks == 0 {
            return Err(Error::other("the device is smaller than 4 KiB"));
        }
        let depth = depth.clamp(1, MAX_DEPTH);
        let data = Region::new_best(depth * BYTES as usize).map_err(Error::other)?;
        leaf.register(&data).map_err(Error::other)?;
        Ok(Load {
            leaf,
            unit,
            op: if write { Op::Write } else { Op::Read },
            data,
            blocks,
            random: 0x9e37_79b9_7f4a_7c15,
            free: (0..depth as u16).collect(),
            sent: vec![0; depth],
            generation: 0,
            peak: 0,
            out: Completions::new(),
        })
    }

    /// Keeps the device busy for so many nanoseconds, with so many polls between one turn that
    /// submits and the next.
    #[inline(never)]
    fn slice(
        &mut self,
        clock: &Clock,
        ns: u64,
        pause: u32,
        mut latencies: Option<&mut Histogram<u64>>,
    ) -> Result<Slice, Error> {
        let began = clock.now();
        let mut s = Slice::default();
        let mut wait = 0;
        loop {
            let now = clock.now();
            if now - began >= ns {
                s.ns = now - began;
                return Ok(s);
            }
            s.polls += 1;
            let n = self.poll(now, latencies.as_deref_mut())?;
            s.requests += n as u64;
            s.empty_polls += u64::from(n == 0);
            if wait > 0 {
                wait -= 1;
            } else if !self.free.is_empty() {
                self.submit(now);
                wait = pause;
            }
        }
    }

    /// Takes what completed.
    #[inline]
    pub(crate) fn poll(
        &mut self,
        now: u64,
        latencies: Option<&mut Histogram<u64>>,
    ) -> Result<usize, Error> {
        self.leaf.set_now(now);
        self.out.clear();
        let n = self.leaf.poll(&mut self.out);
        if n == 0 {
            return Ok(0);
        }
        for c in self.out.iter() {
            if !c.status.is_ok() {
                let (status, detail) = (c.status, c.detail);
                return Err(Error::other(format!("a request failed: {status} ({detail:#x})")));
            }
            self.free.push(c.tag.slot());
        }
        if let Some(h) = latencies {
            for c in self.out.iter() {
                h.saturating_record(now - self.sent[usize::from(c.tag.slot())]);
            }
        }
        Ok(n)
    }

    /// Sends on every free slot, as far as the queue has room.
    #[inline]
    pub(crate) fn submit(&mut self, now: u64) {
        while self.leaf.room() > 0
            && let Some(slot) = self.free.pop()
        {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let block = (u128::from(self.random) * u128::from(self.blocks)) >> 64;
            self.generation = self.generation.wrapping_add(1);
            let seg = self.data.seg(u64::from(slot) * u64::from(BYTES), BYTES);
            let request = Request {
                tag: Tag::new(0, slot, self.generation),
                op: self.op,
                flags: Flags::NONE,
                unit: self.unit,
                offset: block as u64 * u64::from(BYTES),
                len: BYTES.into(),
                segs: seg.as_slice(),
            };
            // It has room, so it takes it.
            let _ = self.leaf.submit(&request);
            self.sent[usize::from(slot)] = now;
        }
        self.leaf.start();
        self.peak = self.peak.max(self.sent.len() - self.free.len());
    }

    /// Waits for everything in flight.
    pub(crate) fn drain(&mut self, clock: &Clock) -> Result<(), Error> {
        while self.leaf.in_flight() > 0 {
            self.poll(clock.now(), None)?;
        }
        Ok(())
    }
}

/// What the slices say.
#[derive(Clone, Copy, Debug)]
struct Fit {
    request: f64,
    empty_poll: f64,
    error: f64,
    slices: usize,
}

/// Least squares; once more without the slices that are far off, in which the thread did not run
/// all the time. `None` if the slices are too much alike.
fn fit(slices: &[Slice], ticks_per_ns: f64) -> Option<Fit> {
    let rows: Vec<[f64; 3]> = slices
        .iter()
        .map(|s| [s.empty_polls as f64, s.requests as f64, s.ns as f64 * ticks_per_ns])
        .collect();
    let off = |[e, r, t]: [f64; 3], (a, b): (f64, f64)| (e * a + r * b - t) / t;
    let first = solve(&rows)?;
    let mut far: Vec<f64> = rows.iter().map(|&row| off(row, first).abs()).collect();
    far.sort_by(f64::total_cmp);
    let limit = 3.0 * far[far.len() / 2];
    let kept: Vec<_> = rows.iter().copied().filter(|&row| off(row, first).abs() <= limit).collect();
    let last = solve(&kept)?;
    let square: f64 = kept.iter().map(|&row| off(row, last).powi(2)).sum();
    let error = (square / kept.len() as f64).sqrt();
    let (empty_poll, request) = last;
    (empty_poll > 0.0 && request > 0.0).then_some(Fit {
        request,
        empty_poll,
        error,
        slices: kept.len(),
    })
}

/// `a` and `b` with the least squares of `e × a + r × b − t`.
fn solve(rows: &[[f64; 3]]) -> Option<(f64, f64)> {
    let sum = |f: fn(&[f64; 3]) -> f64| rows.iter().map(f).sum::<f64>();
    let (ee, er, rr) = (sum(|x| x[0] * x[0]), sum(|x| x[0] * x[1]), sum(|x| x[1] * x[1]));
    let (et, rt) = (sum(|x| x[0] * x[2]), sum(|x| x[1] * x[2]));
    let determinant = ee * rr - er * er;
    // Relative to what it would be if the two had nothing in common.
    if determinant <= 1e-6 * ee * rr {
        return None;
    }
    Some(((et * rr - rt * er) / determinant, (rt * ee - et * er) / determinant))
}

fn switches() -> Result<u64, Error> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).map_err(Error::other)?;
    Ok(usage.involuntary_context_switches().unsigned_abs())
}

/// Time stolen from all processors so far.
fn steal_ms() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // cpu user nice system idle iowait irq softirq steal, in hundredths of a second (proc(5)).
    let ticks: u64 = stat.lines().next()?.split_whitespace().nth(8)?.parse().ok()?;
    Some(ticks * 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use node::{NodeSpec, OpenOptions};
    use qcow::open::Format;

    #[test]
    fn the_fit_finds_the_two_costs_and_drops_what_was_disturbed() {
        let mut slices: Vec<Slice> = (1..=20u64)
            .map(|i| {
                let (empty_polls, requests) = (1000 * (i % 5), 500 + 10 * i);
                let ns = (empty_polls * 90 + requests * 240) / 2;
                Slice { ns, polls: empty_polls + requests, empty_polls, requests }
            })
            .collect();
        slices[7].ns *= 3;
        let fit = fit(&slices, 2.0).unwrap();
        assert!((fit.request - 240.0).abs() < 2.0, "{fit:?}");
        assert!((fit.empty_poll - 90.0).abs() < 2.0, "{fit:?}");
        assert!(fit.error < 0.01 && fit.slices < 20, "{fit:?}");
    }

    #[test]
    fn slices_that_are_all_alike_tell_nothing() {
        let s = Slice { ns: 1000, polls: 20, empty_polls: 10, requests: 10 };
        assert!(fit(&[s; 10], 2.0).is_none());
        assert!(fit(&[Slice { empty_polls: 0, ..s }; 10], 2.0).is_none());
    }

    #[test]
    fn a_device_is_loaded_and_counted() {
        let spec = NodeSpec::parse("mem:1M").unwrap();
        let chain = node::open_chain(&spec, &OpenOptions::write(Format::Raw)).unwrap();
        let options = Options { depth: 7, write: true, seconds: 0.1, core: None };
        let report = run(Parts::new(chain).unwrap(), &options).unwrap();
        assert!(report.requests >= 7 && report.polls >= report.empty_polls, "{report:?}");
        assert!(report.iops > 0.0 && report.latency_ns.p999 >= report.latency_ns.p50);
        assert_eq!((report.sq_doorbells, report.rw), (None, "randwrite"));
    }

    #[test]
    fn a_file_is_loaded_within_its_length() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let spec = NodeSpec::File(file.path().to_path_buf());
        let chain = node::open_chain(&spec, &OpenOptions::write(Format::Raw)).unwrap();
        let options = Options { depth: 4, write: true, seconds: 0.1, core: None };
        let report = run(Parts::new(chain).unwrap(), &options).unwrap();
        assert!(report.requests >= 4, "{report:?}");
        assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_model_is_loaded_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let spec = NodeSpec::parse(&format!("model:{}", path.display())).unwrap();
        let chain = node::open_chain(&spec, &OpenOptions::read(Format::Raw)).unwrap();
        let options = Options { depth: 4, write: false, seconds: 0.2, core: None };
        let report = run(Parts::new(chain).unwrap(), &options).unwrap();
        let (sq, cq) = (report.sq_doorbells.unwrap(), report.cq_doorbells.unwrap());
        assert!(sq > 0 && sq <= report.requests + 4, "{report:?}");
        assert!(cq > 0 && cq <= report.polls - report.empty_polls + 1, "{report:?}");
    }
}
