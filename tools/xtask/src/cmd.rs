//! Runs other programs with a time limit, and prints progress. Used by every other module, on the
//! main thread; two short threads per program read its output.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Limit for programs that only shuffle a few hundred MiB.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// How much output of one program is kept; none of ours prints more unless it is broken.
const KEPT: u64 = 16 << 20;

static START: LazyLock<Instant> = LazyLock::new(now);

/// The wall clock of the harness.
#[expect(clippy::disallowed_methods, reason = "a harness that runs programs, no data path")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Prints one line of progress with the seconds since the start.
pub(crate) fn say(text: &str) {
    println!("[{:6.1}s] {text}", START.elapsed().as_secs_f64());
}

/// What a finished program left behind.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// The end of both outputs, for an error message.
    pub(crate) fn tail(&self) -> String {
        format!("{}{}", tail(&self.stdout, 1500), tail(&self.stderr, 1500))
    }
}

/// The last `limit` bytes of `text`, cut at a character.
pub(crate) fn tail(text: &str, limit: usize) -> &str {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].trim_end()
}

/// Reads `from` to its end on a thread of its own, so that a full pipe never blocks the program.
fn collect(from: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    if let Some(from) = from {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.take(KEPT).read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        });
    }
    receiver
}

/// Waits for `child` until the limit, and kills it then. `None` means that it was killed.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if now() >= end {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program to its end and keeps its output. Fails when it cannot start or is too slow.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    if command.get_envs().all(|(name, _)| name != "LC_ALL") {
        command.env("LC_ALL", "C.UTF-8");
    }
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let status = wait(&mut child, limit)?;
    // A grandchild may hold the pipe open: do not wait for it for ever.
    let text = |from: Receiver<Vec<u8>>| {
        let bytes = from.recv_timeout(Duration::from_secs(5)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (stdout, stderr) = (text(out), text(err));
    let Some(status) = status else {
        let (out, err) = (tail(&stdout, 1500), tail(&stderr, 1500));
        bail!("`{shown}` did not end within {} s\n{out}\n{err}", limit.as_secs());
    };
    Ok(Finished { status, stdout, stderr })
}

/// Runs a program that must exit with 0; its standard output is returned.
pub(crate) fn ok(command: &mut Command) -> Result<String> {
    ok_within(command, LIMIT)
}

/// [`ok`] with another limit.
pub(crate) fn ok_within(command: &mut Command, limit: Duration) -> Result<String> {
    let done = run(command, limit)?;
    if !done.status.success() {
        bail!("`{}` failed ({})\n{}", show(command), done.status, done.tail());
    }
    Ok(done.stdout)
}

/// A command with its arguments, from anything that looks like a list of strings.
pub(crate) fn program<S: AsRef<std::ffi::OsStr>>(
    name: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(name);
    command.args(arguments);
    command
}

/// The command line as a person would type it, cut when it is long.
pub(crate) fn show(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for word in command.get_args() {
        line.push(' ');
        line.push_str(&word.to_string_lossy());
        if line.len() > 600 {
            line.push_str(" …");
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_limit() {
        let done =
            run(&mut program("sh", ["-c", "echo out; echo err >&2; exit 3"]), LIMIT).unwrap();
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!(done.status.code(), Some(3));
        assert!(ok(&mut program("sh", ["-c", "exit 1"])).is_err());
        let late = run(&mut program("sleep", ["60"]), Duration::from_millis(50));
        assert!(late.is_err_and(|error| error.to_string().contains("did not end")));
    }

    #[test]
    fn tail_cuts_at_a_character() {
        assert_eq!(tail("aäb", 2), "b");
        assert_eq!(tail("ab", 9), "ab");
    }
}
