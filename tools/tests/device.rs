//! `device identify`, `health` and `format` on a controller model, as scripts use them. What looks
//! at the host is tested beside its code, on hosts made of files.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn device(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    command.arg("device").args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str], code: i32) -> Output {
    let out = device(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    out
}

fn json(args: &[&str], code: i32) -> Value {
    serde_json::from_slice(&run(args, code).stdout).unwrap()
}

fn error(args: &[&str], code: i32) -> String {
    String::from_utf8(run(args, code).stderr).unwrap()
}

/// A file of 1 MiB full of ones, and the node of a drive on it.
fn drive(dir: &Path, options: &str) -> (PathBuf, String) {
    let file = dir.join("drive");
    std::fs::write(&file, vec![1; 1 << 20]).unwrap();
    (file.clone(), format!("model:{}?{options}", file.display()))
}

fn is_full_of(file: &Path, byte: u8) -> bool {
    let data = std::fs::read(file).unwrap();
    data.len() == 1 << 20 && data.iter().all(|&b| b == byte)
}

#[test]
fn identify() {
    let dir = tempfile::tempdir().unwrap();
    let (file, node) = drive(dir.path(), "lba=4096&vwc=1&mdts=3");
    let r = json(&["identify", "--json", &node], 0);
    assert_eq!((&r["model"], &r["serial"]), (&"polldisk NVMe model".into(), &"PDMODEL0001".into()));
    assert_eq!((&r["nvme-version"], &r["max-command-size"]), (&"1.4".into(), &32768.into()));
    assert_eq!((&r["volatile-cache"], &r["format"]), (&true.into(), &true.into()));
    let ns = &r["namespaces"][0];
    assert_eq!(
        (&ns["nsid"], &ns["size"], &ns["lba-size"]),
        (&1.into(), &(1 << 20).into(), &4096.into())
    );
    assert_eq!(ns["eui64"].as_str().unwrap().len(), 16);
    assert_eq!(
        (&ns["formats"][0]["lba-size"], &ns["formats"][1]["in-use"]),
        (&512.into(), &true.into())
    );
    assert!(r["refused"].as_array().unwrap().is_empty());
    let text = String::from_utf8(run(&["identify", &node], 0).stdout).unwrap();
    assert!(text.contains("namespace 1: 1 MiB, blocks of 4096\n"), "{text}");
    assert!(text.contains("volatile cache on"), "{text}");
    assert!(is_full_of(&file, 1));
    let (_, broken) = drive(dir.path(), "fault=gone:op=identify,nth=4");
    assert!(error(&["identify", &broken], 1).contains("is gone"));
    // What it said is printed though it goes before the end.
    let (_, broken) = drive(dir.path(), "fault=gone:op=log");
    let out = run(&["identify", &broken], 1);
    assert!(String::from_utf8(out.stdout).unwrap().contains("namespace 1: "));
    assert!(String::from_utf8(out.stderr).unwrap().contains("shutdown: the device is gone"));
}

#[test]
fn health_in_words_and_as_an_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let (_, node) = drive(dir.path(), "");
    let r = json(&["health", "--json", &node], 0);
    assert_eq!((&r["temperature"], &r["available-spare"]), (&27.into(), &100.into()));
    assert_eq!((&r["power-cycles"], &r["media-errors"]), (&1.into(), &0.into()));
    assert!(r["critical-warnings"].as_array().unwrap().is_empty());
    let (_, node) = drive(dir.path(), "fault=warn=5:op=features");
    let r = json(&["health", "--output=json", &node], 1);
    assert_eq!(r["critical-warnings"].as_array().unwrap().len(), 2);
    let text = String::from_utf8(run(&["health", &node], 1).stdout).unwrap();
    assert!(text.contains("CRITICAL: the spare capacity is below its threshold\n"), "{text}");
    let (_, node) = drive(dir.path(), "fault=status=109:op=log");
    assert!(error(&["health", &node], 1).contains("Get Log Page failed: Invalid Log Page"));
}

