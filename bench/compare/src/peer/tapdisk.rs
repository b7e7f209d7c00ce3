//! tapdisk, the datapath of SMAPIv1, driven by tap-ctl as the toolstack does. It puts itself into the
//! background, so it is no child of ours; it ends with its disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bench::Error;

use super::process::{Process, done};
use super::{Place, find};

/// Where its sockets are.
const FOLDER: &str = "/run/blktap-control";

/// How long it may take to end, in steps.
const STEP: Duration = Duration::from_millis(20);
const STEPS: u32 = 500;

/// A disk in a tapdisk of its own.
struct Tapdisk {
    pid: u32,
    minor: u32,
    socket: PathBuf,
    exports: Vec<String>,
    open: bool,
    ended: bool,
}

pub(super) fn start(image: &Path, place: &Place<'_>) -> Result<Box<dyn Process>, Error> {
    let run = |args: &[String]| {
        let mut command = Command::new(find("tap-ctl").unwrap_or_else(|| "tap-ctl".into()));
        command.args(args);
        bench::server::pinned(place.core, || done(command))
    };
    let minor = number(&run(&allocate())?, "tapdisk-")?;
    // From here on it is to be freed.
    let mut disk = Tapdisk {
        pid: 0,
        minor,
        socket: PathBuf::new(),
        // It has no names.
        exports: vec![String::new()],
        open: false,
        ended: false,
    };
    disk.pid = number(&run(&spawn())?, "")?;
    disk.socket = Path::new(FOLDER).join(format!("nbd{}.{minor}", disk.pid));
    run(&attach(disk.pid, minor))?;
    run(&open(disk.pid, minor, image))?;
    disk.open = true;
    Ok(Box::new(disk))
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn allocate() -> Vec<String> {
    words(&["allocate"])
}

fn spawn() -> Vec<String> {
    words(&["spawn"])
}

fn attach(pid: u32, minor: u32) -> Vec<String> {
    words(&["attach", "-p", &pid.to_string(), "-m", &minor.to_string()])
}

fn open(pid: u32, minor: u32, image: &Path) -> Vec<String> {
    let vhd = format!("vhd:{}", image.display());
    words(&["open", "-p", &pid.to_string(), "-m", &minor.to_string(), "-a", &vhd])
}

fn close(pid: u32, minor: u32) -> Vec<String> {
    words(&["close", "-p", &pid.to_string(), "-m", &minor.to_string()])
}

fn detach(pid: u32, minor: u32) -> Vec<String> {
    words(&["detach", "-p", &pid.to_string(), "-m", &minor.to_string()])
}

fn free(minor: u32) -> Vec<String> {
    words(&["free", "-m", &minor.to_string()])
}

/// The number that its answer ends with, behind `after`.
fn number(text: &str, after: &str) -> Result<u32, Error> {
    let word = text.split_whitespace().next_back().unwrap_or("");
    let digits = match after {
        "" => word,
        _ => word.rsplit_once(after).map_or(word, |(_, digits)| digits),
    };
    let found = digits.parse().ok();
    found.ok_or_else(|| Error::other(format!("tap-ctl answered {text:?}, which has no number")))
}

impl Tapdisk {
    fn runs(&self) -> bool {
        self.pid != 0 && Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    /// What can be done is; the first thing that could not be is told.
    fn end(&mut self) -> Result<(), Error> {
        let tap = |args: Vec<String>| {
            let mut command = Command::new(find("tap-ctl").unwrap_or_else(|| "tap-ctl".into()));
            command.args(args);
            done(command).map(|_| ())
        };
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let mut result = Ok(());
        if self.runs() {
            if std::mem::take(&mut self.open) {
                result = tap(close(self.pid, self.minor));
            }
            result = result.and(tap(detach(self.pid, self.minor)));
            let mut steps = 0;
            while self.runs() && steps < STEPS {
                std::thread::sleep(STEP);
                steps += 1;
            }
            if self.runs() {
                result =
                    result.and(Err(Error::other(format!("tapdisk {} does not end", self.pid))));
            }
        }
        self.pid = 0;
        result.and(tap(free(self.minor)))
    }
}

impl Process for Tapdisk {
    fn socket(&self) -> &Path {
        &self.socket
    }

    fn exports(&self) -> &[String] {
        &self.exports
    }

    fn pid(&self) -> u32 {
        self.pid
    }

    fn explain(&mut self, why: &str) -> Error {
        let state = if self.runs() { "runs" } else { "has died" };
        Error::other(format!(
            "tapdisk {} {state}: {why} (its log is the host's: journalctl -t tapdisk)",
            self.pid
        ))
    }

    fn stop(mut self: Box<Self>) -> Result<(), Error> {
        self.end()
    }
}

impl Drop for Tapdisk {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::warn!("tapdisk: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        assert_eq!(attach(12, 3).join(" "), "attach -p 12 -m 3");
        assert_eq!(open(12, 3, Path::new("/s/a.vhd")).join(" "), "open -p 12 -m 3 -a vhd:/s/a.vhd");
        assert_eq!(close(12, 3).join(" "), "close -p 12 -m 3");
        assert_eq!(detach(12, 3).join(" "), "detach -p 12 -m 3");
        assert_eq!(free(3).join(" "), "free -m 3");
    }

    #[test]
    fn numbers_of_its_answers() {
        assert_eq!(number("/dev/xen/blktap-2/tapdisk-17\n", "tapdisk-").unwrap(), 17);
        assert_eq!(number("4711\n", "").unwrap(), 4711);
        assert!(number("no such command", "").is_err());
        assert!(number("", "tapdisk-").is_err());
    }
}
