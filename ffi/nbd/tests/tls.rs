//! TLS: real clients, clients that want none, and those that break its rules. A tool that is not there
//! skips its test, unless `CI` says that it must be there.

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use nbd::{Security, Server, TlsClient, TlsServer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const STARTTLS: u32 = 5;
const TLS_REQD: u32 = 1 << 31 | 5;

/// Runs a command; returns whether it succeeded, and all that it printed.
fn run(tool: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(tool).args(args).stdin(Stdio::null()).output().unwrap();
    let text = [&out.stdout[..], &out.stderr[..]].concat();
    (out.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn good(tool: &str, args: &[&str]) -> String {
    let (good, text) = run(tool, args);
    assert!(good, "{tool} {args:?}: {text}");
    text
}

/// A server that wants TLS, and the folder with its certificates.
fn secure(setup: Setup, verify: bool) -> Option<(Harness, tempfile::TempDir)> {
    if !have("openssl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates::make(dir.path());
    let tls = TlsServer::load(dir.path(), verify).unwrap();
    Some((Harness::on_loopback(setup, Security::Tls(tls)), dir))
}

fn port(h: &Harness) -> u16 {
    h.server().address().unwrap().port()
}

fn uri(h: &Harness, dir: &Path) -> String {
    format!("nbds://127.0.0.1:{}/?tls-certificates={}", port(h), dir.display())
}

fn connect(h: &Harness) -> TcpStream {
    let s = TcpStream::connect(h.server().address().unwrap()).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    s.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    s
}

/// Greets, and sends an option; returns the type of the reply.
fn ask(s: &mut (impl Read + Write), option: u32, data: &[u8]) -> u32 {
    let mut raw = b"IHAVEOPT".to_vec();
    raw.extend(option.to_be_bytes());
    raw.extend((data.len() as u32).to_be_bytes());
    raw.extend(data);
    s.write_all(&raw).unwrap();
    loop {
        let mut head = [0; 20];
        s.read_exact(&mut head).unwrap();
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        s.read_exact(&mut vec![0; len as usize]).unwrap();
        let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
        if kind == 1 || kind >> 31 == 1 {
            return kind;
        }
    }
}

fn greet(s: &mut TcpStream) {
    let mut hello = [0; 18];
    s.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"NBDMAGICIHAVEOPT\0\x03");
    s.write_all(&[0, 0, 0, 3]).unwrap();
}

/// Goes over to TLS, with a client's certificate or without.
fn over(h: &Harness, dir: &Path, own: bool) -> StreamOwned<ClientConnection, TcpStream> {
    let mut s = connect(h);
    greet(&mut s);
    assert_eq!(ask(&mut s, STARTTLS, b""), 1);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider);
    let config =
        config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let config = match own {
        false => config.with_no_client_auth(),
        true => {
            let cert = CertificateDer::from_pem_file(dir.join("client-cert.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(dir.join("client-key.pem")).unwrap();
            config.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    let name = "127.0.0.1".try_into().unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), s)
}

/// Whether the other side says nothing more.
fn is_closed(s: &mut impl Read) -> bool {
    let mut rest = Vec::new();
    match s.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => {
            !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        }
    }
}

#[test]
fn nbdinfo_and_nbdcopy_come_with_certificates() {
    let size = 48 << 20;
    let Some((h, dir)) = secure(Setup { size, ..Setup::default() }, true) else { return };
    if !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let uri = uri(&h, dir.path());
    let text = good("nbdinfo", &[&uri]);
    assert!(text.contains("with TLS") && text.contains("export-size: 50331648"), "{text}");
    let (file, back) = (dir.path().join("file"), dir.path().join("back"));
    let bytes = Random(5).bytes(size as usize);
    std::fs::write(&file, &bytes).unwrap();
    good("nbdcopy", &["--flush", file.to_str().unwrap(), &uri]);
    assert!(h.bytes(0, size as usize) == bytes);
    std::fs::write(&back, vec![0; size as usize]).unwrap();
    good("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == bytes);
    // Who knows nothing of TLS learns nothing; who has a certificate of another authority neither.
    let (fine, text) = run("nbdinfo", &[&uri.replace("nbds:", "nbd:")]);
    assert!(!fine && !text.contains("50331648"), "{text}");
    let other = tempfile::tempdir().unwrap();
    certificates::make(other.path());
    std::fs::copy(dir.path().join("ca-cert.pem"), other.path().join("ca-cert.pem")).unwrap();
    let wrong = uri.replace(dir.path().to_str().unwrap(), other.path().to_str().unwrap());
    let (fine, text) = run("nbdinfo", &[&wrong]);
    assert!(!fine && !text.contains("50331648"), "{text}");
    h.wait_empty();
}

#[test]
fn qemu_writes_and_compares_by_its_own_credentials() {
    let Some((h, dir)) = secure(Setup { size: 16 << 20, ..Setup::default() }, true) else { return };
    if !have("qemu-img") {
        return;
    }
    let file = dir.path().join("file");
    std::fs::write(&file, Random(9).bytes(16 << 20)).unwrap();
    let file = file.to_str().unwrap();
    for versions in ["NORMAL", "NORMAL:-VERS-TLS1.3"] {
        let object = format!(
            "tls-creds-x509,id=tls0,endpoint=client,dir={},priority={versions}",
            dir.path().display()
        );
        let node = format!(
            "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={},tls-creds=tls0",
            port(&h)
        );
        h.data.write(0, &vec![0; 16 << 20]);
        let target = ["convert", "-n", "--object", &object, "-f", "raw", "--target-image-opts"];
        good("qemu-img", &[&target[..], &[file, &node]].concat());
        let source = format!("driver=file,filename={file}");
        let both = ["compare", "--object", &object, "--image-opts", &source, &node];
        assert!(good("qemu-img", &both).contains("identical"));
    }
    h.wait_empty();
}

#[test]
fn nothing_is_said_before_tls() {
    let Some((h, dir)) = secure(Setup::default(), false) else { return };
    let mut s = connect(&h);
    greet(&mut s);
    for option in [2 + 1, 6, 7, 8, 9, 10, 99] {
        assert_eq!(ask(&mut s, option, b"\0\0\0\0\0\0"), TLS_REQD, "{option}");
    }
    assert_eq!(ask(&mut s, STARTTLS, b"x"), 1 << 31 | 3);
    assert_eq!(ask(&mut s, 2, b""), 1, "an abort is always taken");
    assert!(is_closed(&mut s));
    // The old way has no place for an error.
    let mut s = connect(&h);
    greet(&mut s);
    s.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    assert!(is_closed(&mut s));
    // Afterwards everything is as without; what was said before does not count.
    let mut s = over(&h, dir.path(), false);
    assert_eq!(ask(&mut s, STARTTLS, b""), 1 << 31 | 3);
    assert_eq!(ask(&mut s, 7, b"\0\0\0\0\0\0"), 1);
    s.write_all(&Client::raw(WRITE, 0, 7, 512, 5)).unwrap();
    s.write_all(b"hello").unwrap();
    let mut reply = [0; 16];
    s.read_exact(&mut reply).unwrap();
    assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
    assert_eq!(h.bytes(512, 5), b"hello");
    // Good-bye, with the last reply on its way.
    s.write_all(&Client::raw(READ, 0, 8, 0, 1 << 20)).unwrap();
    s.write_all(&Client::raw(DISC, 0, 9, 0, 0)).unwrap();
    let mut rest = Vec::new();
    s.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 16 + (1 << 20));
    h.wait_empty();
}

#[test]
fn who_breaks_tls_is_cut_off_at_once_and_disturbs_nobody() {
    let Some((h, dir)) = secure(Setup::default(), true) else { return };
    let mut steady = over(&h, dir.path(), true);
    assert_eq!(ask(&mut steady, 7, b"\0\0\0\0\0\0"), 1);
    // Goes on without TLS; random bytes; a record that is too long; half a record and good-bye.
    let plain = b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0".to_vec();
    let record = |len: u16| [&[22, 3, 1][..], &len.to_be_bytes(), &[1; 100]].concat();
    for garbage in [plain, Random(1).bytes(100_000), record(0xffff), record(20_000)] {
        let mut s = connect(&h);
        greet(&mut s);
        assert_eq!(ask(&mut s, STARTTLS, b""), 1);
        // May fail if it was cut off in the middle.
        let _ = s.write_all(&garbage);
        assert!(is_closed(&mut s));
    }
    let mut s = connect(&h);
    greet(&mut s);
    assert_eq!(ask(&mut s, STARTTLS, b""), 1);
    s.write_all(&record(5000)).unwrap();
    drop(s);
    // Without a certificate, though one is wanted.
    let mut s = over(&h, dir.path(), false);
    let mut raw = b"IHAVEOPT".to_vec();
    raw.extend([0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
    let _ = s.write_all(&raw);
    assert!(s.read_exact(&mut [0; 20]).is_err());
    // A record that was changed on its way.
    let mut s = over(&h, dir.path(), true);
    assert_eq!(ask(&mut s, 7, b"\0\0\0\0\0\0"), 1);
    s.sock.write_all(&[23, 3, 3, 0, 40]).unwrap();
    s.sock.write_all(&[7; 40]).unwrap();
    assert!(is_closed(&mut s));
    eventually("only one is left", || h.server().connections().len() == 1);
    steady.write_all(&Client::raw(WRITE, 0, 7, 0, 3)).unwrap();
    steady.write_all(b"yes").unwrap();
    steady.read_exact(&mut [0; 16]).unwrap();
    assert_eq!(h.bytes(0, 3), b"yes");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test of time")]
fn who_never_reads_is_bounded_and_a_shutdown_does_not_wait_for_him() {
    let Some((mut h, dir)) = secure(Setup::default(), false) else { return };
    let mut deaf = over(&h, dir.path(), false);
    assert_eq!(ask(&mut deaf, 7, b"\0\0\0\0\0\0"), 1);
    deaf.sock.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut sent = 0;
    while deaf.write_all(&Client::raw(READ, 0, 1, 0, 1 << 20)).is_ok() {
        sent += 1;
        assert!(sent < 300_000, "the server takes requests without end");
    }
    let read = h.control.seen(block::Op::Read).iter().map(|r| r.2).sum::<u64>();
    assert!(read <= 32 << 20, "{read} bytes are read for somebody who does not listen");
    // And some who are on their way in.
    let mut silent = connect(&h);
    greet(&mut silent);
    assert_eq!(ask(&mut silent, STARTTLS, b""), 1);
    let idle = over(&h, dir.path(), false);
    eventually("all are there", || h.server().connections().len() == 3);
    let began = Instant::now();
    let left = h.server.take().unwrap().shutdown(Duration::from_millis(200));
    assert_eq!(left, 0);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    drop((deaf, silent, idle));
}

#[test]
fn plain_text_stays_on_the_loopback_unless_it_is_meant() {
    let h = Harness::on_loopback(Setup::default(), Security::Loopback);
    let mut s = connect(&h);
    greet(&mut s);
    assert_eq!(ask(&mut s, STARTTLS, b""), 1 << 31 | 2);
    assert_eq!(ask(&mut s, 7, b"\0\0\0\0\0\0"), 1);
    if have("qemu-img") {
        let uri = format!("nbd://127.0.0.1:{}", port(&h));
        let text = good("qemu-img", &["info", &uri]);
        assert!(text.contains("virtual size: 16 MiB"), "{text}");
    }
    let export = || nbd::Export {
        name: String::new(),
        description: String::new(),
        read_only: true,
        info: block::DeviceInfo { size: 1 << 20, block_size: 512, max_transfer: 1 << 20, ..info() },
        attach: Box::new(|_, _| Err("nobody".to_owned())),
        extents: Box::new(nbd::AllData),
        size: None,
        bitmaps: None,
    };
    let any = "0.0.0.0:0".parse().unwrap();
    let Err(e) = Server::listen(any, Security::Loopback, export()) else { panic!("it listens") };
    assert!(e.to_string().contains("not without TLS"), "{e}");
    Server::listen(any, Security::Plain, export()).unwrap();
    let taken = h.server().address().unwrap();
    let Err(e) = Server::listen(taken, Security::Loopback, export()) else { panic!("it listens") };
    assert!(e.to_string().contains("cannot listen"), "{e}");
}

fn info() -> block::DeviceInfo {
    use block::Submit as _;
    block::MemQueue::new(1 << 20, 512).unwrap().info(0).unwrap().clone()
}

#[test]
fn a_folder_serves_both_sides() {
    if !have("openssl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates::make(dir.path());
    TlsServer::load(dir.path(), true).unwrap();
    TlsClient::load(dir.path()).unwrap();
    // Key and certificate must belong together.
    std::fs::copy(dir.path().join("client-key.pem"), dir.path().join("server-key.pem")).unwrap();
    assert!(TlsServer::load(dir.path(), true).unwrap_err().to_string().contains("server-cert.pem"));
    std::fs::remove_file(dir.path().join("client-key.pem")).unwrap();
    assert!(TlsClient::load(dir.path()).unwrap_err().to_string().contains("client-key.pem"));
    std::fs::remove_file(dir.path().join("client-cert.pem")).unwrap();
    TlsClient::load(dir.path()).unwrap();
}
