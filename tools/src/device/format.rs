//! `polldisk device format`: Format NVM on a namespace. All data of it is lost, so it asks.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use node::{Admin, DeviceSpec};
use nvme_spec::SecureErase;
use reactor::Clock;
use serde::Serialize;

use crate::image::print::{self, Output, bytes};
use crate::output::usage;

/// Format a namespace: all data on it is lost.
#[derive(Args)]
pub(crate) struct Format {
    /// Bytes of a block afterwards; as they are now if not given.
    #[arg(long, value_name = "SIZE", value_parser = lba)]
    lba: Option<u32>,
    /// Also erase what is on the medium, or throw the key away.
    #[arg(long, value_enum, value_name = "HOW")]
    secure_erase: Option<Erase>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
    /// The namespace: vfio:ADDRESS/NSID (the device alone if it has only one),
    /// vfio-user:SOCKET/NSID or model:PATH.
    #[arg(value_name = "NODE", value_parser = super::device)]
    device: DeviceSpec,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Erase {
    UserData,
    Crypto,
}

fn lba(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(n @ (512 | 4096)) => Ok(n),
        _ => Err("blocks of 512 and 4096 bytes are possible".to_owned()),
    }
}

/// What became of it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    node: String,
    serial: String,
    /// Namespaces whose data is lost.
    formatted: Vec<u32>,
    nsid: u32,
    size: Option<u64>,
    lba_size: Option<u32>,
}

/// Asks, formats and prints what became of it.
pub(crate) fn run(args: &Format) -> anyhow::Result<()> {
    // Before the device is touched at all.
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !args.yes && !terminal {
        return usage("there is no terminal to ask on; --yes formats without asking");
    }
    let signals = crate::signals::Signals::take()?;
    let mut admin = Admin::open(&args.device, true, Clock::real())?;
    let done = format(args, &mut admin, &signals);
    let closed = admin.close();
    let done = done?;
    if args.output.is_json() {
        print::json(&done)?;
    } else {
        let size = done.size.map_or("?".to_owned(), bytes);
        let lba = done.lba_size.map_or("?".to_owned(), |n| n.to_string());
        print::line(&format!("namespace {} is formatted: {size}, blocks of {lba}", done.nsid))?;
    }
    Ok(closed?)
}

fn format(
    args: &Format,
    admin: &mut Admin,
    signals: &crate::signals::Signals,
) -> anyhow::Result<Done> {
    let info = admin.info()?;
    let (model, serial) = (info.model.clone(), info.serial.clone());
    let nsid = namespace(args, admin)?;
    let erase = match args.secure_erase {
        None => SecureErase::None,
        Some(Erase::UserData) => SecureErase::UserData,
        Some(Erase::Crypto) => SecureErase::Crypto,
    };
    let touched = admin.format_touches(nsid, erase);
    if !args.yes {
        let what = warning(&args.device, &format!("{model} {serial:?}"), admin, &touched);
        tell!("{what}");
        // A drive without a serial number is named by its node.
        let node = args.device.to_string();
        ask(if serial.is_empty() { &node } else { &serial })?;
    }
    let format = nvme::Format { nsid, block_size: args.lba, erase };
    // From here on a signal does not end it: half a format leaves a drive that cannot be used.
    let told = signals.told();
    let mut progress = Progress::new();
    let result = admin.format(&format, &mut |remains| {
        if told.try_recv().is_ok() {
            tell!("\npolldisk: a format cannot be stopped once it runs; waiting for its end");
        }
        progress.at(remains);
    });
    progress.end();
    result?;
    let now = admin.namespaces().iter().find(|n| n.nsid == nsid);
    Ok(Done {
        node: args.device.to_string(),
        serial,
        formatted: touched,
        nsid,
        size: now.map(|n| n.info.size),
        lba_size: now.map(|n| n.info.block_size),
    })
}

/// The namespace that is meant: the one named, or the only one.
fn namespace(args: &Format, admin: &Admin) -> anyhow::Result<u32> {
    let used = admin.namespaces().iter().map(|n| n.nsid);
    let all: Vec<u32> = used.chain(admin.refused().iter().map(|r| r.nsid)).collect();
    let list = || all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match (args.device.nsid(), all.as_slice()) {
        (_, []) => bail!("{}: the device has no namespace", args.device),
        (Some(nsid), all) if all.contains(&nsid) => Ok(nsid),
        (Some(nsid), _) => {
            bail!("{}: the device has no namespace {nsid}; there are {}", args.device, list())
        }
        (None, [one]) => Ok(*one),
        (None, _) => {
            usage(format!("which namespace? There are {}: {}/NSID names one", list(), args.device))
        }
    }
}

/// What would be lost.
fn warning(device: &DeviceSpec, drive: &str, admin: &Admin, touched: &[u32]) -> String {
    let one = |&nsid: &u32| {
        let found = admin.namespaces().iter().find(|n| n.nsid == nsid);
        match found {
            Some(n) => format!("{nsid} ({})", bytes(n.info.size)),
            None => nsid.to_string(),
        }
    };
    let list: Vec<String> = touched.iter().map(one).collect();
    let all = match touched.len() {
        0 | 1 => "",
        _ => {
            " The controller formats all namespaces together, also those that other controllers \
              of the drive have."
        }
    };
    format!("{device} is {drive}.\nALL DATA on namespace {} WILL BE LOST.{all}", list.join(", "))
}

/// Has the user type a word; the error is that something else was typed.
fn ask(word: &str) -> anyhow::Result<()> {
    let mut err = std::io::stderr();
    let _ = write!(err, "Type {word} to go on: ").and_then(|()| err.flush());
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("cannot read the answer")?;
    if !is_answer(&line, word) {
        bail!("that is not {word}; nothing was done");
    }
    Ok(())
}

fn is_answer(line: &str, word: &str) -> bool {
    !word.trim().is_empty() && line.trim() == word.trim()
}

/// Progress on standard error, if that is a terminal.
struct Progress {
    clock: Option<Clock>,
    began: u64,
    next: u64,
}

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

impl Progress {
    fn new() -> Progress {
        let clock = std::io::stderr().is_terminal().then(Clock::real);
        let began = clock.as_ref().map_or(0, Clock::now);
        Progress { clock, began, next: 0 }
    }

    fn at(&mut self, remains: Option<u8>) {
        let Some(clock) = &self.clock else { return };
        let now = clock.now();
        if now < self.next {
            return;
        }
        self.next = now + SECOND;
        let seconds = now.saturating_sub(self.began) / SECOND;
        let done = remains.map_or(String::new(), |r| format!(", {} %", 100 - r.min(100)));
        // Nobody can be told that standard error is gone.
        let _ = write!(std::io::stderr(), "    formatting: {seconds} s{done}   \r");
    }

    fn end(self) {
        if self.clock.is_some() && self.next > 0 {
            tell!("");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_answer;

    #[test]
    fn only_the_word_itself_is_an_answer() {
        assert!(is_answer("S123\n", "S123"));
        assert!(is_answer(" S 12 3\r\n", "S 12 3"));
        for (line, word) in [("", ""), ("\n", " "), ("y\n", "S1"), ("s1\n", "S1"), ("S1 x\n", "S1")]
        {
            assert!(!is_answer(line, word), "{line:?}");
        }
    }
}
