//! Figures of a running daemon: for Prometheus, for the toolstack's rrdd, and in `polldisk top`; with
//! clients that are rude, and daemons that go away.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

#[path = "common/daemon.rs"]
mod daemon;

use daemon::{Daemon, POLLDISK};

const SECOND: Duration = Duration::from_secs(1);

/// A port that nobody listens on now.
fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// All that a server says to a request until it ends the connection.
fn ask(mut stream: impl Read + Write, request: &[u8]) -> String {
    // Who is refused may not come to the end of it.
    let _cut = stream.write_all(request);
    let mut text = Vec::new();
    let _cut = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

fn image(dir: &Path) {
    let mut create = Command::new(POLLDISK);
    create.args(["image", "create", "a.qcow2", "64M"]).current_dir(dir);
    assert!(create.output().unwrap().status.success());
}

#[test]
fn a_page_by_http_and_clients_that_are_rude() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let port = port();
    let daemon = Daemon::start(dir.path(), &format!("metrics = '127.0.0.1:{port}'"));
    daemon.fine(&["attach", "a\"\\\n", "a.qcow2", "--nbd", "nbd"]);
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(20 * SECOND)).unwrap();
        stream
    };
    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n";
    let page = ask(connect(), GET);
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    let line = "\npolldisk_disk_reads_total{image=\"a\\\"\\\\\\n\",frontend=\"nbd\"} 0\n";
    assert!(body.contains(line), "{body}");
    assert!(body.contains("\npolldisk_reactor_busy_seconds_total{reactor=\"0\"} "), "{body}");
    let head = ask(connect(), b"HEAD /metrics HTTP/1.0\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400"),
        (b"GET /metrics HTTP/1.1\r\nbroken\0: x\r\n\r\n", "400"),
        (&[b'a'; 1 << 20], "431"),
        (&b"GET /metrics HTTP/1.1\r\n".repeat(5000), "400"),
        (&[b"GET /metrics HTTP/1.1\r\n".as_slice(), &b"a: b\r\n".repeat(100_000)].concat(), "431"),
    ] {
        let answer = ask(connect(), request);
        // The rest of what was too much may have cut the answer off.
        let cut = answer.is_empty() && request.len() > 1 << 16;
        assert!(cut || answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
    }
    // As many as there can be, which do not come to an end: one says nothing, others little by little.
    let began = Instant::now();
    let mut slow: Vec<TcpStream> = Vec::new();
    while slow.len() < 8 {
        let stream = connect();
        stream.set_read_timeout(Some(SECOND / 10)).unwrap();
        // One is turned away while one of those above has not quite ended.
        if (&stream).read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock) {
            slow.push(stream);
        }
        assert!(began.elapsed() < 4 * SECOND, "{} are let in", slow.len());
    }
    assert_eq!(ask(connect(), GET), "", "one more is turned away");
    // Nobody else notices.
    assert!(daemon.fine(&["list"]).contains("a.qcow2"));
    let mut ended = 0;
    while ended < 8 {
        ended = 0;
        for (n, mut stream) in slow.iter().enumerate() {
            stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let told = if n > 0 { stream.write_all(b"G") } else { Ok(()) };
            let gone = match stream.read(&mut [0; 9]) {
                Ok(n) => n == 0,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            };
            ended += usize::from(gone || told.is_err());
        }
        assert!(began.elapsed() < 15 * SECOND, "they are there for ever");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(began.elapsed() > 4 * SECOND, "{:?}", began.elapsed());
    assert!(ask(connect(), GET).starts_with("HTTP/1.1 200 OK\r\n"));
    // An end does not wait for them either.
    let _one_more = connect();
    let began = Instant::now();
    daemon.stop();
    assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
}

