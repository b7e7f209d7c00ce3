//! qemu-dp, the datapath of SMAPIv3: one process, told by QMP what to open and to export, as the
//! repository's plugin tells it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bench::Error;
use bench::server::Server;
use serde_json::{Value, json};

use super::process::{Child, Process, connect};
use super::qemu::Options;
use super::{EXPORT, Place};

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest line of QMP in bytes, and events at most before an answer.
const LINE: u64 = 1 << 20;
const EVENTS: usize = 100;

pub(super) fn start(
    options: &Options,
    image: &Path,
    place: &Place<'_>,
) -> Result<Box<dyn Process>, Error> {
    let program = super::find("qemu-dp").ok_or_else(|| Error::other("there is no qemu-dp"))?;
    let (control, nbd, log) = (place.socket("qmp"), place.socket("qemu-dp"), place.log("qemu-dp"));
    let _ = std::fs::remove_file(&nbd);
    let mut command = Command::new(program);
    command.arg(&control);
    let name = format!("qemu-dp ({options})");
    let mut server = Server::start(&name, command, control.clone(), log, place.core)?;
    server.wait_for_socket()?;
    let monitor = connect(|| Monitor::connect(&control));
    if let Err(e) = monitor.and_then(|mut m| m.serve(options, image, &nbd)) {
        return Err(server.explain(&e.to_string()));
    }
    Ok(Box::new(Dp { child: Child::new(server, vec![EXPORT.into()]), control, nbd }))
}

/// The process, and where it serves.
struct Dp {
    child: Child,
    control: PathBuf,
    nbd: PathBuf,
}

impl Process for Dp {
    fn socket(&self) -> &Path {
        &self.nbd
    }

    fn exports(&self) -> &[String] {
        self.child.exports()
    }

    fn pid(&self) -> u32 {
        self.child.pid()
    }

    fn explain(&mut self, why: &str) -> Error {
        self.child.explain(why)
    }

    fn stop(self: Box<Self>) -> Result<(), Error> {
        // It may hang up before it has answered.
        let _ = Monitor::connect(&self.control).and_then(|mut m| m.ask("quit", &json!({})));
        self.child.end()
    }
}

/// A connection to QEMU's monitor (its docs/interop/qmp-spec).
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(socket: &Path) -> Result<Monitor, Error> {
        let fail = |e| Error::other(format!("QMP at {}: {e}", socket.display()));
        let stream = UnixStream::connect(socket).map_err(fail)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        let mut monitor = Monitor { stream: BufReader::new(stream) };
        monitor.line()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        let read = (&mut self.stream).take(LINE).read_line(&mut line);
        read.map_err(|e| Error::other(format!("QMP: {e}")))?;
        serde_json::from_str(&line).map_err(|e| Error::other(format!("QMP: {line:?}: {e}")))
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<(), Error> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        let sent = writeln!(self.stream.get_mut(), "{text}");
        sent.map_err(|e| Error::other(format!("QMP: {e}")))?;
        for _ in 0..EVENTS {
            let answer = self.line()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::other(format!("{command}: {why}")));
            }
        }
        Err(Error::other(format!("{command}: {EVENTS} events and no answer")))
    }

    fn serve(&mut self, options: &Options, image: &Path, nbd: &Path) -> Result<(), Error> {
        self.ask("blockdev-add", &node(options, image))?;
        let addr = json!({ "type": "unix", "data": { "path": nbd } });
        self.ask("nbd-server-start", &json!({ "addr": addr }))?;
        self.ask("nbd-server-add", &json!({ "device": EXPORT, "writable": true }))
    }
}

/// The image as a node; its name is the export's.
fn node(options: &Options, image: &Path) -> Value {
    let cache = json!({ "direct": options.direct, "no-flush": options.no_flush });
    let file = json!({
        "driver": "file", "filename": image, "aio": options.aio.name(), "cache": cache,
    });
    let mut node = json!({
        "driver": "qcow2", "node-name": EXPORT, "cache": cache, "discard": "unmap", "file": file,
    });
    if let Some((_, cache)) = options.cache {
        node["l2-cache-size"] = cache.bytes.into();
        node["l2-cache-entry-size"] = cache.entry.into();
    }
    node
}

#[cfg(test)]
mod tests {
    use super::super::qemu::Cache;
    use super::*;

    #[test]
    fn the_node_has_what_the_profile_varies() {
        let cache = Some(('A', Cache { bytes: 3 << 20, entry: 65536 }));
        let options = Options { no_flush: true, cache, ..Options::default() };
        let node = node(&options, Path::new("/s/a"));
        assert_eq!(node["l2-cache-size"], 3 << 20);
        assert_eq!(node["l2-cache-entry-size"], 65536);
        assert_eq!(node["cache"], json!({ "direct": true, "no-flush": true }));
        assert_eq!(node["file"]["aio"], "native");
        assert_eq!(node["node-name"], EXPORT);
    }
}
