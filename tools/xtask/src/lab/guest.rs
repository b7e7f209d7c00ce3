//! A guest of a lab: what is packed into it, how it is booted, and what its console says.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, now, program, say};
use crate::suite::Tally;

/// Programs and the shared libraries that they need, by their place in the guest.
pub(crate) fn programs(paths: &[PathBuf]) -> Result<BTreeMap<String, Vec<u8>>> {
    programs_from(paths, Path::new("/"))
}

/// The same for programs that were unpacked under `root` and not installed.
pub(crate) fn programs_from(paths: &[PathBuf], root: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|f| root.join(f));
    let mut files = BTreeMap::new();
    for path in paths {
        let name = path.file_name().context("a program without a name")?.to_string_lossy();
        files.insert(format!("bin/{name}"), fs::read(path)?);
        let mut ldd = program("ldd", [path]);
        ldd.env("LC_ALL", "C").env("LD_LIBRARY_PATH", std::env::join_paths(&folders)?);
        for library in libraries(&cmd::ok(&mut ldd)?) {
            let name = library.rsplit('/').next().unwrap_or(library);
            // The loader is named by its full path in each program; the others are looked for.
            let folder = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
            files.insert(format!("{folder}/{name}"), fs::read(library)?);
        }
    }
    Ok(files)
}

/// The paths in what `ldd` prints.
fn libraries(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/'))).collect()
}

/// Runs the emulator, passes commands of the guest on to it, and counts its cases. Lines of the guest
/// are shown as they come. `console` gets all that the guest prints, as it comes. It must end within `limit`.
pub(super) fn run(
    mut qemu: Command,
    folder: &Path,
    cases: &[&str],
    console: &Path,
    limit: Duration,
) -> Result<Tally> {
    let socket = std::env::temp_dir().join(format!("polldisk-{}.qmp", std::process::id()));
    let errors = folder.join("emulator.stderr");
    qemu.arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors)?);
    let mut emulator = Emulator(qemu.spawn().with_context(|| cmd::show(&qemu))?);
    let output = emulator.0.stdout.take().context("no output")?;
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut output = BufReader::new(output.take(16 << 20));
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let mut judge = Judge::new(cases);
    let mut file = fs::File::create(console)?;
    let (mut text, end) = (String::new(), now() + limit);
    let mut late = false;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(now())) {
            Ok(line) => {
                text.push_str(&line);
                text.push('\n');
                writeln!(file, "{line}")?;
                if let Some(command) = judge.line(&line) {
                    // What the guest has just let go of, the emulator may still hold for a moment.
                    let mut done = qmp(&socket, command);
                    for _ in 0..240 {
                        if done.is_ok() || emulator.0.try_wait()?.is_some() {
                            break;
                        }
                        thread::sleep(Duration::from_millis(250));
                        done = qmp(&socket, command);
                    }
                    // One that has ended is judged below, after what it said last.
                    if emulator.0.try_wait()?.is_none() {
                        done?;
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                late = true;
                break;
            }
        }
    }
    let status =
        cmd::wait(&mut emulator.0, if late { Duration::ZERO } else { Duration::from_secs(10) })?;
    let _ = fs::remove_file(&socket);
    if late {
        say(&format!("the guest did not end within {} s", limit.as_secs()));
    } else if !status.is_some_and(|s| s.success()) {
        let why = fs::read_to_string(&errors).unwrap_or_default();
        let (text, why) = (cmd::tail(&text, 1500), cmd::tail(&why, 1500));
        // After a case that failed, that is what counts.
        if judge.tally.failed == 0
            && let Some(signal) = status.and_then(|s| s.signal())
        {
            return Err(Crashed(signal, format!("{text}\n{why}")).into());
        }
        bail!("the emulator failed ({status:?})\n{text}\n{why}");
    }
    let tally = judge.end();
    if tally.failed > 0 {
        println!("{}", cmd::tail(&text, 3000));
    }
    Ok(tally)
}

/// The emulator was ended by a signal, which none of ours sends: a fault of its own, whatever its guest did.
#[derive(Debug)]
struct Crashed(i32, String);

impl std::error::Error for Crashed {}

impl fmt::Display for Crashed {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "the emulator crashed, by signal {}\n{}", self.0, self.1)
    }
}

/// Runs a boot, and once more if the emulator crashed: not if a case failed.
pub(super) fn despite_crash(mut boot: impl FnMut() -> Result<Tally>) -> Result<Tally> {
    match boot() {
        Err(error) if error.is::<Crashed>() => {
            say(&format!("lab: {error:#}"));
            say("lab: that is no fault of what is tested: the boot is tried once more");
            boot()
        }
        done => done,
    }
}

