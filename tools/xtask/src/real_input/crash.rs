//! Kill cases: many writes, zeroes, trims and flushes in flight, then SIGKILL. Afterwards QEMU must
//! find no corruption (leaks at most), and every sector must hold what was there at the last flush
//! that was answered, or something that was asked for later: nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::client::{Client, Command};
use super::disk::{Random, SECTOR, Verdict};
use super::{Room, disk};
use crate::cmd::{self, program};

/// Kills of one case; each goes on with the image that the one before left.
const ROUNDS: u64 = 6;

/// Most requests in flight.
const DEPTH: usize = 24;

/// The part of the disk that is worked on, in sectors: large enough that new clusters are needed
/// all the time, and at the disk's start, where the chain below has data.
const AREA: u64 = (192 << 20) / SECTOR as u64;

/// The part of it that every second request goes to: small enough that places are hit again.
const HOT: u64 = (6 << 20) / SECTOR as u64;

/// What one request makes of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// The pattern of this request.
    Pattern(u64),
    Zero,
    /// Zero, or what was there before: a trim promises nothing.
    ZeroOrOld,
}

/// One request, in the order of issue. Requests in flight never overlap, so for each sector the
/// order of issue is the order of effect.
#[derive(Debug)]
struct Step {
    first: u64,
    count: u64,
    content: Content,
    fua: bool,
    /// Number of answers when it was answered; `None` while it is in flight.
    answered: Option<u64>,
}

/// All requests of one round.
struct History {
    /// How many sectors are worked on.
    area: u64,
    steps: Vec<Step>,
    answers: u64,
    /// Every change answered before this many answers is durable.
    durable: u64,
}

impl History {
    fn new(area: u64) -> Self {
        Self { area, steps: Vec::new(), answers: 0, durable: 0 }
    }

    /// Notes the answer to a step.
    fn answer(&mut self, step: usize) {
        self.answers += 1;
        self.steps[step].answered = Some(self.answers);
    }

    /// Notes the answer to a flush that was sent when there were so many answers.
    fn flushed(&mut self, answers_when_sent: u64) {
        self.durable = self.durable.max(answers_when_sent);
    }

    fn is_durable(&self, step: &Step) -> bool {
        step.answered.is_some_and(|at| step.fua || at <= self.durable)
    }

    /// What each sector of the area may hold now, newest last; `None` stands for what it held
    /// before the round.
    fn allowed(&self) -> Vec<Vec<Option<Content>>> {
        let mut area = vec![vec![None]; self.area as usize];
        for step in &self.steps {
            for sector in &mut area[step.first as usize..(step.first + step.count) as usize] {
                if self.is_durable(step) && step.content != Content::ZeroOrOld {
                    sector.clear();
                }
                let content =
                    if step.content == Content::ZeroOrOld { Content::Zero } else { step.content };
                sector.push(Some(content));
            }
        }
        area
    }
}

