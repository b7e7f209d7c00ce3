//! [`Runner`]: starts what a setup asks for, sends it a case's jobs, and ends it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bench::Error;
use bench::run::meter::{Costs, Counts};
use bench::run::{
    Direct, Distribution, Job, Meter, Mix, Nbd, Outcome, Ring, RingOptions, Shape, Sizes, Target,
    run,
};
use nix::time::{ClockId, clock_gettime};
use node::{NodeSpec, Reactors};
use reactor::{Clock, Policy, Start};

use crate::flame::Sampler;
use crate::images::{Format, Images};
use crate::many::Many;
use crate::peer::drive::KernelDrive;
use crate::peer::{self, Place, Process, Setup, done_within, fio, spdk};
use crate::profiles::{Content, Disk};
use crate::results::Frontend;
use crate::round::Options;
use crate::split::Split;

/// How long a server may answer nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a tool may take beside the time of its job.
const TOOL: f64 = 60.0;

/// What a ring takes in one request, in bytes.
const PART: u32 = 128 << 10;

/// What a pass is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pass {
    /// Times and processor time.
    Measure,
    /// System calls and instructions, which slow the server down.
    Count,
    /// Stacks.
    Sample,
}

/// Why a pass failed.
pub(crate) struct Failure {
    /// The server had begun to serve.
    pub(crate) began: bool,
    pub(crate) error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { began: true, error }
    }
}

fn not_begun(error: Error) -> Failure {
    Failure { began: false, error }
}

/// Runs passes.
pub(crate) struct Runner<'a> {
    options: &'a Options,
    scratch: &'a Path,
    images: Images,
    stop: &'a dyn Fn() -> bool,
    /// It has said so.
    stopped: bool,
    /// What is to be kept in mind when reading results.
    pub(crate) notes: Vec<String>,
    /// What each server is sent before its jobs.
    pub(crate) first: Option<Job>,
    /// Folded stacks of the last pass that sampled, by job.
    pub(crate) stacks: Vec<(String, Vec<String>)>,
}

