//! `polldisk smapiv3`: what the toolstack (xapi-storage-script) runs. Each method of its interface is an
//! executable of its own, which `install` puts in place; each runs `call`, which asks the daemon.

mod call;
mod install;
mod query;

pub(crate) use call::daemon;

use std::path::PathBuf;

/// The two kinds of plugins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Repositories and their disks.
    Volume,
    /// How guests get at the disks.
    Datapath,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Volume => "volume",
            Kind::Datapath => "datapath",
        }
    }
}

/// Plugins for the toolstack.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Put the plugins where the toolstack finds them.
    Install {
        /// The folder that has the folders `volume` and `datapath`.
        #[arg(long, value_name = "DIR", default_value = "/usr/libexec/xapi-storage-script")]
        root: PathBuf,
        /// The program that they run, where that is not this one: for packages.
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
    },
    /// Carry out a method: its arguments are read as JSON from the standard input, its answer is
    /// written. The daemon is started if it does not run; POLLDISK_SOCKET says where it is.
    Call {
        /// Which plugin.
        kind: Kind,
        /// The method, as `SR.attach`.
        method: String,
    },
}

/// Runs a command.
pub(crate) fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Install { root, binary } => install::run(&root, binary),
        Command::Call { kind, method } => call::run(kind, &method),
    }
}
