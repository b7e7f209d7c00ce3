//! The client: against our own server, with TLS and without; against qemu-nbd; and against servers that
//! break rules.

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{Op, Status};
use common::*;
use nbd::{ClientError, Remote, Security, TlsClient, TlsServer};
use reactor::Clock;

const SECOND: u64 = 1_000_000_000;

fn connect_in(
    uri: &str,
    tls: Option<&TlsClient>,
    patience: u64,
) -> Result<nbd::Client, ClientError> {
    let remote = Remote::parse(uri).unwrap();
    nbd::Client::connect(&remote, tls, &Clock::real(), patience, Arc::default())
}

fn connect(uri: &str) -> Result<nbd::Client, ClientError> {
    connect_in(uri, None, 20 * SECOND)
}

fn unix(path: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", path.display())
}

/// Writes all over an export of 16 MiB; returns what it must hold then.
fn write_all_over(c: &mut nbd::Client) -> Vec<u8> {
    let mut expected = Random(3).bytes(16 << 20);
    for (n, part) in expected.chunks(1 << 20).enumerate() {
        c.write((n as u64) << 20, part).unwrap();
    }
    for i in 0..100 {
        let at = i * 160 * 1024 + 512;
        let bytes = Random(i as u64).bytes(4096);
        c.settle().unwrap();
        c.write(at as u64, &bytes).unwrap();
        expected[at..at + 4096].copy_from_slice(&bytes);
    }
    c.settle().unwrap();
    c.write_zeroes(3 << 20, (5 << 20) + 512).unwrap();
    expected[3 << 20..(8 << 20) + 512].fill(0);
    c.flush().unwrap();
    expected
}

#[test]
fn what_is_written_is_there() {
    let h = Harness::new(Setup { name: "disk one", ..Setup::default() });
    let mut c = connect(&unix(&h.path, "disk%20one")).unwrap();
    assert_eq!((c.size(), c.block_size()), (16 << 20, 512));
    let expected = write_all_over(&mut c);
    assert!(h.bytes(0, 16 << 20) == expected);
    assert!(!h.control.seen(Op::WriteZeroes).is_empty());
    assert_eq!(h.control.seen(Op::Flush).len(), 1);
    c.look().unwrap();
    c.disconnect();
    h.wait_empty();
    let e = connect(&unix(&h.path, "other")).err().unwrap().to_string();
    assert!(e.contains("no such export"), "{e}");
}

#[test]
fn by_tls_and_only_to_whom_it_believes() {
    if !have("openssl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates::make(dir.path());
    let server = TlsServer::load(dir.path(), true).unwrap();
    let h = Harness::on_loopback(Setup::default(), Security::Tls(server));
    let address = h.server().address().unwrap();
    let tls = TlsClient::load(dir.path()).unwrap();
    let uri = format!("nbds://{address}/");
    let mut c = connect_in(&uri, Some(&tls), 20 * SECOND).unwrap();
    let expected = write_all_over(&mut c);
    assert!(h.bytes(0, 16 << 20) == expected);
    c.disconnect();
    let named = format!("{uri}?tls-hostname=localhost");
    drop(connect_in(&named, Some(&tls), 20 * SECOND).unwrap());
    // Another name, another authority, no TLS, no certificates.
    let error = |uri: &str, tls| match connect_in(uri, tls, 20 * SECOND) {
        Ok(_) => panic!("{uri} is believed"),
        Err(e) => e.to_string(),
    };
    let other = error(&format!("{uri}?tls-hostname=other.example"), Some(&tls));
    assert!(other.contains("not valid for name"), "{other}");
    let stranger = tempfile::tempdir().unwrap();
    certificates::make(stranger.path());
    let strange = TlsClient::load(stranger.path()).unwrap();
    let e = error(&uri, Some(&strange));
    assert!(e.contains("UnknownIssuer") || e.contains("BadSignature"), "{e}");
    let e = error(&uri.replace("nbds:", "nbd:"), None);
    assert!(e.contains("TLS is required"), "{e}");
    assert!(error(&uri, None).contains("no certificates"));
    h.wait_empty();
    // A server that speaks none is not spoken to without.
    let plain = Harness::on_loopback(Setup::default(), Security::Loopback);
    let e = error(&format!("nbds://{}/", plain.server().address().unwrap()), Some(&tls));
    assert!(e.contains("no TLS"), "{e}");
}

/// Kills what it started.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_nbd_takes_it_too() {
    if !have("qemu-nbd") || !have("openssl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates::make(dir.path());
    let tls = TlsClient::load(dir.path()).unwrap();
    let file = dir.path().join("file");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let socket = dir.path().join("socket");
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={}",
        dir.path().display()
    );
    let port_text = port.to_string();
    let by_tls = ["--object", &object, "--tls-creds", "tls0", "-b", "127.0.0.1", "-p", &port_text];
    let by_socket = ["-k", socket.to_str().unwrap()];
    let both =
        [(&by_socket[..], unix(&socket, "")), (&by_tls[..], format!("nbds://127.0.0.1:{port}/"))];
    for (args, uri) in both {
        std::fs::write(&file, vec![0xee; 16 << 20]).unwrap();
        let mut server = Command::new("qemu-nbd");
        server.args(["-f", "raw", "-t"]).args(args).arg(&file);
        let server = Child(server.spawn().unwrap());
        let mut client = None;
        eventually("qemu-nbd listens", || {
            client = connect_in(&uri, Some(&tls), 20 * SECOND).ok();
            client.is_some()
        });
        let mut c = client.unwrap();
        let expected = write_all_over(&mut c);
        c.disconnect();
        drop(server);
        assert!(std::fs::read(&file).unwrap() == expected);
    }
}

