//! Whether a host is fit for figures that others shall believe: what was found, why it matters, and what
//! to do. Changes nothing.
//!
//! Whether it can drive NVMe devices at all is another question: `polldisk device doctor`.

mod cpu;
mod drive;
mod system;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use node::HostFiles;
use serde::Serialize;

pub use cpu::processors;

/// How something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It makes figures worse, or harder to believe or to repeat.
    Warn,
    /// It cannot be told here.
    Unknown,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do; `None` if it is as it should be.
    #[serde(rename = "do")]
    pub advice: Option<String>,
}

/// Name and importance of a check, to be completed by what is found.
#[derive(Clone, Copy)]
struct Subject(&'static str, &'static str);

impl Subject {
    fn ok(self, found: impl Into<String>) -> Check {
        Check { name: self.0, state: State::Ok, found: found.into(), why: self.1, advice: None }
    }

    fn warn(self, found: impl Into<String>, advice: impl Into<String>) -> Check {
        self.bad(State::Warn, found.into(), advice.into())
    }

    fn unknown(self, found: impl Into<String>, advice: impl Into<String>) -> Check {
        self.bad(State::Unknown, found.into(), advice.into())
    }

    fn bad(self, state: State, found: String, advice: String) -> Check {
        Check { name: self.0, state, found, why: self.1, advice: Some(advice) }
    }
}

/// What is looked at besides the kernel's files.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where images are to lie: an absolute path.
    pub scratch: PathBuf,
    /// Folders in which programs are looked for.
    pub programs: Vec<PathBuf>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether there is no warning.
    pub ready: bool,
    /// All that was looked at.
    pub checks: Vec<Check>,
}

/// Looks at a host.
pub fn look(files: &HostFiles, options: &Options) -> Report {
    let mut checks = processors(files);
    checks.extend(cpu::look(files));
    checks.extend(drive::look(files));
    checks.extend(system::look(files, options));
    let ready = checks.iter().all(|c| c.state != State::Warn);
    Report { ready, checks }
}
