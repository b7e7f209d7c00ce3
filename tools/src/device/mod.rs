//! `polldisk device …`: NVMe devices and the host's readiness, one file a command. Control path
//! throughout, on the main thread.

mod bind;
mod claim;
mod doctor;
#[cfg(test)]
mod fake;
mod format;
mod health;
mod host;
mod identify;
mod list;
mod uses;

use clap::Subcommand;
use node::DeviceSpec;

use host::Host;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the NVMe devices of this host, and what uses them.
    List(list::List),
    /// Give a device to polldisk: bind it to vfio-pci.
    Bind(bind::Bind),
    /// Give a device back to the kernel's driver.
    Unbind(bind::Unbind),
    /// Tell what a controller is and which namespaces it has.
    Identify(identify::Identify),
    /// Tell how a drive is; exit code 1 if it warns.
    Health(health::Health),
    /// Format a namespace: all data on it is lost.
    Format(format::Format),
    /// Tell whether this host is ready, and what would mend it.
    Doctor(doctor::Doctor),
}

/// Runs one; returns the exit code.
pub(crate) fn run(command: Command) -> anyhow::Result<u8> {
    let host = Host::real();
    match command {
        Command::List(c) => list::run(&host, &c).map(|()| 0),
        Command::Bind(c) => bind::bind(&host, &c).map(|()| 0),
        Command::Unbind(c) => bind::unbind(&host, &c).map(|()| 0),
        Command::Identify(c) => identify::run(&c).map(|()| 0),
        Command::Health(c) => health::run(&c),
        Command::Format(c) => format::run(&c).map(|()| 0),
        Command::Doctor(c) => doctor::run(&host, &c),
    }
}

/// Parses the name of a device, for clap.
fn device(text: &str) -> Result<DeviceSpec, String> {
    DeviceSpec::parse(text).map_err(|e| e.to_string())
}
