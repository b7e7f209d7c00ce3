//! `polldisk top`: what the daemon's reactors and disks are doing, as the differences between what it
//! tells at two moments.

mod rates;
mod table;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use reactor::Clock;
use serde::Deserialize as _;
use serde_json::json;

use crate::ctl::DAEMON;
use crate::ctl::rpc::Client;
use crate::image::print::{Output, STDOUT, out};
use rates::{Rates, Stats};

/// Show what the daemon's reactors and disks are doing, the busiest disk first.
#[derive(Args)]
pub(crate) struct Top {
    /// The daemon's control socket.
    #[arg(short, long, value_name = "PATH", default_value = DAEMON)]
    socket: PathBuf,
    /// Seconds between two looks.
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = interval)]
    interval: Duration,
    /// Print the figures of one interval, with all disks, and end.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    output: Output,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok();
    let seconds = seconds.filter(|s| (0.1..=3600.0).contains(s));
    Ok(Duration::from_secs_f64(seconds.ok_or("0.1 to 3600 seconds are possible")?))
}

/// Disks that a screen shows.
const SCREEN: usize = 30;

/// To the upper left corner, and forget what is there.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What was told at a moment.
struct Sample {
    at_ns: u64,
    stats: Stats,
}

/// The daemon, which may go away and come back.
struct Daemon<'a> {
    socket: &'a Path,
    client: Client,
    clock: Clock,
}

impl<'a> Daemon<'a> {
    fn connect(socket: &'a Path) -> anyhow::Result<Daemon<'a>> {
        Ok(Daemon { socket, client: Client::connect(socket)?, clock: Clock::real() })
    }

    fn look(&mut self) -> anyhow::Result<Sample> {
        let told = self.client.call("stats", json!({}))?;
        let at_ns = self.clock.now();
        let stats = Stats::deserialize(&told).context(
            "the server's figures are not understood: it is no `polldisk serve` of this version",
        )?;
        Ok(Sample { at_ns, stats })
    }

    /// Connects again, and begins anew.
    fn again(&mut self) -> anyhow::Result<Sample> {
        self.client = Client::connect(self.socket)?;
        self.look()
    }
}

/// Shows figures until it is ended.
pub(crate) fn run(top: &Top) -> anyhow::Result<u8> {
    let screen = std::io::stdout().is_terminal() && !top.once && !top.output.is_json();
    let mut daemon = Daemon::connect(&top.socket)?;
    let mut last = Some(daemon.look()?);
    loop {
        std::thread::sleep(top.interval);
        let looked = match &last {
            Some(_) => daemon.look(),
            None => daemon.again(),
        };
        let now = match looked {
            Ok(now) => now,
            Err(e) if top.once => return Err(e),
            Err(e) => {
                last = None;
                let why = crate::output::explain(&e);
                match screen {
                    true => print(&format!("{CLEAR}polldisk top: {why}; trying again\n"))?,
                    false => tell!("polldisk top: {why}; trying again"),
                }
                continue;
            }
        };
        if let Some(last) = last {
            let rates = Rates::between(&last.stats, &now.stats, now.at_ns - last.at_ns);
            let text = match (top.output.is_json(), screen) {
                (true, _) => format!("{}\n", rates.as_json()),
                (false, true) => format!("{CLEAR}{}", table::text(&rates, SCREEN)),
                (false, false) => table::text(&rates, usize::MAX),
            };
            print(&text)?;
            if top.once {
                return Ok(0);
            }
        }
        last = Some(now);
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = out();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        bail!(STDOUT);
    }
    Ok(())
}
