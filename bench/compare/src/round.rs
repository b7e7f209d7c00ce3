//! [`compare`]: servers in turn, round by round, and what comes of it.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bench::Error;
use bench::crossing::{Crossing, crossing};
use bench::run::{Job, Outcome};
use nix::sys::statvfs::statvfs;
use node::HostFiles;

use crate::host::{About, describe};
use crate::images::Images;
use crate::load::{Pass, Runner};
use crate::peer::{Peer, Setup, drive};
use crate::profiles::{Case, Content, Profile};
use crate::results::{Comparison, Flame, Frontend, Host, PeerInfo};
use crate::rows::{Cell, rows};

/// Rounds, and what a quick comparison may take for its measurements, in seconds.
const ROUNDS: usize = 5;
const QUICK_ROUNDS: usize = 3;
const QUICK: f64 = 24.0;

/// Seconds that count of each measurement, and of the ramp before, if it is not quick.
const SECONDS: f64 = 3.0;
const RAMP: f64 = 0.5;

/// Of the time of a quick measurement, the share of its ramp, and that of the run that only counts.
const RAMP_SHARE: f64 = 0.2;
const COUNT_SHARE: f64 = 0.5;

/// Most seconds of a run that only counts, or samples stacks.
const COUNT_SECONDS: f64 = 1.0;
const FLAME_SECONDS: f64 = 3.0;

/// Shortest and longest quick measurement.
const LEAST: f64 = 0.02;
const MOST: f64 = 1.5;

/// What is to be compared, and where.
pub struct Options {
    /// The profile.
    pub profile: &'static Profile,
    /// Fewer cases, smaller disks, and less than a minute.
    pub quick: bool,
    /// Who takes part beside polldisk and the floor; everybody if empty.
    pub peers: Vec<Peer>,
    /// Rounds; as usual without it.
    pub rounds: Option<usize>,
    /// Seconds that a quick comparison may take for its measurements.
    pub budget: Option<f64>,
    /// Processors of the generator and of servers; `None`: not pinned.
    pub cores: Option<[usize; 2]>,
    /// This program.
    pub program: PathBuf,
    /// PCI address of a drive that is read too.
    pub device: Option<String>,
    /// What was done to the drive before, for the report.
    pub preconditioning: Option<String>,
    /// Samples stacks of servers under load.
    pub flame: bool,
    /// The command that does it again.
    pub command: String,
    /// The same with whoever takes part left out, and what is left behind.
    pub again: String,
}

/// Bytes that images of a profile take in its scratch folder, at most.
pub fn space(profile: &Profile, quick: bool) -> u64 {
    let of = |case: Case| match case.disk.content {
        // In three formats, and once in the memory of the floor.
        Content::Data | Content::Chain(_) => {
            case.disk.size.saturating_mul(4).saturating_mul(case.disk.count.into())
        }
        Content::Allocated => case.disk.size >> 12,
        // What a server allocates depends on how fast it is.
        Content::Empty => {
            if quick {
                2 << 30
            } else {
                16 << 30
            }
        }
    };
    profile.cases(quick).into_iter().map(of).max().unwrap_or(0).saturating_add(256 << 20)
}

