//! What the loop sends, and what it makes of answers: a target in this process, whose time is made up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::{Distribution, Limits, Mix, Server, Sizes};
use super::*;

/// A disk in memory that answers after a given time, and may stop answering for a while. A microsecond
/// passes whenever it is asked for answers.
struct Fake {
    limits: Limits,
    disk: Vec<u8>,
    clock: Clock,
    time: Arc<AtomicU64>,
    /// Requests and when they are answered, in order.
    queue: VecDeque<(Request, Vec<u8>, u64)>,
    /// Nanoseconds that each takes.
    takes: u64,
    /// Answers nothing from the first to the second time, counted from the first request.
    stall: (u64, u64),
    began: Option<u64>,
    keep: bool,
    /// Of all requests, in order.
    log: Vec<Request>,
    deepest: usize,
    /// The request of this number fails.
    fails: Option<usize>,
    /// This byte is wrong when it is read.
    rotten: Option<usize>,
    /// It takes so many requests at a time.
    room: usize,
}

impl Fake {
    fn new() -> Fake {
        let size = 1 << 20;
        let limits = Limits {
            name: "fake".to_owned(),
            size,
            block: 512,
            max_len: 1 << 17,
            max_depth: 64,
            writable: true,
            flush: true,
            trim: true,
            patience: 200_000_000,
        };
        let (clock, time) = Clock::virtual_clock();
        Fake {
            limits,
            disk: vec![0; size as usize],
            clock,
            time,
            queue: VecDeque::new(),
            takes: 0,
            stall: (0, 0),
            began: None,
            keep: false,
            log: Vec::new(),
            deepest: 0,
            fails: None,
            rotten: None,
            room: usize::MAX,
        }
    }
}

impl Target for Fake {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, _: u32, _: u32, keep: bool) -> Result<(), Error> {
        self.keep = keep;
        Ok(())
    }

    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        if self.queue.len() >= self.room {
            return Ok(false);
        }
        let now = self.clock.now();
        self.began.get_or_insert(now);
        self.log.push(*request);
        let data = data.map(<[u8]>::to_vec).unwrap_or_default();
        self.queue.push_back((*request, data, now + self.takes));
        self.deepest = self.deepest.max(self.queue.len());
        Ok(true)
    }

    fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        let now = self.time.fetch_add(1000, Ordering::Relaxed);
        let since = self.began.map_or(0, |b| now - b);
        if (self.stall.0..self.stall.1).contains(&since) {
            return Ok(());
        }
        while let Some((request, data, at)) = self.queue.pop_front() {
            if at > now {
                self.queue.push_front((request, data, at));
                break;
            }
            let Request { slot, kind, offset, len } = request;
            let range = offset as usize..offset as usize + len as usize;
            let mut read = Vec::new();
            match kind {
                Kind::Write if !data.is_empty() => self.disk[range].copy_from_slice(&data),
                Kind::Read if self.keep => {
                    read.extend(&self.disk[range.clone()]);
                    if let Some(at) = self.rotten.filter(|at| range.contains(at)) {
                        read[at - range.start] ^= 0x10;
                    }
                }
                _ => {}
            }
            let answered = self.log.len() - self.queue.len() - 1;
            let error = (self.fails == Some(answered)).then_some(libc::EIO);
            done(Done { slot, error, data: &read });
        }
        Ok(())
    }
}

fn attempt(job: &Job, target: &mut Fake) -> Result<Outcome, String> {
    run_by(target.clock.clone(), job, target, None, &mut |_| {}).map_err(|e| e.to_string())
}

fn go(job: &Job, target: &mut Fake) -> Outcome {
    attempt(job, target).unwrap()
}

fn short() -> Job {
    Job { seconds: 0.2, ..Job::default() }
}

