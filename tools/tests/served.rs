//! `polldisk model` and the node `vfio-user:`, as two processes, with qemu-img as the judge; and
//! either of them killed in the middle.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

/// A folder in which everything runs.
struct Env {
    dir: tempfile::TempDir,
}

/// A server, killed in the end.
struct Running(Child);

impl Env {
    /// `None` if there is no judge, which only a developer's machine may lack.
    fn new() -> Option<Env> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "qemu-img is not installed");
            println!("skipped: qemu-img");
            return None;
        }
        Some(Env { dir: tempfile::tempdir().unwrap() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a program; exit code and what it said.
    fn run(&self, program: &str, args: &str) -> (Option<i32>, String) {
        let args = args.split_whitespace();
        let out = Command::new(program).args(args).current_dir(self.dir.path()).output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        (out.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    #[track_caller]
    fn ok(&self, program: &str, args: &str) -> String {
        let (code, text) = self.run(program, args);
        assert_eq!(code, Some(0), "{program} {args}: {text}");
        text
    }

    /// One command to what is served by NBD; what qemu-io says.
    fn nbd_io(&self, command: &str) -> String {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "nbd+unix:///?socket=n", "-c", command]);
        let out = io.current_dir(self.dir.path()).output().unwrap();
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
    }

    /// Starts a server that says when it listens.
    fn start(&self, args: &str) -> Running {
        let mut command = Command::new(POLLDISK);
        command.args(args.split_whitespace()).current_dir(self.dir.path());
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("listening on "), "{args}: {line}");
        Running(child)
    }

    /// An image with data, as a file and as a raw disk file for a model to serve.
    fn images(&self) {
        self.ok("qemu-img", "create -q -f qcow2 src.qcow2 48M");
        let mut args = vec!["-f".to_owned(), "qcow2".to_owned(), "src.qcow2".to_owned()];
        for i in 0..24 {
            args.extend(["-c".to_owned(), format!("write -P {} {}k 300k", i + 1, i * 2001)]);
        }
        let out = Command::new("qemu-io").args(&args).current_dir(self.dir.path()).output();
        let text = String::from_utf8(out.unwrap().stdout).unwrap();
        assert!(!text.contains("failed"), "{text}");
        let disk = std::fs::File::create(self.path("disk")).unwrap();
        disk.set_len(256 << 20).unwrap();
    }
}

impl Running {
    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Sends a signal and waits for the end; the exit code.
    fn end(&mut self, signal: &str) -> Option<i32> {
        self.signal(signal);
        self.wait()
    }