#[test]
fn errors_of_the_other_side_are_told() {
    let h = Harness::new(Setup::default());
    let mut c = connect(&unix(&h.path, "")).unwrap();
    h.control.fail(4096..8192, Status::NoSpace);
    c.write(0, &[1; 4096]).unwrap();
    c.settle().unwrap();
    c.write(4096, &[1; 4096]).unwrap();
    let e = c.settle().unwrap_err().to_string();
    assert!(e.contains("failed to write at 4096: no space left"), "{e}");
    drop(c);
    let read_only = Harness::new(Setup { read_only: true, ..Setup::default() });
    let e = connect(&unix(&read_only.path, "")).err().unwrap().to_string();
    assert!(e.contains("for reading only"), "{e}");
    let nowhere = connect(&unix(Path::new("/nonexistent/socket"), "")).err().unwrap();
    assert!(matches!(nowhere, ClientError::Connect(..)), "{nowhere}");
    // It goes in the middle.
    let mut c = connect(&unix(&h.path, "")).unwrap();
    h.control.hold(true);
    c.write(0, &[1; 4096]).unwrap();
    c.look().unwrap();
    eventually("it is under way", || h.control.seen(Op::Write).len() >= 3);
    let path = h.path.clone();
    drop(h);
    // What was under way may have been answered before it went.
    assert!(matches!(c.settle(), Ok(()) | Err(ClientError::Lost(_))));
    assert!(matches!(c.flush(), Err(ClientError::Lost(_))) && !path.exists());
}

#[test]
fn nobody_is_waited_for_without_end() {
    let h = Harness::new(Setup::default());
    h.control.hold(true);
    let mut c = connect_in(&unix(&h.path, ""), None, SECOND / 5).unwrap();
    c.write(0, &[1; 4096]).unwrap();
    let e = c.settle().unwrap_err().to_string();
    assert!(e.contains("takes too long"), "{e}");
    // Somebody says that it shall end.
    let stop = Arc::new(AtomicBool::new(false));
    let remote = Remote::parse(&unix(&h.path, "")).unwrap();
    let clock = Clock::real();
    let c = nbd::Client::connect(&remote, None, &clock, 3600 * SECOND, stop.clone());
    let mut c = c.unwrap();
    c.write(0, &[1; 4096]).unwrap();
    let waits = std::thread::spawn(move || c.settle().unwrap_err().to_string());
    std::thread::sleep(Duration::from_millis(20));
    stop.store(true, Ordering::Release);
    assert!(waits.join().unwrap().contains("ended from here"));
    h.control.hold(false);
}

/// A server that says these bytes at once, and listens to everything.
fn server(says: Vec<u8>) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        // The client may be gone.
        let _ = s.write_all(&says);
        let _ = std::io::copy(&mut s, &mut std::io::sink());
    });
    (dir, unix(&path, ""))
}

const HELLO: &[u8; 18] = b"NBDMAGICIHAVEOPT\0\x03";

/// A reply to GO.
fn said(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut raw = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    raw.extend(7u32.to_be_bytes());
    raw.extend(kind.to_be_bytes());
    raw.extend((data.len() as u32).to_be_bytes());
    raw.extend(data);
    raw
}

/// What a server says that has an export of 1 MiB.
fn fine() -> Vec<u8> {
    let export = said(3, &[&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 0x6d]].concat());
    [&HELLO[..], &export, &said(1, b"")].concat()
}