#[test]
fn so_many_requests_are_sent_so_deep() {
    let mut target = Fake::new();
    let (mix, shape) = (Mix { reads: 50, trims: 10 }, Shape::Depth(7));
    let sizes = Sizes(vec![(512, 50), (4096, 50)]);
    let job = Job { mix, shape, sizes, requests: Some(1000), seconds: 60.0, ..Job::default() };
    let o = go(&job, &mut target);
    assert_eq!((o.requests, target.log.len(), target.deepest, o.errors), (1000, 1000, 7, 0));
    assert_eq!(o.bytes, target.log.iter().map(|r| u64::from(r.len)).sum::<u64>());
    assert!(o.reads.is_some() && o.writes.is_some() && o.trims.is_some() && o.flushes.is_none());
    assert!(o.steady.is_none() && o.server == Server::default());
    // The same seed asks for the same; one after the other, so that slots are the same, too.
    let mut again = Fake::new();
    go(&job, &mut again);
    let place = |r: &Request| (r.kind, r.offset, r.len);
    assert!(target.log.iter().map(place).eq(again.log.iter().map(place)));
    // A target that has less room gets less, and everything all the same.
    let mut narrow = Fake { room: 3, ..Fake::new() };
    assert_eq!((go(&job, &mut narrow).requests, narrow.deepest), (1000, 3));
    assert!(target.log.iter().map(place).eq(narrow.log.iter().map(place)));
}

#[test]
fn a_ramp_is_not_counted_and_time_ends_a_job() {
    let mut target = Fake { takes: 100_000, ..Fake::new() };
    let job = Job { ramp: 0.1, ..short() };
    let o = go(&job, &mut target);
    assert!((1900..=2000).contains(&o.requests), "{}", o.requests);
    assert!((2850..=3001).contains(&target.log.len()), "{}", target.log.len());
    assert!((0.2..0.201).contains(&o.seconds) && o.windows.len() == 2, "{o:?}");
    assert!(o.windows.iter().all(|n| (950..=1000).contains(n)), "{o:?}");
    // Three digits.
    assert!(o.latency_ns.min >= 99_900 && o.latency_ns.max < 102_000, "{:?}", o.latency_ns);
}

#[test]
fn flushes_come_after_so_many_writes() {
    let mut target = Fake::new();
    let mix = Mix { reads: 30, trims: 0 };
    let (flush_every, requests) = (Some(5), Some(500));
    let o = go(&Job { mix, flush_every, requests, ..short() }, &mut target);
    let mut writes = 0;
    for r in &target.log {
        match r.kind {
            Kind::Write => writes += 1,
            Kind::Flush => assert_eq!(std::mem::take(&mut writes), 5),
            _ => assert!(writes <= 5),
        }
    }
    let flushes = target.log.iter().filter(|r| r.kind == Kind::Flush).count();
    assert!((50..=70).contains(&flushes), "{flushes}");
    assert_eq!((o.requests, target.log.len()), (500, 500 + flushes));
    assert!(o.flushes.is_some());
}

/// One that answers everything at once, but for a while in the middle nothing.
fn stalling() -> Fake {
    Fake { stall: (50_000_000, 150_000_000), ..Fake::new() }
}

#[test]
fn a_stall_is_seen_at_a_fixed_rate_and_hidden_without() {
    // One at a time: the stall is one slow request of very many.
    let closed = go(&short(), &mut stalling()).latency_ns;
    assert!(closed.p90 < 50_000_000 && closed.max >= 50_000_000, "{closed:?}");
    // 2,000 a second for 0.2 s: half of all are due while it stalls.
    let shape = Shape::Rate { per_second: 2000.0, depth: 1 };
    let mut target = stalling();
    let o = go(&Job { shape, ..short() }, &mut target);
    let open = o.latency_ns;
    assert!(open.p90 >= 60_000_000 && open.p50 < 60_000_000 && open.max >= 99_000_000, "{open:?}");
    // Each that was due was sent, and none that was not; at most one at a time.
    assert!((399..=401).contains(&target.log.len()), "{}", target.log.len());
    assert_eq!(target.deepest, 1);
}