    fn wait(&mut self) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn an_image_on_a_served_drive() {
    let Some(env) = Env::new() else { return };
    env.images();
    for lba in [512, 4096] {
        let mut server = env.start(&format!("model --vfio-user s -f raw model:disk?lba={lba}"));
        let mode = std::fs::metadata(env.path("s")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let on = |what: &str| env.ok(POLLDISK, &format!("image {what}"));
        on("convert -f qcow2 -O qcow2 src.qcow2 vfio-user:s/1");
        assert!(on("compare -f qcow2 -F qcow2 src.qcow2 vfio-user:s/1").contains("identical"));
        assert!(on("check vfio-user:s/1").contains("No errors"));
        assert!(on("info vfio-user:s/1").contains("file format: qcow2"));
        // And served on, by a second process over the first.
        let mut nbd = env.start("nbd --socket n vfio-user:s/1");
        let url = "nbd+unix:///?socket=n";
        env.ok("qemu-img", &format!("compare -f qcow2 -F raw src.qcow2 {url}"));
        let text = env.nbd_io("write -P 9 1M 1M");
        assert!(text.contains("wrote 1048576"), "{text}");
        // The drive is taken meanwhile: another client is refused, and so is another server.
        let (code, text) = env.run(POLLDISK, "image check vfio-user:s/1");
        assert_eq!(code, Some(1), "{text}");
        let (code, text) = env.run(POLLDISK, "model --vfio-user s mem:1M");
        assert!(code == Some(1) && text.contains("another server is listening"), "{text}");
        let (code, text) = env.run(POLLDISK, "image info -f qcow2 disk");
        assert!(code == Some(1) && text.contains("in use"), "{text}");
        assert_eq!((nbd.end("-TERM"), server.end("-TERM")), (Some(0), Some(0)));
        assert!(!env.path("s").exists());
        env.ok("qemu-img", "check -f qcow2 disk");
    }
}

#[test]
fn usage_and_what_cannot_be_served() {
    let Some(env) = Env::new() else { return };
    let code = |args: &str| env.run(POLLDISK, args).0;
    assert_eq!(code("model --vfio-user s"), Some(2));
    assert_eq!(code("model mem:1M"), Some(2));
    for bad in ["file:x", "mem:1", "model:nothing", "model:.", "vfio-user:x/1"] {
        let (code, text) = env.run(POLLDISK, &format!("model --vfio-user s {bad}"));
        assert_eq!(code, Some(1), "{bad}: {text}");
        assert!(!env.path("s").exists());
    }
    std::fs::write(env.path("f"), "x").unwrap();
    assert_eq!(code("model --vfio-user f mem:1M"), Some(1));
    assert_eq!(std::fs::read(env.path("f")).unwrap(), b"x");
}

/// Has a client write all over an image until something breaks; kills `victim` meanwhile.
fn break_it(env: &Env, victim: &Running) {
    let writer = Command::new("qemu-img")
        .args([
            "bench", "-w", "-f", "raw", "-c", "1000000", "-d", "16", "-s", "65536", "-S", "200704",
        ])
        .arg("nbd+unix:///?socket=n")
        .current_dir(env.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut writer = Running(writer.unwrap());
    let before = std::fs::metadata(env.path("disk")).unwrap();
    let blocks = |m: &std::fs::Metadata| std::os::unix::fs::MetadataExt::blocks(m);
    let began = Instant::now();
    // In the middle of allocating.
    while blocks(&std::fs::metadata(env.path("disk")).unwrap()) < blocks(&before) + 8192 {
        assert!(began.elapsed() < Duration::from_secs(20), "nothing is written");
        std::thread::sleep(Duration::from_millis(1));
    }
    victim.signal("-KILL");
    assert_ne!(writer.wait(), Some(0), "errors, and no hang");
}

/// The image has no corruption, whatever was killed; leaks are repaired.
fn clean(env: &Env) {
    let (code, text) = env.run("qemu-img", "check -f qcow2 disk");
    assert!(matches!(code, Some(0 | 3)), "{text}");
    env.ok("qemu-img", "check -q -f qcow2 -r all disk");
    env.ok("qemu-img", "check -f qcow2 disk");
}

const SERVER: &str = "model --vfio-user s -f raw model:disk?lba=4096&size=2G";

#[test]
fn a_server_that_is_killed() {
    let Some(env) = Env::new() else { return };
    env.ok("qemu-img", "create -q -f qcow2 disk 1G");
    let mut server = env.start(SERVER);
    let mut nbd = env.start("nbd --socket n vfio-user:s/1");
    break_it(&env, &server);
    server.wait();
    // What is left says so, and does not hang.
    let began = Instant::now();
    assert_eq!(nbd.end("-TERM"), Some(1));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    clean(&env);
    // The stale socket is replaced.
    let _server = env.start(SERVER);
    assert!(env.ok(POLLDISK, "image check -f qcow2 vfio-user:s/1").contains("No errors"));
}

#[test]
fn a_server_that_hangs() {
    let Some(env) = Env::new() else { return };
    let server = env.start("model --vfio-user s mem:64M");
    let mut nbd = env.start("nbd --socket n -f raw vfio-user:s/1");
    server.signal("-STOP");
    let began = Instant::now();
    let text = env.nbd_io("write 0 64k");
    assert!(text.contains("failed") || text.contains("can't open device"), "{text}");
    server.signal("-CONT");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    nbd.end("-TERM");
    let (code, text) = env.run(POLLDISK, "image info -f raw vfio-user:s/1");
    assert_eq!(code, Some(0), "it serves the next: {text}");
}

#[test]
fn a_client_that_is_killed() {
    let Some(env) = Env::new() else { return };
    env.ok("qemu-img", "create -q -f qcow2 disk 1G");
    let mut server = env.start(SERVER);
    for _ in 0..2 {
        let mut nbd = env.start("nbd --socket n vfio-user:s/1");
        break_it(&env, &nbd);
        nbd.wait();
        // The server goes on, with the next client; what the killed one left is no corruption.
        let (code, text) = env.run(POLLDISK, "image check -f qcow2 vfio-user:s/1");
        assert!(matches!(code, Some(0 | 3)), "{text}");
        env.ok(POLLDISK, "image check -f qcow2 --repair all vfio-user:s/1");
    }
    assert_eq!(server.end("-TERM"), Some(0));
    clean(&env);
}

#[test]
fn killed_while_it_is_not_served() {
    let Some(env) = Env::new() else { return };
    let nobody: &Path = &env.path("s");
    let mut server = env.start("model --vfio-user s mem:1M mem:2M");
    let text = env.ok(POLLDISK, "image info -f raw vfio-user:s/2");
    assert!(text.contains("2 MiB"), "{text}");
    server.end("-KILL");
    assert!(nobody.exists());
    let (code, text) = env.run(POLLDISK, "image info -f raw vfio-user:s/1");
    assert!(code == Some(1) && text.contains("cannot connect"), "{text}");
}