#[test]
fn a_page_on_a_unix_socket_and_none_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("new/metrics");
    let daemon = Daemon::start(dir.path(), &format!("metrics = 'unix:{}'", socket.display()));
    let mode = std::os::unix::fs::PermissionsExt::mode(&socket.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let page = ask(UnixStream::connect(&socket).unwrap(), b"GET /metrics HTTP/1.1\r\n\r\n");
    assert!(page.contains("polldisk_build_info{version="), "{page}");
    daemon.stop();
    assert!(!socket.exists());
    // A daemon that was not told to listens on nothing but its own socket.
    let daemon = Daemon::start(dir.path(), "");
    let net = std::fs::read_to_string(format!("/proc/{}/net/unix", daemon.child.id())).unwrap();
    let ours = net.lines().filter(|l| l.contains(dir.path().to_str().unwrap()));
    assert_eq!(ours.filter(|l| l.ends_with("/run/ctl")).count(), 1);
    assert!(!socket.exists() && daemon.refused(&["detach", "x"]).contains("no image"));
    daemon.stop();
    let config = dir.path().join("c.toml");
    for address in ["0.0.0.0:9825", "[::]:1", "metrics", "10.1.1.1:9"] {
        std::fs::write(&config, format!("metrics = '{address}'\n")).unwrap();
        let mut check = Command::new(POLLDISK);
        let out = check.args(["serve", "--check", "--config"]).arg(&config).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && text.contains("loopback"), "{address}: {text}");
    }
}