#[test]
fn what_is_due_and_not_answered_at_the_end_counts() {
    // It answers nothing in the second half.
    let mut target = Fake { stall: (100_000_000, 250_000_000), ..Fake::new() };
    target.limits.patience = 10_000_000_000;
    let shape = Shape::Rate { per_second: 1000.0, depth: 4 };
    let o = go(&Job { shape, ..short() }, &mut target);
    assert!((99..=101).contains(&o.requests), "{}", o.requests);
    // Those of the second half waited for 50 to 150 ms, though all but 4 were never sent.
    let l = o.latency_ns;
    assert!(l.p90 >= 50_000_000 && l.p50 >= 1_000 && l.max >= 140_000_000, "{l:?}");
}

#[test]
fn errors_are_counted_and_too_many_end_it() {
    let mut target = Fake { fails: Some(10), ..Fake::new() };
    let o = go(&Job { requests: Some(100), ..short() }, &mut target);
    assert_eq!((o.requests, o.errors, target.log.len()), (99, 1, 100));
    struct Broken(Fake);
    impl Target for Broken {
        fn limits(&self) -> &Limits {
            &self.0.limits
        }
        fn prepare(&mut self, d: u32, l: u32, k: bool) -> Result<(), Error> {
            self.0.prepare(d, l, k)
        }
        fn send(&mut self, r: &Request, d: Option<&[u8]>) -> Result<bool, Error> {
            self.0.send(r, d)
        }
        fn poll(&mut self, w: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
            self.0.poll(w, &mut |d| done(Done { error: Some(libc::ENOSPC), ..d }))
        }
    }
    let job = Job { mix: Mix { reads: 0, trims: 0 }, seconds: 60.0, ..Job::default() };
    let mut target = Broken(Fake::new());
    let clock = target.0.clock.clone();
    let error = run_by(clock, &job, &mut target, None, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("1000 requests failed") && error.contains("No space"), "{error}");
}

#[test]
fn a_target_that_answers_nothing_is_given_up() {
    let mut target = Fake { stall: (0, u64::MAX), ..Fake::new() };
    let shape = Shape::Depth(3);
    let error = attempt(&Job { shape, ..Job::default() }, &mut target).unwrap_err();
    assert!(error.contains("none of 3 requests for 0.2 s"), "{error}");
}

fn verifying() -> Job {
    let sizes = Sizes(vec![(4096, 50), (8192, 50)]);
    let (mix, shape) = (Mix { reads: 40, trims: 10 }, Shape::Depth(8));
    Job { sizes, mix, shape, verify: Verify::Stamped, requests: Some(2000), ..Job::default() }
}

#[test]
fn what_was_written_is_read_back() {
    for distribution in [Distribution::Uniform, Distribution::Sequential, Distribution::Zipf(1.1)] {
        let mut target = Fake { takes: 1000, ..Fake::new() };
        let o = go(&Job { distribution, ..verifying() }, &mut target);
        assert_eq!((o.requests, o.errors), (2000, 0));
        assert!(o.verified_bytes >= 1 << 20, "{distribution:?}: {}", o.verified_bytes);
    }
}

#[test]
fn a_wrong_byte_is_found() {
    for at in [4096 * 77 + 3000, 4096 * 200, (1 << 20) - 1] {
        let mut target = Fake { rotten: Some(at), ..Fake::new() };
        let error = attempt(&verifying(), &mut target).unwrap_err();
        assert!(error.contains(&format!("byte {at} is wrong")), "{error}");
    }
    // Without verification nobody looks.
    let job = Job { verify: Verify::No, ..verifying() };
    let mut target = Fake { rotten: Some(4096), ..Fake::new() };
    assert_eq!(go(&job, &mut target).verified_bytes, 0);
}

