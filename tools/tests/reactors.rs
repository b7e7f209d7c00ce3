//! NBD clients of one image that several reactors serve, and qemu-img as the judge.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use node::{Disk, DiskOptions, ExtentSource, NodeSpec, OpenOptions, Parts};
use qcow::open::Format;
use reactor::{Clock, Policy, Start};

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

/// `false` if there is no judge, which only a developer's machine may lack.
fn has_qemu() -> bool {
    let has =
        ["qemu-img", "qemu-io"].iter().all(|p| Command::new(p).arg("--version").output().is_ok());
    assert!(has || std::env::var("CI").as_deref() != Ok("true"), "qemu-img is not installed");
    if !has {
        println!("skipped: qemu-img");
    }
    has
}

#[track_caller]
fn ok(program: &str, dir: &Path, args: &[&str]) -> String {
    let out = Command::new(program).args(args).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

/// One command of qemu-io after the other over NBD, in a process of its own.
fn client(dir: &Path, commands: &[String]) -> Child {
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "nbd+unix:///?socket=n"]).current_dir(dir);
    for command in commands {
        io.args(["-c", command]);
    }
    io.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn join(client: Child) {
    let out = client.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    let bad = ["failed", "Failed", "error", "denied"].iter().any(|w| text.contains(w));
    assert!(out.status.success() && !bad, "{text}");
}

/// Clients at a time.
const CLIENTS: u64 = 5;

/// Where the `n`th write of a client goes, in KiB, and of which byte: 12 KiB every 60, so that all of
/// them meet in clusters of 64 KiB.
fn place(client: u64, n: u64) -> (u64, u64) {
    ((n * CLIENTS + client) * 12, 1 + (client * 50 + n) % 250)
}

/// Writes by some at the same time, each of which reads its own; then each reads another's.
fn exercise(dir: &Path) {
    let each = |commands: &dyn Fn(u64) -> Vec<String>| {
        let clients: Vec<Child> = (0..CLIENTS).map(|c| client(dir, &commands(c))).collect();
        clients.into_iter().for_each(join);
    };
    let all = |op: &str, client: u64, end: &str| -> Vec<String> {
        let one = |n| {
            let (at, byte) = place(client, n);
            format!("{op} -P {byte} {at}k 12k")
        };
        (0..100).map(one).chain([end.to_owned()]).collect()
    };
    each(&|c| [all("write", c, "flush"), all("read", c, "flush")].concat());
    each(&|c| all("read", (c + 1) % CLIENTS, "flush"));
    // Behind all of it, and some is let go of: other clusters are written meanwhile.
    each(&|c| {
        let discard = (0..40).map(|n| format!("discard {}k 64k", 8192 + (n * CLIENTS + c) * 64));
        let write =
            (0..40).map(|n| format!("write -P {} {}k 64k", 7 + c, 8192 + (n * CLIENTS + c) * 64));
        write.clone().chain(discard).chain(write).chain(["flush".to_owned()]).collect()
    });
    each(&|c| all("read", (c + 2) % CLIENTS, "flush"));
}

/// The image as qemu sees it.
fn judge(dir: &Path) {
    ok("qemu-img", dir, &["check", "a.qcow2"]);
    let mut args = vec!["-r", "-f", "qcow2", "a.qcow2"];
    let reads: Vec<String> = (0..CLIENTS)
        .flat_map(|c| (0..100).map(move |n| place(c, n)))
        .map(|(at, byte)| format!("read -P {byte} {at}k 12k"))
        .chain((0..40).map(|n| format!("read -P {} {}k 64k", 7 + n % CLIENTS, 8192 + n * 64)))
        .collect();
    args.extend(reads.iter().flat_map(|r| ["-c", r]));
    let text = ok("qemu-io", dir, &args);
    assert!(!text.contains("failed"), "{text}");
}

#[test]
fn clients_of_two_and_three_reactors() {
    if !has_qemu() {
        return;
    }
    let cases =
        [("file", 2, Policy::Adaptive), ("model", 3, Policy::Adaptive), ("file", 3, Policy::Poll)];
    for (scheme, reactors, policy) in cases {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        ok("qemu-img", dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
        let spec = format!("{scheme}:{}/a.qcow2", dir.display());
        let spec = NodeSpec::parse(&spec).unwrap();
        let chain = node::open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap();
        let start = Start { cpu: None, policy };
        let options = DiskOptions { reactors: vec![start; reactors], image: Default::default() };
        let disk = Disk::start(Parts::new(chain).unwrap(), options, Clock::real()).unwrap();
        let door = disk.door();
        let extents = Extents(ExtentSource::new(door.clone()).unwrap());
        let attach = move |depth, regions| door.open(depth, regions).map_err(|e| e.to_string());
        let export = ::nbd::Export {
            size: None,
            bitmaps: None,
            name: String::new(),
            description: String::new(),
            read_only: false,
            info: disk.info().clone(),
            attach: Box::new(attach),
            extents: Box::new(extents),
        };
        let server = ::nbd::Server::bind(&dir.join("n"), export).unwrap();
        exercise(dir);
        // Allocation as the map has it, which is at home.
        let map = ok("qemu-img", dir, &["map", "-f", "raw", "nbd+unix:///?socket=n"]);
        assert!(map.lines().count() >= 3, "{map}");
        for (n, reactor) in disk.reactors().enumerate() {
            let done = reactor.stats().completions.get();
            assert!(done > 200, "{spec}: reactor {n} did {done} requests");
        }
        assert_eq!(server.shutdown(Duration::from_secs(5)), 0);
        disk.close().unwrap();
        judge(dir);
    }
}

struct Extents(ExtentSource);

impl ::nbd::Extents for Extents {
    fn status(
        &self,
        offset: u64,
        len: u64,
        limit: usize,
    ) -> Result<Vec<::nbd::Extent>, block::Status> {
        let list = self.0.status(offset, len, limit)?;
        let one = |e: node::Extent| ::nbd::Extent { len: e.len, hole: e.hole, zero: e.zero };
        Ok(list.into_iter().map(one).collect())
    }
}

/// The same by the command, on the processors that there are.
#[test]
fn a_reactor_for_each_core_that_is_named() {
    if !has_qemu() {
        return;
    }
    let online = reactor::online_cpus().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok("qemu-img", dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    let cores: Vec<String> = online.iter().take(2).map(usize::to_string).collect();
    let serve = |cores: &str| {
        let mut command = Command::new(POLLDISK);
        command.args(["nbd", "--socket", "n", "--cores", cores, "model:a.qcow2"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir(dir).spawn().unwrap()
    };
    let twice = serve(&format!("{0},{0}", cores[0])).wait_with_output().unwrap();
    assert_eq!(twice.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&twice.stderr).contains("named twice"));
    let mut server = serve(&cores.join(","));
    let mut line = String::new();
    BufReader::new(server.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap().flatten();
    let names = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
    assert_eq!(names.filter(|n| n.starts_with("reactor")).count(), cores.len());
    exercise(dir);
    let pid = server.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let began = Instant::now();
    let status = loop {
        if let Some(status) = server.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(0));
    judge(dir);
}
