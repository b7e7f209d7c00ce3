//! What scripts rely on: the JSON of `demo` and `bench`, and how `nbd` begins and ends.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

fn polldisk(args: &[&str]) -> Command {
    let mut command = Command::new(POLLDISK);
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs a command whose output is JSON; its exit code must be `code`.
fn json(args: &[&str], code: i32) -> Value {
    let out = polldisk(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    serde_json::from_slice(&out.stdout).unwrap()
}

const SMALL: [&str; 6] = ["demo", "--json", "--seconds", "0.5", "--size", "8M"];

#[test]
fn demo_says_what_scripts_read() {
    let r = json(&SMALL, 0);
    assert_eq!(r["verified"], true);
    assert!(r["policy"] == "poll" || r["policy"] == "adaptive");
    assert_eq!(r["reread_bytes"], 8 << 20);
    for key in ["written_bytes", "verified_bytes", "requests"] {
        assert!(r[key].as_u64().unwrap() > 0, "{key}");
    }
    for key in ["iops", "notifications", "allocations", "locks"] {
        assert!(r[key].is_number(), "{key}");
    }
    assert!(r["syscalls"].is_number() || r["syscalls"].is_null());
    for key in ["p50", "p99", "p999"] {
        assert!(r["latency_ns"][key].as_u64().unwrap() > 0, "{key}");
    }
    let depths: Vec<u64> =
        r["phases"].as_array().unwrap().iter().map(|p| p["depth"].as_u64().unwrap()).collect();
    assert_eq!(depths, [1, 32, 128, 32, 32]);
}

#[test]
fn demo_notices_a_changed_byte() {
    let r = json(&[&SMALL[..], &["--inject", "corrupt"]].concat(), 1);
    assert_eq!(r["verified"], false);
    assert!(r["failure"].as_str().unwrap().contains("wrong data"));
}

#[test]
fn demo_serves_an_image_and_spares_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("raw.img");
    let data: Vec<u8> = (0..4u32 << 20).map(|i| (i / 997) as u8).collect();
    std::fs::write(&image, &data).unwrap();
    let path = image.to_str().unwrap();
    let args = ["demo", "--json", "--seconds", "0.5", "-f", "raw", "--image", path];
    let r = json(&args, 0);
    assert_eq!(r["verified"], true, "{}", r["failure"]);
    assert!(r["compared_with"].is_string());
    assert!(std::fs::read(&image).unwrap() == data, "the image was written to");
}

#[test]
fn wrong_usage_is_exit_code_2_and_failure_is_1() {
    let code = |args: &[&str]| polldisk(args).output().unwrap().status.code();
    assert_eq!(code(&["demo", "--no-such-option"]), Some(2));
    assert_eq!(code(&["demo", "--size", "5"]), Some(2));
    assert_eq!(code(&["demo", "--cores", "4000"]), Some(1));
    assert_eq!(code(&["nbd", "--socket", "/x/y", "file:/no/such/image"]), Some(1));
    assert_eq!(code(&["nbd", "--socket", "/x/y", "json:{}"]), Some(1));
}

struct Server(Child);

impl Server {
    /// Starts a server and waits until it says that it listens.
    fn start(socket: &Path, node: &str, more: &[&str]) -> Server {
        let mut command = polldisk(&["nbd", "--socket", socket.to_str().unwrap(), node]);
        let mut child = command.args(more).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, format!("listening on {}\n", socket.display()));
        Server(child)
    }

    /// Sends a signal and waits for the end; the exit code.
    fn end(&mut self, signal: &str) -> Option<i32> {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{signal} had no effect");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn image(path: &Path) {
    let args = ["image", "create", path.to_str().unwrap(), "16M"];
    let out = polldisk(&args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn nbd_begins_and_ends_as_promised() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let (path, socket) = (dir.path().join("a.qcow2"), dir.path().join("s"));
    image(&path);
    for node in [format!("file:{}", path.display()), format!("model:{}", path.display())] {
        for signal in ["-TERM", "-INT"] {
            let mut server = Server::start(&socket, &node, &[]);
            let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            assert_eq!(server.end(signal), Some(0), "{node}");
            assert!(!socket.exists());
        }
    }
}

#[test]
fn nbd_refuses_what_is_in_use_and_shares_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (path, socket) = (dir.path().join("a.qcow2"), dir.path().join("s"));
    let other = dir.path().join("t");
    image(&path);
    let node = format!("model:{}", path.display());
    let refused = |socket: &Path, more: &[&str]| {
        let mut command = polldisk(&["nbd", "--socket", socket.to_str().unwrap(), &node]);
        let mut child =
            command.args(more).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let status = child.wait().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(status.code(), Some(1), "{text}");
        text
    };
    let mut server = Server::start(&socket, &node, &[]);
    assert!(refused(&other, &[]).contains("in use"));
    assert!(refused(&other, &["--read-only"]).contains("in use"));
    assert_eq!(server.end("-KILL"), None);
    assert!(socket.exists(), "a killed server leaves its socket");
    // The stale socket is replaced; two that only read get along; a live socket is refused.
    let mut one = Server::start(&socket, &node, &["--read-only"]);
    let mut two = Server::start(&other, &node, &["--read-only"]);
    assert!(refused(&socket, &["--read-only"]).contains(socket.to_str().unwrap()));
    assert_eq!((one.end("-TERM"), two.end("-TERM")), (Some(0), Some(0)));
}

#[test]
fn a_refused_image_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    image(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = usize::from_be_bytes(bytes[40..48].try_into().unwrap());
    // An unknown autoclear feature, which a writer clears; and no writer can be had, for this.
    bytes[90] = 1;
    bytes[l1 + 7] = 1;
    std::fs::write(&path, &bytes).unwrap();
    for node in [path.display().to_string(), format!("model:{}", path.display())] {
        let out = polldisk(&["nbd", "--socket", "/x/y", &node]).output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{text}");
        assert!(text.contains("L1 entry 0") && text.contains("not be written"), "{text}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{node}: the file has changed");
    }
}

#[test]
fn a_signal_ends_what_is_not_serving_yet() {
    use std::os::unix::process::ExitStatusExt;
    let dir = tempfile::tempdir().unwrap();
    let (path, socket) = (dir.path().join("a.qcow2"), dir.path().join("s"));
    image(&path);
    let mut first = Server::start(&socket, path.to_str().unwrap(), &[]);
    // The second waits a second for the image; or it waits no more and has failed.
    let other = dir.path().join("t");
    let args = ["nbd", "--socket", other.to_str().unwrap(), path.to_str().unwrap()];
    let mut second = Server(polldisk(&args).stderr(Stdio::null()).spawn().unwrap());
    std::thread::sleep(Duration::from_millis(200));
    let pid = second.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = second.0.wait().unwrap();
    assert!(status.signal() == Some(15) || status.code() == Some(1), "{status}");
    assert_eq!(first.end("-TERM"), Some(0));
}

#[test]
fn an_interrupted_demo_leaves_no_scratch() {
    let dir = tempfile::tempdir().unwrap();
    // A shell starts what goes on in the background with this signal ignored, and all that it starts.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", POLLDISK, "demo", "--seconds", "60", "--size", "8M"]);
    let demo = command
        .stdin(Stdio::null())
        .env("TMPDIR", dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut demo = Server(demo);
    let began = Instant::now();
    while std::fs::read_dir(dir.path()).unwrap().next().is_none() {
        assert!(began.elapsed() < Duration::from_secs(20), "no scratch folder");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(demo.end("-INT"), None, "died of the signal");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn messages_name_the_file_and_say_things_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short");
    std::fs::write(&path, "QFI").unwrap();
    for node in [path.display().to_string(), format!("model:{}", path.display())] {
        let out = polldisk(&["nbd", "--socket", "/x/y", &node]).output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert!(text.starts_with(&format!("polldisk: {node}: ")), "{text}");
        assert_eq!(text.matches("too short").count(), 1, "{text}");
    }
}

#[test]
fn nobody_reading_is_a_failure_without_a_crash() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut demo = polldisk(&SMALL);
    let out = demo.env("TMPDIR", dir.path()).stdout(full()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot write to standard output"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let status = polldisk(&["demo", "--seconds", "0"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_demo_without_space_says_so() {
    let dir = tempfile::tempdir().unwrap();
    // No file may be longer than 16 MiB: the same to a program as a full disk, but for the errno.
    let script = "ulimit -f 16384; exec \"$0\" \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, POLLDISK, "demo", "--size", "32M"]).env("TMPDIR", dir.path());
    let mut demo = Server(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let mut text = String::new();
    demo.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(demo.0.wait().unwrap().code(), Some(1), "{text}");
    assert!(text.contains("no space left for the image"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
