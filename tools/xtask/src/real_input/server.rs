//! Starts and ends the server under test, and holds it to its contract: one line `listening on …`
//! on standard output when ready, exit 0 after SIGTERM, socket removed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cmd::{self, say};

/// A server that needs longer than this to open an image or to end is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the server is started.
pub(crate) struct Template {
    words: Vec<String>,
}

impl Template {
    /// Reads a command line with `{socket}` and `{node}` in it; words are split at spaces.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        for place in ["{socket}", "{node}"] {
            if !text.contains(place) {
                bail!("the server's command line lacks {place}: {text}");
            }
        }
        Ok(Self { words: text.split_whitespace().map(str::to_owned).collect() })
    }

    /// The release build of `polldisk`, built now.
    pub(crate) fn polldisk() -> Result<Self> {
        let binary = crate::suite::build_polldisk()?;
        let words = ["nbd", "--socket", "{socket}", "{node}"].map(str::to_owned);
        Ok(Self { words: [vec![binary.display().to_string()], words.to_vec()].concat() })
    }

    /// What makes images: `polldisk image`, or `qemu-img` where another server is tried.
    pub(crate) fn maker(&self) -> Command {
        let binary = self.words.first().map(Path::new).filter(|p| p.ends_with("polldisk"));
        let mut command = Command::new(binary.unwrap_or(Path::new("qemu-img")));
        if binary.is_some() {
            command.arg("image");
        }
        command
    }

    fn command(&self, socket: &Path, node: &str, read_only: bool) -> Command {
        let socket = socket.to_string_lossy();
        let fill = |word: &String| word.replace("{socket}", &socket).replace("{node}", node);
        let mut words = self.words.iter().map(fill);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).current_dir(crate::root());
        if read_only {
            command.arg("--read-only");
        }
        command
    }
}

/// The socket for the case in `folder`. Its path may have 107 bytes at most, and the cache folder's
/// may be long. One case uses one path: after a kill the stale socket must be replaced.
pub(crate) fn socket(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    std::env::temp_dir().join(format!("polldisk-{}-{name}.sock", std::process::id()))
}

/// A running server. Killed when dropped.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    shown: String,
    errors: PathBuf,
    lines: Receiver<String>,
}

impl Server {
    /// Starts a server for `node` and waits until it listens.
    pub(crate) fn start(
        template: &Template,
        folder: &Path,
        node: &str,
        read_only: bool,
    ) -> Result<Self> {
        let socket = socket(folder);
        let errors = folder.join("server.stderr");
        let log = File::options().create(true).append(true).open(&errors)?;
        let mut command = template.command(&socket, node, read_only);
        let shown = cmd::show(&command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start `{shown}`"))?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut server = Self { child, socket, shown, errors, lines };
        match server.lines.recv_timeout(PATIENCE) {
            Ok(line) if line.starts_with("listening on ") => Ok(server),
            Ok(line) => bail!("`{}` printed {line:?} first", server.shown),
            Err(RecvTimeoutError::Disconnected) => {
                let end = cmd::wait(&mut server.child, PATIENCE)?;
                bail!("`{}` ended before it listened: {end:?}\n{}", server.shown, server.errors())
            }
            Err(RecvTimeoutError::Timeout) => {
                let wait = PATIENCE.as_secs();
                bail!("`{}` did not listen in {wait} s\n{}", server.shown, server.errors())
            }
        }
    }

    /// The socket's path.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The export as libnbd and QEMU name it.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// The most memory that the server had in use, in MiB.
    pub(crate) fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let word = line.and_then(|line| line.split_whitespace().next()).context("no VmHWM")?;
        Ok(word.parse::<u64>()? / 1024)
    }

    /// Ends the server as a service manager does, and checks how it ends.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let Some(status) = cmd::wait(&mut self.child, PATIENCE)? else {
            bail!("`{}` did not end after SIGTERM\n{}", self.shown, self.errors());
        };
        if status.code() != Some(0) {
            bail!("`{}` ended with {status} after SIGTERM\n{}", self.shown, self.errors());
        }
        if self.socket.exists() {
            bail!("`{}` left its socket behind", self.shown);
        }
        // The reader comes to its end with the process; a grandchild may keep the pipe open.
        if let Ok(more) = self.lines.recv_timeout(Duration::from_secs(1)) {
            bail!("`{}` printed more than one line: {more:?}", self.shown);
        }
        Ok(())
    }

    /// Ends the server with SIGKILL. Its socket stays.
    pub(crate) fn kill(mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("`{}` was gone before SIGKILL: {status}\n{}", self.shown, self.errors());
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The end of what the server wrote to its standard error.
    fn errors(&self) -> String {
        let text = fs::read(&self.errors).unwrap_or_default();
        cmd::tail(&String::from_utf8_lossy(&text), 1500).to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && (self.child.kill().is_err() || self.child.wait().is_err())
        {
            say(&format!("cannot end `{}`", self.shown));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server made of a shell script; `{node}` is the script.
    fn start(script: &str) -> (PathBuf, Result<Server>) {
        let folder = std::env::temp_dir().join(format!(
            "xtask-server-{}-{:x}",
            std::process::id(),
            script.len()
        ));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("server.sh");
        fs::write(&file, script).unwrap();
        let template = Template::parse("sh {node} {socket}").unwrap();
        let server = Server::start(&template, &folder, &file.display().to_string(), false);
        (folder, server)
    }

    fn stop(script: &str) -> Result<()> {
        let (folder, server) = start(script);
        let server = server?;
        assert!(server.peak_memory()? < 100);
        let done = server.stop();
        let _ = fs::remove_file(socket(&folder));
        fs::remove_dir_all(folder)?;
        done
    }

    #[test]
    fn the_contract_is_enforced() {
        let good = "trap 'rm -f $1; exit 0' TERM; : >$1; echo listening on $1; while :; do sleep 0.01; done";
        stop(good).unwrap();
        for (bad, what) in [
            ("echo hello; sleep 5", "first"),
            ("exit 1", "before it listened"),
            (
                "trap 'exit 3' TERM; echo listening on $1; while :; do sleep 0.01; done",
                "exit status: 3",
            ),
            (
                "trap 'exit 0' TERM; : >$1; echo listening on $1; while :; do sleep 0.01; done",
                "socket behind",
            ),
            (
                "trap 'echo more; exit 0' TERM; rm -f $1; echo listening on $1; while :; do sleep 0.01; done",
                "more than one line",
            ),
        ] {
            let error = stop(bad).unwrap_err().to_string();
            assert!(error.contains(what), "{bad}: {error}");
        }
        assert!(Template::parse("server {socket}").is_err());
    }

    #[test]
    fn a_dead_server_cannot_be_killed() {
        let (folder, server) = start("echo listening on $1");
        thread::sleep(Duration::from_millis(200));
        assert!(server.unwrap().kill().is_err());
        let (_, server) = start("echo listening on $1; sleep 9");
        server.unwrap().kill().unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