/// Bytes that are free in a folder's file system.
///
/// # Errors
/// If it is not there.
pub fn free(folder: &Path) -> Result<u64, Error> {
    let fail = |e| Error::Other(format!("{}: {e}", folder.display()));
    let stat = statvfs(folder).map_err(fail)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// The usual processors of the generator and of servers, if there are two to be had.
///
/// # Errors
/// If the kernel does not say which there are.
pub fn usual_cores() -> Result<Option<[usize; 2]>, Error> {
    let allowed = bench::server::allowed()?;
    Ok(match allowed[..] {
        [.., generator, server] => Some([generator, server]),
        _ => None,
    })
}

/// Makes a comparison in the folder `scratch`. `stop` is asked often whether to give up; `tell` is told how
/// far it is. Pins the calling thread, if cores are given.
///
/// # Errors
/// If nothing can be made in the folder, polldisk does not run, or a server fails or dies under load: then
/// with the end of its log.
pub fn compare(
    options: &Options,
    scratch: &Path,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(&str),
) -> Result<Comparison, Error> {
    let began = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut notes = Vec::new();
    // Before this thread has but one processor left.
    let mut host = host(options, scratch)?;
    if let Some(address) = &options.device {
        let found = drive::describe(&options.program, address);
        host.facts.push((format!("Drive {address}"), found.unwrap_or_else(|| "unknown".into())));
    }
    if let Some([generator, server]) = options.cores {
        let Crossing { own, from_other } = crossing(generator, server)?;
        notes.push(format!(
            "A page of 4 KiB that the generator's processor has just written takes the server's {:.2} µs to \
             copy, one of its own {:.2} µs: so much of each request through a ring is this host's memory.",
            from_other / 1000.0,
            own / 1000.0
        ));
        reactor::pin_current_thread(generator).map_err(Error::Other)?;
    } else {
        notes.push("Nothing was pinned: generator and servers shared processors.".to_owned());
    }
    let peers = look(options);
    let cases = cases(options, &peers, &mut notes);
    let times = Times::of(options, &cases);
    let images = Images::new(scratch.to_owned(), options.program.clone());
    let mut runner = Runner::new(options, scratch, images, stop);
    let mut comparison = Comparison {
        profile: options.profile.name.to_owned(),
        question: options.profile.question.to_owned(),
        quick: options.quick,
        began,
        command: options.command.clone(),
        host,
        peers,
        results: Vec::new(),
        notes: Vec::new(),
        flames: Vec::new(),
    };
    for case in cases {
        run_case(options, case, &times, &mut runner, &mut comparison, tell)?;
    }
    notes.append(&mut runner.notes);
    comparison.notes = notes;
    Ok(comparison)
}

fn host(options: &Options, scratch: &Path) -> Result<Host, Error> {
    let processors = bench::server::allowed()?.len();
    let scratch = scratch.canonicalize();
    let scratch =
        scratch.map_err(|e| Error::Other(format!("cannot find the scratch folder: {e}")))?;
    let preconditioning = options.preconditioning.as_deref();
    let about = About { cores: options.cores, scratch: Some(&scratch), preconditioning };
    Ok(Host { processors, ..describe(&HostFiles::below("/"), &about) })
}

/// Who takes part, and who cannot.
fn look(options: &Options) -> Vec<PeerInfo> {
    let chosen = |p: &Peer| wanted(options, *p);
    let look = |p: Peer| p.look(options.device.as_deref());
    Peer::ALL.into_iter().filter(chosen).map(look).collect()
}

/// polldisk is what others are put beside, and nbdkit's memory plugin is the floor: both are always there.
fn wanted(options: &Options, peer: Peer) -> bool {
    let always = matches!(peer, Peer::Polldisk | Peer::Nbdkit);
    options.peers.is_empty() || always || options.peers.contains(&peer)
}

fn cases(options: &Options, peers: &[PeerInfo], notes: &mut Vec<String>) -> Vec<Case> {
    let there = |peer: Peer| peers.iter().any(|i| i.name == peer.name() && i.absent.is_none());
    let mut cases = options.profile.cases(options.quick);
    for case in &mut cases {
        let disk = case.disk;
        case.setups.retain(|setup| {
            let asked = *setup == Setup::NbdkitMemory
                || setup.peer() != Peer::Nbdkit
                || options.peers.is_empty()
                || options.peers.contains(&Peer::Nbdkit);
            if !asked || !there(setup.peer()) {
                return false;
            }
            let Some(why) = setup.unable(&disk, options.device.as_deref()) else { return true };
            let (name, variant) = (setup.peer().name(), setup.variant());
            let note = match setup.frontend() {
                Frontend::Device => format!("Drives took no part: {why}."),
                _ => format!("{name} ({variant}) took no part: {why}."),
            };
            if !notes.contains(&note) {
                notes.push(note);
            }
            false
        });
    }
    cases
}

/// Seconds that what is sent first may take, about.
fn first_takes(case: &Case) -> f64 {
    const A_SECOND: f64 = 30_000.0;
    case.first.as_ref().and_then(|job| job.requests).map_or(0.0, |n| n as f64 / A_SECOND)
}

/// How long each measurement takes.
struct Times {
    rounds: usize,
    seconds: f64,
    ramp: f64,
}

impl Times {
    fn of(options: &Options, cases: &[Case]) -> Times {
        let usual = if options.quick { QUICK_ROUNDS } else { ROUNDS };
        let rounds = options.rounds.unwrap_or(usual).max(1);
        if !options.quick {
            return Times { rounds, seconds: SECONDS, ramp: RAMP };
        }
        let passes = rounds as f64 + COUNT_SHARE;
        let count = |c: &Case| (c.setups.len() * c.jobs.len()) as f64;
        let cells: f64 = cases.iter().map(count).sum::<f64>().max(1.0);
        let first = |c: &Case| c.setups.len() as f64 * first_takes(c) * (rounds as f64 + 1.0);
        let left = options.budget.unwrap_or(QUICK) - cases.iter().map(first).sum::<f64>();
        let each = (left / cells / passes).clamp(LEAST, MOST);
        Times { rounds, seconds: each * (1.0 - RAMP_SHARE), ramp: each * RAMP_SHARE }
    }

    /// The jobs of a case, with their times and seeds for a round.
    fn jobs(&self, case: &Case, round: usize, most: f64) -> Vec<Job> {
        let timed = |job: &Job| Job {
            seconds: self.seconds.min(most).max(0.01),
            ramp: match case.disk.content {
                // Nothing is allocated twice: what the ramp did would be missing.
                Content::Empty => 0.0,
                _ => self.ramp,
            },
            // Other places in each round, the same ones for all servers.
            seed: job.seed.wrapping_add(round as u64),
            ..job.clone()
        };
        case.jobs.iter().map(timed).collect()
    }
}

fn run_case(
    options: &Options,
    mut case: Case,
    times: &Times,
    runner: &mut Runner<'_>,
    comparison: &mut Comparison,
    tell: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    runner.first = case.first.take();
    let mut found: Vec<Vec<Vec<Outcome>>> = Vec::new();
    let what = |case: &Case| {
        let labels = case.labels.iter().map(|(k, v)| format!(" {k}={v}"));
        format!("{}{}", options.profile.name, labels.collect::<String>())
    };
    for round in 0..times.rounds {
        let mut n = 0;
        while let Some(setup) = case.setups.get(n) {
            let of = (round + 1, times.rounds);
            let name = setup.peer().name();
            tell(&format!(
                "{}: round {} of {}: {name} {}",
                what(&case),
                of.0,
                of.1,
                setup.variant()
            ));
            let jobs = times.jobs(&case, round, f64::MAX);
            match runner.pass(setup, &case.disk, &jobs, Pass::Measure) {
                Ok(outcomes) => {
                    if round == 0 {
                        found.push(vec![Vec::new(); jobs.len()]);
                    }
                    for (cell, outcome) in found[n].iter_mut().zip(outcomes) {
                        cell.extend(outcome);
                    }
                    n += 1;
                }
                // One that does not even begin, as where the kernel has no io_uring, is left out.
                Err(e) if round == 0 && !e.began && setup.peer() != Peer::Polldisk => {
                    let note = format!("{name} ({}) does not start: {}", setup.variant(), e.error);
                    tell(&note);
                    runner.notes.push(note);
                    case.setups.remove(n);
                }
                Err(e) => return Err(e.error),
            }
        }
    }
    let mut counted = Vec::new();
    for setup in &case.setups {
        tell(&format!("{}: counting: {}", what(&case), setup.peer().name()));
        let jobs = times.jobs(&case, times.rounds, COUNT_SECONDS.min(times.seconds * COUNT_SHARE));
        counted.push(runner.pass(setup, &case.disk, &jobs, Pass::Count).map_err(|e| e.error)?);
    }
    for setup in case.setups.iter().filter(|_| options.flame) {
        tell(&format!("{}: sampling: {}", what(&case), setup.peer().name()));
        let jobs = times.jobs(&case, times.rounds, FLAME_SECONDS);
        runner.pass(setup, &case.disk, &jobs, Pass::Sample).map_err(|e| e.error)?;
        let variant = setup.variant();
        for (job, folded) in runner.stacks.drain(..) {
            let peer = format!("{} {variant}", setup.peer().name()).trim_end().to_owned();
            comparison.flames.push(Flame {
                peer,
                workload: format!("{job}{}", &what(&case)[options.profile.name.len()..]),
                folded,
            });
        }
    }
    for (n, job) in case.jobs.iter().enumerate() {
        let cells = case.setups.iter().zip(&found).zip(&counted);
        let cells: Vec<Cell<'_>> = cells
            .map(|((setup, rounds), counted)| Cell {
                setup,
                labels: &case.labels,
                job,
                rounds: rounds[n].clone(),
                counted: counted[n].clone(),
                command: command(options, setup),
            })
            .collect();
        comparison.results.extend(rows(&cells));
    }
    Ok(())
}

/// What measures a peer's rows again.
fn command(options: &Options, setup: &Setup) -> String {
    let (again, peer) = (&options.again, setup.peer().name());
    let device = match (&options.device, setup.frontend()) {
        (Some(address), Frontend::Device) => format!(" --device {address}"),
        _ => String::new(),
    };
    format!("{again} --peer {peer}{device}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::profiles::PROFILES;

    fn options(profile: &'static Profile, quick: bool) -> Options {
        Options {
            profile,
            quick,
            peers: Vec::new(),
            rounds: None,
            budget: None,
            cores: None,
            program: PathBuf::new(),
            device: None,
            preconditioning: None,
            flame: false,
            command: String::new(),
            again: "polldisk bench compare --profile random --cores 2,3".to_owned(),
        }
    }

    #[test]
    fn each_row_has_the_command_that_measures_it_again() {
        let mut options = options(&PROFILES[1], false);
        let of = |options: &Options, setup| command(options, &setup);
        let again = options.again.clone();
        assert_eq!(of(&options, Setup::fio()), format!("{again} --peer fio"));
        options.device = Some("0000:01:00.0".to_owned());
        assert_eq!(of(&options, Setup::fio()), format!("{again} --peer fio"));
        let drive = format!("{again} --peer fio --device 0000:01:00.0");
        assert_eq!(of(&options, Setup::fio_drive()), drive);
    }

    /// What any server takes.
    fn limits(size: u64) -> bench::run::Limits {
        bench::run::Limits {
            name: "a server".into(),
            size,
            block: 512,
            max_len: 2 << 20,
            max_depth: 32,
            writable: true,
            flush: true,
            trim: true,
            patience: 1,
        }
    }

    #[test]
    fn every_profile_expands_to_jobs_that_servers_take() {
        for profile in &PROFILES {
            assert!(std::ptr::eq(Profile::find(profile.name).unwrap(), profile));
            for quick in [true, false] {
                let cases = profile.cases(quick);
                let times = Times::of(&options(profile, quick), &cases);
                let mut rows = BTreeSet::new();
                for case in &cases {
                    if let Some(first) = &case.first {
                        first.check(&limits(case.disk.size)).unwrap();
                    }
                    assert_eq!(case.setups[0].peer(), Peer::Polldisk, "{}", profile.name);
                    let size = case.disk.size * u64::from(case.disk.count);
                    for job in times.jobs(case, 0, f64::MAX) {
                        job.check(&limits(size)).unwrap();
                        for setup in &case.setups {
                            let depth = (job.depth(), job.sizes.0[0].0);
                            let row = (setup.peer(), setup.frontend(), setup.variant());
                            let what = (case.labels.clone(), job.name.clone(), depth);
                            assert!(rows.insert((row, what)), "{} has a row twice", profile.name);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_quick_comparison_is_planned_within_its_time() {
        for profile in &PROFILES {
            let cases = profile.cases(true);
            let t = Times::of(&options(profile, true), &cases);
            let of = |c: &Case| {
                let jobs = |round| t.jobs(c, round, f64::MAX);
                let time = |jobs: Vec<Job>| jobs.iter().map(|j| j.ramp + j.seconds).sum::<f64>();
                let round = |r| first_takes(c) + time(jobs(r));
                c.setups.len() as f64 * (0..t.rounds).map(round).sum::<f64>()
            };
            let all: f64 = cases.iter().map(of).sum();
            assert!(all < QUICK + 1.0, "{}: {all} s", profile.name);
            assert!(t.seconds >= 0.04, "{}: {} s each", profile.name, t.seconds);
            let gib = space(profile, true) >> 30;
            assert!(gib < 4, "{} takes {gib} GiB", profile.name);
        }
    }

    #[test]
    fn polldisk_and_the_floor_are_always_there() {
        let profile = Profile::find("random").unwrap();
        let o = Options { peers: vec![Peer::Qsd], ..options(profile, true) };
        let names: Vec<_> = look(&o).into_iter().map(|i| i.name).collect();
        assert_eq!(names, ["polldisk", "qemu-storage-daemon", "nbdkit"]);
        let there = |name: &str| PeerInfo { name: name.into(), version: None, absent: None };
        let peers: Vec<_> = names.iter().map(|n| there(n)).collect();
        let setups = cases(&o, &peers, &mut Vec::new()).remove(0).setups;
        assert!(setups.contains(&Setup::NbdkitMemory) && !setups.contains(&Setup::NbdkitFile));
        assert!(setups.iter().any(|s| s.peer() == Peer::Qsd));
        assert!(!setups.iter().any(|s| s.peer() == Peer::QemuNbd));
    }
}