#[test]
fn format_changes_the_block_size() {
    let dir = tempfile::tempdir().unwrap();
    let (file, node) = drive(dir.path(), "vwc=1");
    let r = json(&["format", "--yes", "--lba", "4096", "--json", &node], 0);
    assert_eq!(
        (&r["nsid"], &r["size"], &r["lba-size"]),
        (&1.into(), &(1 << 20).into(), &4096.into())
    );
    assert_eq!((&r["formatted"], &r["serial"]), (&serde_json::json!([1]), &"PDMODEL0001".into()));
    assert!(is_full_of(&file, 0));
    for how in ["user-data", "crypto"] {
        let (file, node) = drive(dir.path(), "fault=delay=100ms:op=format");
        let out = run(&["format", "--yes", "--secure-erase", how, &node], 0);
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text, "namespace 1 is formatted: 1 MiB, blocks of 512\n");
        assert!(is_full_of(&file, 0));
    }
}

#[test]
fn nothing_is_formatted_without_being_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (file, node) = drive(dir.path(), "");
    assert!(error(&["format", &node], 2).contains("--yes formats without asking"));
    assert!(error(&["format", "--yes", "--lba", "1024", &node], 2).contains("512 and 4096"));
    error(&["format", "--yes", "--secure-erase", "some", &node], 2);
    assert!(is_full_of(&file, 1));
    let (_, refusing) = drive(dir.path(), "fault=status=10a:op=format");
    assert!(
        error(&["format", "--yes", &refusing], 1).contains("Format NVM failed: Invalid Format")
    );
    let (_, failing) = drive(dir.path(), "fault=cfs:op=format");
    assert!(error(&["format", "--yes", &failing], 1).contains("fatal error"));
    // Somebody else has it.
    let lock = std::fs::File::options().read(true).write(true).open(&file).unwrap();
    let _held = file::ImageLock::shared(&lock).unwrap();
    assert!(error(&["format", "--yes", &node], 1).contains("in use"));
    assert!(is_full_of(&file, 1));
    json(&["identify", "--json", &node], 0);
}

#[test]
fn a_signal_does_not_end_a_format() {
    let dir = tempfile::tempdir().unwrap();
    let (file, node) = drive(dir.path(), "fault=delay=1500ms:op=format");
    let mut command = device(&["format", "--yes", &node]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // While the format runs: its beginning takes some milliseconds.
    let began = Instant::now();
    std::thread::sleep(Duration::from_millis(700));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{text}");
    assert!(text.contains("cannot be stopped"), "{text}");
    assert!(began.elapsed() >= Duration::from_millis(1500) && is_full_of(&file, 0));
}

#[test]
fn names_of_devices() {
    for bad in ["x", "mem:1M", "/dev/nvme0n1", "vfio:01:00.0", "0000:01:00.0/0", "model:"] {
        for command in ["identify", "health", "format"] {
            error(&[command, bad], 2);
        }
    }
    for command in ["bind", "unbind"] {
        assert!(error(&[command, "01:00.0"], 2).contains("no PCI address"));
    }
}

#[test]
fn a_controller_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut server = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    server.args(["model", "--vfio-user"]).arg(&socket).args(["mem:1M", "mem:2M"]);
    let mut server = Killed(server.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    let node = format!("vfio-user:{}/2", socket.display());
    let done = json(&["format", "--yes", "--lba", "4096", "--json", &node], 0);
    assert_eq!((&done["nsid"], &done["formatted"]), (&2.into(), &serde_json::json!([2])));
    // The server remembers it.
    let spaces = &json(&["identify", "--json", &node], 0)["namespaces"];
    assert_eq!((&spaces[0]["size"], &spaces[0]["lba-size"]), (&(2 << 20).into(), &4096.into()));
    assert_eq!(spaces.as_array().unwrap().len(), 1);
    json(&["health", "--json", &node], 0);
    let gone = format!("vfio-user:{}/3", socket.display());
    assert!(error(&["format", "--yes", &gone], 1).contains("no namespace 3; there are 1, 2"));
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}