#[test]
fn servers_that_break_rules_are_left() {
    let long = [&HELLO[..], &said(3, b"")[..16], &[0xff; 4]].concat();
    let blocks = |min: u32, max: u32| {
        let words = [min, 4096, max].map(u32::to_be_bytes).concat();
        let export = fine();
        let at = export.len() - 20;
        [&export[..at], &said(3, &[&[0, 3][..], &words].concat()), &export[at..]].concat()
    };
    for (says, why) in [
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".repeat(3), "fixed newstyle"),
        (b"NBDMAGICIHAVEOPT\0\0".to_vec(), "fixed newstyle"),
        (vec![0xaa; 64], "fixed newstyle"),
        ([&HELLO[..], &[7; 40]].concat(), "not sent"),
        (long, "too long"),
        ([&HELLO[..], &said(1, b"")].concat(), "no size"),
        ([&HELLO[..], &said(3, b"\0")].concat(), "wrong length"),
        ([&HELLO[..], &said(3, b"\0\0short")].concat(), "wrong length"),
        ([&HELLO[..], &said(3, b"\0\x03short")].concat(), "wrong length"),
        ([&HELLO[..], &said(3, b"\0\x01name").repeat(300)].concat(), "too many"),
        ([&HELLO[..], &said(1 << 31 | 6, b"no\nsuch\x07thing")].concat(), "no such thing"),
        (blocks(3, 4096), "make no sense"),
        (blocks(0, 4096), "make no sense"),
        (blocks(8192, 4096), "make no sense"),
        (blocks(1, 1), "make no sense"),
    ] {
        let (_dir, uri) = server(says);
        let e = connect(&uri).err().unwrap().to_string();
        assert!(e.contains(why), "{e}: not {why:?}");
    }
    let (_dir, uri) = server(HELLO[..9].to_vec());
    let e = connect_in(&uri, None, SECOND / 10).err().unwrap().to_string();
    assert!(e.contains("takes too long"), "{e}");
    // Replies to nothing, and such as were not agreed on.
    let reply = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &9u64.to_be_bytes()].concat();
    for says in [reply, vec![0x66; 64]] {
        let (_dir, uri) = server([fine(), says].concat());
        let mut c = connect(&uri).unwrap();
        assert_eq!(c.size(), 1 << 20);
        c.write(0, &[0; 512]).unwrap();
        assert!(matches!(c.settle(), Err(ClientError::Protocol(_))));
    }
    let (_dir, uri) = server([fine(), vec![1]].concat());
    let c = connect(&uri).unwrap();
    assert!(matches!(c.look(), Err(ClientError::Protocol(_))));
}

/// A server as there were before GO, which knows no zeroes either.
#[test]
fn older_servers_are_asked_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let serves = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        let take = |s: &mut UnixStream, n: usize| {
            let mut raw = vec![0; n];
            s.read_exact(&mut raw).unwrap();
            raw
        };
        s.write_all(b"NBDMAGICIHAVEOPT\0\x01").unwrap();
        assert_eq!(take(&mut s, 4), [0, 0, 0, 1]);
        let go = take(&mut s, 16);
        let len = u32::from_be_bytes(go[12..].try_into().unwrap());
        take(&mut s, len as usize);
        s.write_all(&said(1 << 31 | 1, b"")).unwrap();
        assert_eq!(take(&mut s, 16)[8..], [0, 0, 0, 1, 0, 0, 0, 3]);
        assert_eq!(take(&mut s, 3), b"old");
        s.write_all(&(4u64 << 20).to_be_bytes()).unwrap();
        s.write_all(&[0, 1]).unwrap();
        s.write_all(&[0; 124]).unwrap();
        let mut disk = vec![0xee; 4 << 20];
        loop {
            let head = take(&mut s, 28);
            let at = u64::from_be_bytes(head[16..24].try_into().unwrap()) as usize;
            let len = u32::from_be_bytes(head[24..].try_into().unwrap()) as usize;
            match head[7] {
                1 => disk[at..at + len].copy_from_slice(&take(&mut s, len)),
                2 => return disk,
                other => panic!("command {other}"),
            }
            let cookie = &head[8..16];
            s.write_all(&[&0x6744_6698u32.to_be_bytes()[..], &[0; 4], cookie].concat()).unwrap();
        }
    });
    let mut c = connect(&unix(&path, "old")).unwrap();
    assert_eq!(c.size(), 4 << 20);
    c.write_zeroes(0, 4 << 20).unwrap();
    c.write(1 << 20, &[5; 4096]).unwrap();
    c.flush().unwrap();
    c.disconnect();
    let disk = serves.join().unwrap();
    assert_eq!(disk[1 << 20..(1 << 20) + 4096], [5; 4096]);
    assert!(disk[..1 << 20].iter().all(|&b| b == 0));
}

/// Whoever says a little again and again is waited for no longer than who says nothing.
#[test]
fn a_handshake_has_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        s.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        let mut asked = [0; 20];
        s.read_exact(&mut asked).unwrap();
        // Information of a kind that nobody knows, in answer to GO.
        let mut info = 0x3e889045565a9u64.to_be_bytes().to_vec();
        info.extend(b"\0\0\0\x07\0\0\0\x03\0\0\0\x02\x77\x77");
        while s.write_all(&info).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let clock = Clock::real();
    let began = clock.now();
    let e = connect_in(&unix(&path, ""), None, SECOND / 2).err().unwrap().to_string();
    assert!(e.contains("too long"), "{e}");
    assert!(clock.now() - began < 5 * SECOND);
    server.join().unwrap();
}
