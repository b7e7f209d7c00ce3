//! nbdkit: with its plugin `memory` it is the floor, what NBD costs where there is nothing below it;
//! with `file` it is a raw file through the page cache.

use std::path::Path;
use std::process::Command;

use bench::Error;
use bench::server::Server;

use super::process::{Child, Process};
use super::{EXPORT, Place};

pub(super) fn start_memory(size: u64, place: &Place<'_>) -> Result<Box<dyn Process>, Error> {
    start("memory", &size.to_string(), place)
}

pub(super) fn start_file(image: &Path, place: &Place<'_>) -> Result<Box<dyn Process>, Error> {
    start("file", &format!("file={}", image.display()), place)
}

fn start(plugin: &str, what: &str, place: &Place<'_>) -> Result<Box<dyn Process>, Error> {
    let name = format!("nbdkit {plugin}");
    let (socket, log) = (place.socket("nbdkit"), place.log("nbdkit"));
    let server = Server::start(&name, command(plugin, what, &socket), socket, log, place.core)?;
    Child::listening(server, vec![EXPORT.into()])
}

fn command(plugin: &str, what: &str, socket: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    // In the foreground: then it is our child, and ends with its word.
    command.arg("--foreground").arg("--unix").arg(socket).args(["-e", EXPORT]);
    command.args([plugin, what]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        let line = format!("{:?}", command("memory", "1048576", Path::new("/s/a.sock")));
        assert_eq!(
            line,
            r#""nbdkit" "--foreground" "--unix" "/s/a.sock" "-e" "bench" "memory" "1048576""#
        );
    }
}