/// What an independent reader finds in rrdd's file; `None` if there is no Python.
fn judged(path: &Path) -> Option<Value> {
    let reader = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rrdd.py");
    let Ok(out) = Command::new("python3").arg(reader).arg(path).output() else {
        println!("skipped: python3 is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    Some(serde_json::from_slice(&out.stdout).unwrap())
}

/// One call of the toolstack's plugins.
fn plugin(dir: &Path, method: &str, args: Value) -> Value {
    let params = json!({"method": method, "args": args});
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": "smapiv3", "params": params});
    let mut stream = UnixStream::connect(dir.join("run/ctl")).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    let result = &answer["result"]["result"];
    assert!(!result.is_null(), "{method}: {answer}");
    result.clone()
}

#[test]
fn a_file_for_rrdd_that_goes_on_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Path::new("/dev/shm/metrics");
    let had = folder.exists();
    let name = format!("polldisk-test-{}", std::process::id());
    let path = folder.join(&name);
    let config = format!("rrd = '{}'", path.display());
    let mut daemon = Daemon::start(dir.path(), &config);
    if let Some(first) = judged(&path) {
        assert_eq!(first["sources"][0][0], "polldisk_reactor0_busy");
        let began = Instant::now();
        loop {
            std::thread::sleep(SECOND / 4);
            // It may be read in the moment in which it is written, as it may by rrdd.
            let time = || Some(judged(&path)?["time"].as_f64()? - first["time"].as_f64()?);
            if let Some(passed) = time().filter(|passed| *passed > 0.0) {
                assert!((4.0..9.0).contains(&passed), "{passed}");
                break;
            }
            assert!(began.elapsed() < 15 * SECOND, "its clock stands still");
        }
    }
    // The toolstack is told where it is.
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(1 << 30).unwrap();
    let uuid = "7c1b6e3a-0f5d-4a47-9d0e-3b8c2f1a6d55";
    let configuration = json!({"device": dir.path().join("disk")});
    let new = json!({
        "uuid": uuid, "configuration": configuration, "name": "n", "description": "",
    });
    plugin(dir.path(), "SR.create", new);
    plugin(dir.path(), "SR.attach", json!({"configuration": configuration}));
    let stat = plugin(dir.path(), "SR.stat", json!({"sr": uuid}));
    assert_eq!(stat["datasources"], json!([format!("xeno+shm:///{name}")]));
    // A daemon that is killed leaves it, and the next one goes on with it.
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    assert!(path.exists());
    let daemon = Daemon::start(dir.path(), &config);
    judged(&path);
    daemon.stop();
    assert!(!path.exists());
    // Whoever writes no file names none.
    let daemon = Daemon::start(dir.path(), "");
    plugin(dir.path(), "SR.attach", json!({"configuration": configuration}));
    let stat = plugin(dir.path(), "SR.stat", json!({"sr": uuid}));
    assert_eq!(stat["datasources"], json!([]));
    daemon.stop();
    if !had {
        let _others = std::fs::remove_dir(folder);
    }
}

fn top(dir: &Path, args: &[&str]) -> Command {
    let mut top = Command::new(POLLDISK);
    top.arg("top").arg("--socket").arg(dir.join("run/ctl")).args(args).stdin(Stdio::null());
    top
}

#[test]
fn top_shows_what_is_done() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let daemon = Daemon::start(dir.path(), "cores = [0]\npolicy = 'adaptive'");
    daemon.fine(&["attach", "\u{1b}[31mred", "a.qcow2", "--nbd", "nbd"]);
    let out = top(dir.path(), &["--once", "-i", "0.2"]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("?[31mred"), "{text}");
    assert!(!text.contains('\u{1b}') && text.contains("REACTOR"), "{text}");
    let code = |args: &[&str]| top(dir.path(), args).output().unwrap().status.code();
    assert_eq!([code(&["-i", "0"]), code(&["-i", "x"]), code(&["--never"])], [Some(2); 3]);
    if Command::new("qemu-io").arg("--version").output().is_err() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "qemu-io is not installed");
        println!("skipped: qemu-io");
        return daemon.stop();
    }
    let socket = dir.path().join("nbd");
    let mut load = Command::new("qemu-io");
    load.args(["-f", "raw", &format!("nbd+unix:///?socket={}", socket.display())]);
    for _ in 0..400 {
        load.args(["-c", "write -q 1M 64k", "-c", "read -q 1M 128k", "-c", "sleep 5"]);
    }
    let mut load = load.stdout(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    loop {
        let out = top(dir.path(), &["--once", "--json", "-i", "0.5"]).output().unwrap();
        assert!(out.status.success());
        let told: Value = serde_json::from_slice(&out.stdout).unwrap();
        let disk = &told["disks"][0];
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        let (read, write) = (&disk["read"], &disk["write"]);
        if number(&read["iops"]) > 1.0 && number(&write["iops"]) > 1.0 {
            assert!((0.4..5.0).contains(&number(&told["seconds"])), "{told}");
            let each = number(&read["bytes-per-s"]) / number(&read["iops"]);
            assert!((each - 131_072.0).abs() < 1.0, "{told}");
            let [p50, p99, p999] = ["p50-ns", "p99-ns", "p999-ns"].map(|p| number(&read[p]));
            assert!(p50 > 1000.0 && p50 <= p99 && p99 <= p999, "{told}");
            assert!((0.0..=1.0).contains(&number(&told["reactors"][0]["busy"])), "{told}");
            assert!(number(&told["reactors"][0]["turns-per-s"]) > 1.0, "{told}");
            break;
        }
        assert!(began.elapsed() < 20 * SECOND, "nothing is done: {told}");
    }
    let _ended = load.kill();
    load.wait().unwrap();
    daemon.stop();
}

#[test]
fn top_outlives_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let out = top(dir.path(), &["--once"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && text.contains("is the server running?"), "{text}");
    let daemon = Daemon::start(dir.path(), "");
    let mut command = top(dir.path(), &["--json", "-i", "0.1"]);
    let mut running = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert!(next()["reactors"][0]["busy"].is_number());
    daemon.stop();
    let mut said = BufReader::new(running.stderr.take().unwrap()).lines();
    let why = said.next().unwrap().unwrap();
    assert!(why.contains("trying again"), "{why}");
    let daemon = Daemon::start(dir.path(), "");
    // Those of before may not all have been read.
    for _ in 0..20 {
        assert!(next()["reactors"][0]["turns-per-s"].as_f64().unwrap() >= 0.0);
    }
    running.kill().unwrap();
    running.wait().unwrap();
    daemon.stop();
}