/// Ends with the harness, whatever happens to that.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives the emulator one command and waits for its answer.
fn qmp(socket: &Path, command: &str) -> Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut ask = |command: &str| -> Result<()> {
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        // Events come in between.
        for line in lines.by_ref() {
            let line = line?;
            if line.contains("\"error\"") {
                bail!("{command}: {line}");
            }
            if line.contains("\"return\"") {
                return Ok(());
            }
        }
        bail!("{command}: no answer")
    };
    ask("{\"execute\": \"qmp_capabilities\"}")?;
    ask(command)
}

/// Follows the guest's lines. Each case must be heard of once.
struct Judge<'a> {
    open: Vec<&'a str>,
    tally: Tally,
    done: bool,
}

impl<'a> Judge<'a> {
    fn new(cases: &[&'a str]) -> Judge<'a> {
        Judge { open: cases.to_vec(), tally: Tally::default(), done: false }
    }

    /// Takes a line; returns a command for the emulator if it is one.
    fn line<'l>(&mut self, line: &'l str) -> Option<&'l str> {
        let rest = line.find("LAB ").map(|at| &line[at + 4..])?;
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let name = rest.split([' ', ':']).next().unwrap_or_default();
        let known = self.open.iter().position(|case| *case == name);
        match (word, known) {
            ("QMP", _) => return Some(rest),
            ("NOTE", _) => say(&format!("lab: {rest}")),
            ("DONE", _) => self.done = true,
            ("ok", Some(at)) => {
                self.open.swap_remove(at);
                self.tally.passed += 1;
                say(&format!("lab: ok {rest} s"));
            }
            ("skipped", Some(at)) => {
                self.open.swap_remove(at);
                self.tally.skipped += 1;
                println!("skipped: lab: {rest}");
            }
            _ => {
                if let ("FAIL", Some(at)) = (word, known) {
                    self.open.swap_remove(at);
                }
                self.tally.failed += 1;
                say(&format!("lab: FAILED {rest}"));
            }
        }
        None
    }

    /// What is left over when the guest has ended is failed too.
    fn end(mut self) -> Tally {
        for case in self.open {
            say(&format!("lab: FAILED {case}: not heard of"));
            self.tally.failed += 1;
        }
        self.tally.failed += u64::from(!self.done);
        self.tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_a_program() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibz.so => not found\n";
        assert_eq!(libraries(text), ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }

    #[test]
    fn a_crash_of_the_emulator_is_forgiven_once() {
        let crashes = |most: u32, kind: fn() -> anyhow::Error| {
            let mut boots = 0;
            let done = despite_crash(|| {
                boots += 1;
                if boots <= most { Err(kind()) } else { Ok(Tally::default()) }
            });
            (done.is_ok(), boots)
        };
        let crash = || anyhow::Error::from(Crashed(11, String::new()));
        assert_eq!(crashes(0, crash), (true, 1));
        assert_eq!(crashes(1, crash), (true, 2));
        assert_eq!(crashes(2, crash), (false, 2));
        assert_eq!(crashes(1, || anyhow::anyhow!("anything else")), (false, 1));
    }

    #[test]
    fn cases_are_counted_once() {
        let run = |lines: &[&str]| {
            let mut judge = Judge::new(&["a", "b"]);
            for line in lines {
                judge.line(line);
            }
            let t = judge.end();
            (t.passed, t.failed, t.skipped)
        };
        assert_eq!(run(&["LAB ok a 1.5", "[ 1.0] xLAB ok b 2", "LAB DONE 9"]), (2, 0, 0));
        assert_eq!(run(&["LAB ok a 1.5", "LAB skipped b: no", "LAB DONE"]), (1, 0, 1));
        assert_eq!(run(&["LAB ok a 1", "LAB ok a 1", "LAB ok b 2", "LAB DONE"]), (2, 1, 0));
        assert_eq!(run(&["LAB ok a 1", "LAB DONE"]), (1, 1, 0), "b is missing");
        assert_eq!(run(&["LAB ok a 1", "LAB FAIL b after", "LAB DONE"]), (1, 1, 0));
        assert_eq!(run(&["LAB ok a 1", "LAB ok b 1"]), (2, 1, 0), "no end");
        assert_eq!(run(&["LAB ok a 1", "LAB ok b 1", "LAB FAIL kernel: x", "LAB DONE"]).1, 1);
        let mut judge = Judge::new(&[]);
        assert_eq!(judge.line("LAB QMP {\"a\": 1}"), Some("{\"a\": 1}"));
    }
}