#[test]
fn a_meter_sees_what_counts() {
    struct Calls(Vec<&'static str>, Arc<AtomicU64>);
    impl Meter for Calls {
        fn begin(&mut self) -> Result<(), Error> {
            self.0.push("begin");
            // Whatever it takes is not the target's fault.
            self.1.fetch_add(60_000_000, Ordering::Relaxed);
            Ok(())
        }
        fn end(&mut self) -> Result<(), Error> {
            self.0.push("end");
            Ok(())
        }
        fn figures(&mut self) -> Result<Server, Error> {
            self.0.push("figures");
            Ok(Server { syscalls: Some(7), ..Server::default() })
        }
    }
    for shape in [Shape::Depth(4), Shape::Rate { per_second: 1000.0, depth: 4 }] {
        let mut target = Fake::new();
        let (clock, mut meter) = (target.clock.clone(), Calls(Vec::new(), target.time.clone()));
        let job = Job { shape, ramp: 0.05, ..short() };
        let o = run_by(clock, &job, &mut target, Some(&mut meter), &mut |_| {}).unwrap();
        assert_eq!(meter.0, ["begin", "end", "figures"]);
        assert_eq!(o.server.syscalls, Some(7));
        assert!(o.latency_ns.max < 1_000_000, "{:?}", o.latency_ns);
    }
}

#[test]
fn impossible_jobs_are_refused() {
    let limits = Fake::new().limits;
    let bad = |job: Job, text: &str| {
        let error = job.check(&limits).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let sizes = |sizes: &[(u32, u8)]| Job { sizes: Sizes(sizes.to_vec()), ..Job::default() };
    bad(sizes(&[]), "add up to 0 %");
    bad(sizes(&[(4096, 60), (8192, 60)]), "add up to 120 %");
    bad(sizes(&[(0, 100)]), "requests of 0 bytes");
    bad(sizes(&[(513, 100)]), "multiples of 512");
    bad(sizes(&[(1 << 18, 100)]), "up to 131072");
    bad(sizes(&[(4096, 50), (6144, 50)]), "multiple of the smallest");
    bad(Job { offset: 1, ..Job::default() }, "offset 1");
    bad(Job { offset: 1 << 21, ..Job::default() }, "has 1048576 bytes");
    bad(Job { length: Some(u64::MAX), offset: 512, ..Job::default() }, "ends before");
    bad(Job { length: Some(512), ..Job::default() }, "must hold the largest");
    bad(Job { shape: Shape::Depth(0), ..Job::default() }, "depth 0: 1 to 64");
    bad(Job { shape: Shape::Depth(65), ..Job::default() }, "depth 65");
    let rate = |per_second| Job { shape: Shape::Rate { per_second, depth: 1 }, ..Job::default() };
    bad(rate(0.0), "requests a second");
    bad(rate(f64::NAN), "requests a second");
    let zipf = |theta| Job { distribution: Distribution::Zipf(theta), ..Job::default() };
    bad(zipf(0.0), "zipf:0");
    bad(zipf(f64::INFINITY), "zipf:inf");
    bad(Job { seconds: 0.0, ..Job::default() }, "time of 0 s");
    bad(Job { ramp: -1.0, ..Job::default() }, "ramp of -1 s");
    bad(Job { requests: Some(0), ..Job::default() }, "1 or more");
    bad(Job { mix: Mix { reads: 90, trims: 20 }, ..Job::default() }, "more than 100 %");
    bad(Job { flush_every: Some(1), ..Job::default() }, "flushes follow writes");
    bad(Job { verify: Verify::Stamped, ..Job::default() }, "writes nothing");
    bad(Job { sizes: Sizes(vec![(512, 100)]), ..verifying() }, "multiples of 4096");
    let poor = Limits { writable: false, flush: false, trim: false, ..limits.clone() };
    let write = Job { mix: Mix { reads: 0, trims: 0 }, ..Job::default() };
    let text = |job: &Job, l: &Limits| job.check(l).unwrap_err().to_string();
    assert!(text(&write, &poor).contains("cannot be written to"));
    let poor = Limits { writable: true, ..poor };
    assert!(text(&Job { flush_every: Some(1), ..write.clone() }, &poor).contains("no flushes"));
    assert!(
        text(&Job { mix: Mix { reads: 50, trims: 50 }, ..write }, &poor).contains("no discards")
    );
    assert_eq!(
        Job { offset: 4096, ..Job::default() }.check(&limits).unwrap(),
        (4096, (1 << 20) - 4096)
    );
}