impl<'a> Runner<'a> {
    pub(crate) fn new(
        options: &'a Options,
        scratch: &'a Path,
        images: Images,
        stop: &'a dyn Fn() -> bool,
    ) -> Runner<'a> {
        let (notes, stacks) = (Vec::new(), Vec::new());
        let first = None;
        Runner { options, scratch, images, stop, stopped: false, notes, first, stacks }
    }

    fn note(&mut self, text: String) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Starts the server, sends it the jobs, and ends it. `None` for a job that it cannot do.
    pub(crate) fn pass(
        &mut self,
        setup: &Setup,
        disk: &Disk,
        jobs: &[Job],
        pass: Pass,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        match setup.frontend() {
            Frontend::Nbd => self.nbd(setup, disk, jobs, pass),
            Frontend::Ring => self.ring(setup, disk, jobs, pass),
            Frontend::Kernel => self.kernel(disk, jobs, pass),
            Frontend::Device => self.device(setup, jobs, pass),
        }
    }

    fn core(&self) -> Option<usize> {
        self.options.cores.map(|[_, server]| server)
    }

    fn nbd(
        &mut self,
        setup: &Setup,
        disk: &Disk,
        jobs: &[Job],
        pass: Pass,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        let core = self.core();
        let place = Place { program: &self.options.program, scratch: self.scratch, core };
        let mut process = peer::start(setup, disk, &mut self.images, &place).map_err(not_begun)?;
        let connect = |process: &dyn Process| {
            let all = process.exports().iter();
            let one = |name| peer::connect(|| Nbd::connect(process.socket(), name, PATIENCE));
            all.map(|name: &String| one(name)).collect()
        };
        let connected: Result<Vec<Nbd>, Error> = connect(&*process);
        let mut disks = match connected {
            Ok(disks) => disks,
            Err(e) => return Err(not_begun(process.explain(&e.to_string()))),
        };
        let filled = match setup {
            Setup::NbdkitMemory if disk.content == Content::Data => fill(&mut disks),
            _ => Ok(()),
        };
        let pid = process.pid();
        let done = filled.and_then(|()| match disks.pop() {
            Some(mut only) if disks.is_empty() => {
                let done = self.jobs(&mut only, jobs, pass, pid, setup)?;
                disks.push(only);
                Ok(done)
            }
            Some(last) => {
                disks.push(last);
                let mut many = Many::new(std::mem::take(&mut disks))?;
                let done = self.jobs(&mut many, jobs, pass, pid, setup)?;
                disks = many.into_disks();
                Ok(done)
            }
            None => Err(Error::Other("the server has no export".into())),
        });
        // Of a server that was only stopped there is nothing to explain.
        let done =
            done.map_err(|e| if self.stopped { e } else { process.explain(&e.to_string()) })?;
        for disk in disks {
            disk.close().map_err(|e| process.explain(&e.to_string()))?;
        }
        process.stop()?;
        Ok(done)
    }

    /// Sends jobs to a server in the process `pid`.
    fn jobs<T: Target>(
        &mut self,
        target: &mut T,
        jobs: &[Job],
        pass: Pass,
        pid: u32,
        setup: &Setup,
    ) -> Result<Vec<Option<Outcome>>, Error> {
        let mut done = Vec::new();
        self.send_first(target, setup)?;
        for job in jobs {
            if !self.possible(target, job, setup)? {
                done.push(None);
                continue;
            }
            let outcome = match pass {
                Pass::Measure => {
                    let mut costs = Costs::of(pid)?;
                    run(job, target, Some(&mut costs), &mut |_| {})?
                }
                Pass::Count => {
                    let mut counts = Counts::of(pid);
                    let outcome = run(job, target, Some(&mut counts), &mut |_| {})?;
                    if let Some(why) = counts.missing() {
                        self.note(format!("Not counted: {why}."));
                    }
                    outcome
                }
                Pass::Sample => {
                    let sampler = Sampler::start(pid, self.scratch);
                    let outcome = run(job, target, None, &mut |_| {})?;
                    self.sampled(job, sampler.and_then(Sampler::finish));
                    outcome
                }
            };
            done.push(Some(self.checked(job, outcome, setup)?));
        }
        Ok(done)
    }

    fn send_first<T: Target>(&mut self, target: &mut T, setup: &Setup) -> Result<(), Error> {
        let Some(job) = self.first.clone() else { return Ok(()) };
        self.go_on()?;
        let outcome = run(&job, target, None, &mut |_| {})?;
        self.checked(&job, outcome, setup).map(|_| ())
    }

    /// Whether a target takes a job; asks first whether to go on at all.
    fn possible<T: Target>(&mut self, target: &T, job: &Job, setup: &Setup) -> Result<bool, Error> {
        self.go_on()?;
        let possible = job.flush_every.is_none() || target.limits().flush;
        if !possible {
            let (name, variant) = (setup.peer().name(), setup.variant());
            self.note(format!("{name} ({variant}) knows no flushes: {} is missing.", job.name));
        }
        Ok(possible)
    }

    fn checked(&mut self, job: &Job, outcome: Outcome, setup: &Setup) -> Result<Outcome, Error> {
        if outcome.errors > 0 {
            let (name, n) = (setup.peer().name(), outcome.errors);
            return Err(Error::Other(format!("{}: {n} requests to {name} failed", job.name)));
        }
        Ok(outcome)
    }

    fn sampled(&mut self, job: &Job, folded: Result<Vec<String>, Error>) {
        match folded {
            Ok(folded) => {
                let (size, depth) = (job.sizes.0.first().map_or(0, |s| s.0), job.depth());
                self.stacks.push((format!("{} {size} x{depth}", job.name), folded));
            }
            Err(e) => self.note(format!("No flame graph: {e}.")),
        }
    }

    fn ring(
        &mut self,
        setup: &Setup,
        disk: &Disk,
        jobs: &[Job],
        pass: Pass,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        let Setup::Polldisk(options) = setup else {
            return Err(Error::other("only polldisk has a ring here").into());
        };
        let nodes = self.images.nodes(disk, options.leaf).map_err(not_begun)?;
        let start = Start { cpu: self.core(), policy: Policy::Adaptive };
        let here = self.options.cores.map(|[generator, _]| generator);
        // Long requests go in parts.
        let parts = |job: &Job| longest(job).div_ceil(PART).max(1);
        let depth = jobs.iter().map(|j| j.depth().saturating_mul(parts(j))).max().unwrap_or(1);
        let ring = RingOptions {
            format: qcow::open::Format::Qcow2,
            writable: true,
            reactor: start,
            here,
            l2_cache: options.budget.unwrap_or_else(|| qcow::run::Options::default().l2_cache),
            depth,
        };
        let reactors = Reactors::start(&[start], Clock::real()).map_err(Error::other)?;
        let open = nodes.iter().map(|node| Ring::open_on(node, &reactors, &ring).map(Split::new));
        let done = open.collect::<Result<Vec<_>, _>>().and_then(|rings| {
            let mut rings = Many::new(rings)?;
            let done = self.ring_jobs(&mut rings, jobs, pass, setup);
            let closed = rings.into_disks().into_iter().try_for_each(|r| r.into_below().close());
            let done = done?;
            closed?;
            Ok(done)
        });
        reactors.stop();
        Ok(done?)
    }

    /// Sends jobs to rings of one reactor, which is on a thread of this process.
    fn ring_jobs(
        &mut self,
        rings: &mut Many<Split<Ring>>,
        jobs: &[Job],
        pass: Pass,
        setup: &Setup,
    ) -> Result<Vec<Option<Outcome>>, Error> {
        let mut done = Vec::new();
        self.send_first(rings, setup)?;
        for job in jobs {
            self.go_on()?;
            let mut meter = rings.first().below().meter(pass == Pass::Count);
            let sampler =
                (pass == Pass::Sample).then(|| Sampler::start(std::process::id(), self.scratch));
            let outcome = run(job, rings, Some(&mut meter), &mut |_| {})?;
            if let Some(sampler) = sampler {
                self.sampled(job, sampler.and_then(Sampler::finish));
            }
            if let Some(why) = meter.missing() {
                self.note(format!("Not counted: {why}."));
            }
            done.push(Some(self.checked(job, outcome, setup)?));
        }
        Ok(done)
    }

    /// fio on the raw image.
    fn kernel(
        &mut self,
        disk: &Disk,
        jobs: &[Job],
        pass: Pass,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        if pass == Pass::Sample {
            return Ok(vec![None; jobs.len()]);
        }
        let image = self.images.of(disk, Format::Raw).map_err(not_begun)?;
        let image = image.first().ok_or_else(|| not_begun(Error::Other("no image".into())))?;
        let mut done = Vec::new();
        for job in jobs {
            self.go_on()?;
            let command = fio::command(job, image, self.core())?;
            let text = self.tool(command, job, &done)?;
            done.push(Some(self.checked(job, fio::outcome(&text)?, &Setup::Fio)?));
        }
        Ok(done)
    }

    /// A drive, which is only read: what is on it is not ours.
    fn device(
        &mut self,
        setup: &Setup,
        jobs: &[Job],
        pass: Pass,
    ) -> Result<Vec<Option<Outcome>>, Failure> {
        let Some(address) = self.options.device.clone() else {
            return Err(not_begun(Error::other("no drive was named by --device")));
        };
        // It has no server that could be looked at by itself.
        if pass != Pass::Measure || jobs.iter().all(Job::changes) {
            return Ok(vec![None; jobs.len()]);
        }
        let program = self.options.program.clone();
        let kernel = match setup {
            Setup::FioDrive => Some(KernelDrive::take(&program, &address).map_err(not_begun)?),
            _ => None,
        };
        let mut done = Vec::new();
        for job in jobs {
            self.go_on()?;
            if job.changes() {
                done.push(None);
                continue;
            }
            let outcome = match (setup, &kernel) {
                (Setup::Polldisk(_), _) => self.direct(job, &address)?,
                (_, Some(drive)) if !whole_blocks(job, drive.block_size) => {
                    let blocks = drive.block_size;
                    self.note(format!(
                        "The kernel reads no less than a block of the drive, {blocks} bytes: {} is \
                         missing for it.",
                        job.name
                    ));
                    done.push(None);
                    continue;
                }
                (_, Some(drive)) => {
                    let mut command = fio::command(job, &drive.disk, self.core())?;
                    command.arg("--readonly");
                    fio::outcome(&self.tool(command, job, &done)?)?
                }
                (_, None) => {
                    let command = spdk::command(job, &address, self.core())?;
                    spdk::outcome(&self.tool(command, job, &done)?, job)?
                }
            };
            done.push(Some(self.checked(job, outcome, setup)?));
        }
        if let Some(drive) = kernel {
            drive.give_back()?;
        }
        Ok(done)
    }

    /// What a tool prints that does a job by itself. One that fails at its first job has not begun, as where
    /// the kernel has no io_uring.
    fn tool(
        &self,
        command: Command,
        job: &Job,
        done: &[Option<Outcome>],
    ) -> Result<String, Failure> {
        let began = done.iter().any(Option::is_some);
        done_within(command, within(job)).map_err(|error| Failure { began, error })
    }

    /// The drive by polldisk's driver, which is on the calling thread, as SPDK's is in its tool.
    fn direct(&mut self, job: &Job, address: &str) -> Result<Outcome, Error> {
        let node = NodeSpec::parse(&format!("vfio:{address}/1"))?;
        let mut drive = Direct::open(&node, false)?;
        let cpu = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(Error::other);
        let before = cpu()?;
        let mut outcome = run(job, &mut drive, None, &mut |_| {})?;
        let took = Duration::from(cpu()?).saturating_sub(before.into());
        drive.close()?;
        // Of the whole run; the ramp had its share.
        let share = job.seconds / (job.seconds + job.ramp);
        outcome.server.cpu_ns = Some((took.as_nanos() as f64 * share) as u64);
        Ok(outcome)
    }

    fn go_on(&mut self) -> Result<(), Error> {
        self.stopped |= (self.stop)();
        if self.stopped { Err(Error::other("stopped")) } else { Ok(()) }
    }
}

fn longest(job: &Job) -> u32 {
    job.sizes.0.iter().map(|s| s.0).max().unwrap_or(0)
}

/// Whether all requests of a job have whole blocks.
fn whole_blocks(job: &Job, block_size: u64) -> bool {
    job.sizes.0.iter().all(|s| u64::from(s.0).is_multiple_of(block_size.max(1)))
}

fn within(job: &Job) -> Duration {
    Duration::from_secs_f64((job.ramp + job.seconds + TOOL).clamp(1.0, 1e6))
}

/// Writes all of a disk, as images are written before they are served.
fn fill(disks: &mut [Nbd]) -> Result<(), Error> {
    for disk in disks {
        let size = disk.limits().size;
        let len = 1 << 20;
        let job = Job {
            name: "fill".into(),
            mix: Mix { reads: 0, trims: 0 },
            sizes: Sizes(vec![(len, 100)]),
            distribution: Distribution::Sequential,
            shape: Shape::Depth(4),
            requests: Some((size / u64::from(len)).max(1)),
            seconds: 3600.0,
            ..Job::default()
        };
        run(&job, disk, None, &mut |_| {})?;
    }
    Ok(())
}
