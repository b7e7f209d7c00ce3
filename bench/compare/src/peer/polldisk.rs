//! polldisk itself: `polldisk nbd` in a process of its own, or a guest's ring in this one.

use std::fmt;
use std::process::Command;

use bench::Error;
use bench::server::Server;
use node::NodeSpec;

use super::process::{Child, Process};
use super::{EXPORT, Place};
use crate::results::Frontend;

/// What is below the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaf {
    /// The NVMe driver on the model of a drive, whose blocks are the image's file.
    Model,
    /// The file, by io_uring, or by Linux AIO where it is in memory.
    File,
    /// A drive of this host, without an image.
    Device,
}

/// How it is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How it is asked.
    pub frontend: Frontend,
    /// What is below the image.
    pub leaf: Leaf,
    /// Memory for the map in bytes; its default without it.
    pub budget: Option<u64>,
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.leaf {
            Leaf::Model => "model",
            Leaf::File => "file",
            Leaf::Device => "device",
        })?;
        match self.budget {
            Some(bytes) => write!(f, ", l2-cache {} MiB", bytes as f64 / f64::from(1 << 20)),
            None => Ok(()),
        }
    }
}

pub(super) fn start(
    options: &Options,
    image: &NodeSpec,
    place: &Place<'_>,
) -> Result<Box<dyn Process>, Error> {
    let (socket, log) = (place.socket("polldisk"), place.log("polldisk"));
    let mut command = Command::new(place.program);
    command.args(arguments(options, image)).arg("--socket").arg(&socket);
    let server = Server::start("polldisk nbd", command, socket, log, place.core)?;
    Child::listening(server, vec![EXPORT.into()])
}

/// The process is pinned as a whole, like the others'; so `--cores` is not needed.
fn arguments(options: &Options, image: &NodeSpec) -> Vec<String> {
    let mut list = vec!["nbd".to_owned(), "--export".to_owned(), EXPORT.to_owned()];
    if let Some(bytes) = options.budget {
        list.extend(["--l2-cache".to_owned(), bytes.to_string()]);
    }
    list.push(image.to_string());
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line() {
        let options = Options { frontend: Frontend::Nbd, leaf: Leaf::Model, budget: Some(3 << 20) };
        let image = NodeSpec::parse("model:/s/a").unwrap();
        assert_eq!(
            arguments(&options, &image).join(" "),
            "nbd --export bench --l2-cache 3145728 model:/s/a"
        );
        assert_eq!(options.to_string(), "model, l2-cache 3 MiB");
    }
}
