//! `polldisk nbd --listen`, as users run it: TLS with real clients, and what is refused.

#[path = "../../ffi/nbd/tests/common/certificates.rs"]
mod certificates;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

fn polldisk(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polldisk"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Whether a tool can be run.
fn have(tool: &str) -> bool {
    let arg = if tool == "openssl" { "version" } else { "--version" };
    let run = Command::new(tool).arg(arg).stdout(Stdio::null()).status();
    let there = run.is_ok_and(|s| s.success());
    if !there {
        assert!(std::env::var_os("CI").is_none_or(|v| v.is_empty()), "{tool} is not installed");
        println!("skipped: {tool} is not installed");
    }
    there
}

/// A server, and what it says that it listens on.
struct Served(Child, String);

impl Served {
    fn start(args: &[&str]) -> Served {
        let mut child = polldisk(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").map(str::to_owned);
        Served(child, address.unwrap_or_else(|| panic!("{line:?}")))
    }

    fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }
}

fn create(dir: &Path) -> String {
    let image = dir.join("disk.qcow2").display().to_string();
    assert!(polldisk(&["image", "create", &image, "32M"]).status().unwrap().success());
    image
}

#[test]
fn clients_with_certificates_are_served_and_no_others() {
    if !have("openssl") || !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates::make(dir.path());
    let image = create(dir.path());
    let certificates = dir.path().to_str().unwrap();
    let listen = ["nbd", "--listen", "127.0.0.1:0", "--tls-certificates", certificates];
    let served = Served::start(&[&listen[..], &[&image]].concat());
    let uri = format!("nbds://{}/?tls-certificates={certificates}", served.1);
    let data = dir.path().join("data");
    let bytes: Vec<u8> =
        (0..32u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&data, &bytes).unwrap();
    let data = data.to_str().unwrap();
    assert!(Command::new("nbdcopy").args(["--flush", data, &uri]).status().unwrap().success());
    let plain = format!("nbd://{}", served.1);
    let refused = Command::new("nbdinfo").arg(&plain).output().unwrap();
    assert!(!refused.status.success());
    // A certificate of the server alone is not enough, unless anybody may come.
    let stranger = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("ca-cert.pem"), stranger.path().join("ca-cert.pem")).unwrap();
    let strange = uri.replace(certificates, stranger.path().to_str().unwrap());
    assert!(!Command::new("nbdinfo").arg(&strange).output().unwrap().status.success());
    served.stop();
    let any = [&listen[..], &["--tls-any-client", "--read-only", &image]].concat();
    let served = Served::start(&any);
    let strange = format!("nbds://{}/?tls-certificates={}", served.1, stranger.path().display());
    let back = dir.path().join("back");
    let copied = Command::new("nbdcopy").arg(&strange).arg(&back).status().unwrap();
    assert!(copied.success());
    assert!(std::fs::read(&back).unwrap() == bytes);
    served.stop();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path());
    let run = |args: &[&str]| {
        let out = polldisk(&[&["nbd"], args, &[&image]].concat()).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    for (args, code, what) in [
        (&[][..], 2, "--socket"),
        (&["--listen", "0.0.0.0:0"], 1, "not without TLS"),
        (&["--listen", "[::]"], 1, "not without TLS"),
        (&["--listen", "localhost:1"], 2, "an address"),
        (&["--listen", "127.0.0.1", "--socket", "/x"], 2, "--socket"),
        (&["--socket", "/x", "--tls-certificates", "/x"], 2, "--tls-certificates"),
        (&["--tls-certificates", "/x"], 2, "--socket"),
        (&["--listen", "127.0.0.1:0", "--tls-any-client"], 2, "--tls-certificates"),
        (&["--listen", "127.0.0.1:0", "--tls-certificates", "/nonexistent"], 1, "ca-cert.pem"),
        (
            &["--listen", "127.0.0.1:0", "--tls-certificates", "/x", "--plain-text"],
            2,
            "--plain-text",
        ),
        (&["--listen", "203.0.113.1:9", "--plain-text"], 1, "cannot listen"),
    ] {
        let (got, err) = run(args);
        assert_eq!(got, Some(code), "{args:?}: {err}");
        assert!(err.contains(what), "{args:?}: {err}");
    }
    let served = Served::start(&["nbd", "--listen", "127.0.0.1:0", &image]);
    let address: std::net::SocketAddr = served.1.parse().unwrap();
    assert!(address.ip().is_loopback() && address.port() != 0);
    if have("qemu-img") {
        let out = Command::new("qemu-img").args(["info", &format!("nbd://{address}")]).output();
        assert!(String::from_utf8_lossy(&out.unwrap().stdout).contains("32 MiB"));
    }
    served.stop();
    let meant = Served::start(&["nbd", "--listen", "0.0.0.0:0", "--plain-text", &image]);
    assert!(meant.1.starts_with("0.0.0.0:"));
    meant.stop();
}