/// The 512 bytes that request `number` of round `round` writes to a sector.
fn pattern(round: u64, number: u64, sector: u64) -> [u8; SECTOR] {
    let mut random = Random((round << 48) ^ (number << 24) ^ sector);
    let mut bytes = [0; SECTOR];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => sector,
            1 => (round << 32) | number,
            _ => random.next(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// One case: several kills of a server for a writable form of the image `name`.
pub(crate) fn case(room: &Room<'_>, name: &str) -> Result<String> {
    let image = room.writable(name)?;
    let (mut before, mut after) = (room.folder.join("before.raw"), room.folder.join("after.raw"));
    disk::copy(&room.lab.assets.disk(), &before)?;
    let mut random = Random(if room.kind == "file" { 11 } else { 12 });
    let (mut requests, mut leaks, mut flushed) = (0, 0, 0);
    for round in 1..=ROUNDS {
        let server = room.serve(&image)?;
        let mut client = Client::connect(server.socket())?;
        let kill_after = 150 + random.below(600);
        let history = work(&mut client, &mut random, round, kill_after)?;
        server.kill()?;
        drop(client);
        leaks += u64::from(disk::check(&image, Verdict::LeaksAllowed)?);
        disk::as_raw(&image, &after)?;
        judge(&before, &after, &history, round).with_context(|| format!("after kill {round}"))?;
        requests += history.steps.len();
        flushed += history.steps.iter().filter(|step| history.is_durable(step)).count();
        std::mem::swap(&mut before, &mut after);
    }
    if flushed == 0 {
        bail!("nothing was flushed before a kill: this proves nothing");
    }
    // The server must see the same disk in what it left, and end well.
    let server = room.serve(&image)?;
    let back = room.folder.join("back.raw");
    cmd::ok(program("nbdcopy", [server.uri()]).arg(&back))?;
    server.stop()?;
    disk::same(&before, &back, |_| true)?;
    disk::check(&image, Verdict::LeaksAllowed)?;
    Ok(format!("{ROUNDS} kills in {requests} requests, {flushed} flushed; leaks after {leaks}"))
}

/// Keeps requests in flight until so many were answered, and leaves the rest unanswered. Every
/// second round ends right behind an answered flush, where the least has had time to settle.
fn work(client: &mut Client, random: &mut Random, round: u64, kill_after: u64) -> Result<History> {
    if client.size < AREA * SECTOR as u64 || !(SECTOR as u64).is_multiple_of(client.granule) {
        bail!("size {} and block size {} do not fit", client.size, client.granule);
    }
    let mut history = History::new(AREA);
    // What is in flight: cookie, then the step or, for a flush, the answers when it was sent.
    let mut flying: Vec<(u64, std::result::Result<usize, u64>)> = Vec::new();
    let (mut cookie, mut just_flushed) = (0, false);
    loop {
        while flying.len() < DEPTH {
            cookie += 1;
            let command = choose(client, random);
            if command == Command::Flush {
                client.send(command, cookie, 0, 0, &[])?;
                flying.push((cookie, Err(history.answers)));
                continue;
            }
            let Some((first, count)) = place(random, &history, &flying) else { continue };
            let number = history.steps.len() as u64;
            let (content, fua) = match command {
                Command::Write { fua } => (Content::Pattern(number), fua),
                Command::Zero { .. } => (Content::Zero, false),
                Command::Trim | Command::Flush => (Content::ZeroOrOld, false),
            };
            let mut data = Vec::new();
            if content == Content::Pattern(number) {
                (first..first + count).for_each(|at| data.extend(pattern(round, number, at)));
            }
            let length = u32::try_from(count * SECTOR as u64)?;
            client.send(command, cookie, first * SECTOR as u64, length, &data)?;
            flying.push((cookie, Ok(history.steps.len())));
            history.steps.push(Step { first, count, content, fua, answered: None });
        }
        if history.answers >= kill_after && (just_flushed || round.is_multiple_of(2)) {
            // Let the server get into the middle of what was just sent.
            thread::sleep(Duration::from_micros(random.below(3000)));
            return Ok(history);
        }
        let answered = client.receive()?;
        let Some(index) = flying.iter().position(|(cookie, _)| *cookie == answered) else {
            bail!("an answer to request {answered}, which is not in flight");
        };
        let what = flying.swap_remove(index).1;
        just_flushed = what.is_err();
        match what {
            Ok(step) => history.answer(step),
            Err(answers_when_sent) => history.flushed(answers_when_sent),
        }
    }
}

/// The next command that the server can do.
fn choose(client: &Client, random: &mut Random) -> Command {
    let command = match random.below(60) {
        0..3 => Command::Flush,
        3 => Command::Write { fua: true },
        4..7 => Command::Zero { no_hole: true },
        7..10 => Command::Zero { no_hole: false },
        10..16 => Command::Trim,
        _ => Command::Write { fua: false },
    };
    if client.can(command) { command } else { Command::Write { fua: false } }
}

/// A range of sectors that meets nothing in flight; `None` when the first try does not fit.
fn place(
    random: &mut Random,
    history: &History,
    flying: &[(u64, std::result::Result<usize, u64>)],
) -> Option<(u64, u64)> {
    let (count, align) = match random.below(6) {
        0 => (1 + random.below(7), 1),
        1 | 2 => (8, 8),
        3 => (8 * (1 + random.below(16)), 8),
        4 => (128, 128),
        _ => (1 + random.below(400), 1),
    };
    let area = if random.below(2) == 0 { HOT } else { AREA };
    let first = random.below((area - count) / align) * align;
    let free = flying.iter().filter_map(|(_, what)| what.as_ref().ok()).all(|step| {
        let step = &history.steps[*step];
        first + count <= step.first || step.first + step.count <= first
    });
    free.then_some((first, count))
}

/// Every sector of the area must hold one of the allowed contents, every other sector what it held.
fn judge(before: &Path, after: &Path, history: &History, round: u64) -> Result<()> {
    disk::same(before, after, |sector| sector >= history.area)?;
    let (before, after) = (File::open(before)?, File::open(after)?);
    let mut old = vec![0; history.area as usize * SECTOR];
    let mut new = vec![0; history.area as usize * SECTOR];
    before.read_exact_at(&mut old, 0)?;
    after.read_exact_at(&mut new, 0)?;
    let allowed = history.allowed();
    for (sector, (old, new)) in old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate() {
        let fits = |content: &Option<Content>| match content {
            None => new == old,
            Some(Content::Pattern(number)) => new == pattern(round, *number, sector as u64),
            Some(Content::Zero | Content::ZeroOrOld) => new.iter().all(|byte| *byte == 0),
        };
        if !allowed[sector].iter().any(fits) {
            let at = sector as u64;
            let steps: Vec<String> = history
                .steps
                .iter()
                .enumerate()
                .filter(|(_, step)| (step.first..step.first + step.count).contains(&at))
                .map(|(number, step)| {
                    let durable = history.is_durable(step);
                    format!(
                        "{number}: {:?} answered {:?} durable {durable}",
                        step.content, step.answered
                    )
                })
                .collect();
            let head = &new[..16];
            bail!(
                "sector {sector} holds {head:02x?}…, not one of {:?}; requests: {steps:?}",
                allowed[sector]
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn step(first: u64, count: u64, content: Content) -> Step {
        Step { first, count, content, fua: false, answered: None }
    }

    #[test]
    fn only_flushed_or_later_contents_are_allowed() {
        let mut history = History::new(16);
        history.steps.push(step(0, 2, Content::Pattern(0)));
        history.answer(0);
        assert_eq!(history.allowed()[0], [None, Some(Content::Pattern(0))]);
        // A flush that was sent before the answer says nothing about the write.
        history.flushed(0);
        assert_eq!(history.allowed()[0].len(), 2);
        history.flushed(1);
        assert_eq!(history.allowed()[0], [Some(Content::Pattern(0))]);
        history.steps.push(step(1, 1, Content::Zero));
        assert_eq!(history.allowed()[0], [Some(Content::Pattern(0))]);
        assert_eq!(history.allowed()[1], [Some(Content::Pattern(0)), Some(Content::Zero)]);
        assert_eq!(history.allowed()[2], [None]);
    }

    #[test]
    fn forced_writes_are_durable_and_trims_promise_nothing() {
        let mut history = History::new(16);
        history.steps.push(Step { fua: true, ..step(0, 1, Content::Pattern(0)) });
        history.answer(0);
        assert_eq!(history.allowed()[0], [Some(Content::Pattern(0))]);
        history.steps.push(step(0, 1, Content::ZeroOrOld));
        history.answer(1);
        history.flushed(2);
        assert_eq!(history.allowed()[0], [Some(Content::Pattern(0)), Some(Content::Zero)]);
    }

    #[test]
    fn lost_and_foreign_contents_are_found() {
        let folder = std::env::temp_dir().join(format!("xtask-judge-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (before, after) = (folder.join("before"), folder.join("after"));
        let mut bytes = vec![9; 17 * SECTOR];
        fs::write(&before, &bytes).unwrap();
        let mut history = History::new(16);
        history.steps.push(step(3, 1, Content::Pattern(0)));
        fs::write(&after, &bytes).unwrap();
        judge(&before, &after, &history, 1).unwrap();
        history.answer(0);
        history.flushed(1);
        assert!(judge(&before, &after, &history, 1).is_err(), "a flushed write was lost");
        bytes[3 * SECTOR..4 * SECTOR].copy_from_slice(&pattern(1, 0, 3));
        fs::write(&after, &bytes).unwrap();
        judge(&before, &after, &history, 1).unwrap();
        assert!(judge(&before, &after, &history, 2).is_err(), "contents of another round");
        for wrong in [4 * SECTOR, 2 * SECTOR + 511, 16 * SECTOR] {
            let mut bytes = bytes.clone();
            bytes[wrong] ^= 1;
            fs::write(&after, &bytes).unwrap();
            assert!(judge(&before, &after, &history, 1).is_err(), "byte {wrong} changed");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
