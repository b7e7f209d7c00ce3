//! The client against servers that are right, wrong, slow, and gone. The real ones are in `tools/tests`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use super::super::{Job, Mix, Outcome, Shape, Sizes, Verify, run};
use super::*;

const PATIENCE: Duration = Duration::from_millis(400);
const SIZE: u64 = 1 << 20;

/// A server that serves one client as `serve` does, after a right handshake with these flags.
struct Served {
    dir: tempfile::TempDir,
    thread: JoinHandle<()>,
}

impl Served {
    fn raw(serve: impl FnOnce(UnixStream) + Send + 'static) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let thread = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        Served { dir, thread }
    }

    fn new(flags: u16, serve: impl FnOnce(UnixStream) + Send + 'static) -> Served {
        Served::raw(move |mut s| {
            greet(&mut s);
            let export = [vec![0, 0], SIZE.to_be_bytes().to_vec(), flags.to_be_bytes().to_vec()];
            let blocks = [1u32, 4096, 2 << 20].map(u32::to_be_bytes).concat();
            answer(&mut s, 3, &export.concat());
            answer(&mut s, 3, &[vec![0, 3], blocks].concat());
            answer(&mut s, 1, &[]);
            serve(s);
        })
    }

    fn connect(&self) -> Result<Nbd, String> {
        Nbd::connect(&self.dir.path().join("socket"), "x", PATIENCE).map_err(|e| e.to_string())
    }

    /// Runs a job on it, and waits for its end.
    fn run(self, job: &Job) -> Result<Outcome, String> {
        let mut nbd = self.connect()?;
        let outcome = run(job, &mut nbd, None, &mut |_| {}).map_err(|e| e.to_string());
        if outcome.is_ok() {
            nbd.close().unwrap();
        } else {
            drop(nbd);
        }
        self.thread.join().unwrap();
        outcome
    }
}

/// Greets, and takes the option GO for the export "x".
fn greet(s: &mut UnixStream) {
    s.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    let mut asked = [0; 4 + 16 + 4 + 1 + 2 + 2];
    s.read_exact(&mut asked).unwrap();
    assert_eq!(asked[..4], [0, 0, 0, 3]);
    assert_eq!(asked[4..20], *b"IHAVEOPT\0\0\0\x07\0\0\0\x09");
    assert_eq!(asked[20..], *b"\0\0\0\x01x\0\x01\0\x03");
}

fn answer(s: &mut UnixStream, kind: u32, data: &[u8]) {
    let mut out = OPTION_REPLY.to_be_bytes().to_vec();
    out.extend([7u32, kind, data.len() as u32].map(u32::to_be_bytes).concat());
    out.extend(data);
    // A client that has seen enough has gone.
    let _ = s.write_all(&out);
}

const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Command, cookie, offset, length, and the data of a write.
type Asked = (u16, [u8; 8], u64, usize, Vec<u8>);

/// A request; `None` at the goodbye, or the end.
fn asked(s: &mut UnixStream) -> Option<Asked> {
    let mut head = [0; HEAD];
    s.read_exact(&mut head).ok()?;
    assert_eq!(head[..6], [0x25, 0x60, 0x95, 0x13, 0, 0]);
    let command = u16::from_be_bytes(head[6..8].try_into().unwrap());
    let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
    let len = u32::from_be_bytes(head[24..].try_into().unwrap()) as usize;
    let mut data = vec![0; if command == 1 { len } else { 0 }];
    s.read_exact(&mut data).unwrap();
    (command != DISCONNECT).then_some((command, head[8..16].try_into().unwrap(), offset, len, data))
}

fn reply(s: &mut UnixStream, cookie: [u8; 8], error: u32, data: &[u8]) {
    let mut out = SIMPLE_REPLY.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(cookie);
    out.extend(data);
    // A client that has seen enough has gone.
    let _ = s.write_all(&out);
}

fn is_silent(s: &UnixStream) -> bool {
    let mut fds = [PollFd::new(s.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut fds, 20u8).unwrap() == 0
}

/// Serves a disk in memory until the goodbye, two requests at a time in the wrong order.
fn serve(mut s: UnixStream) {
    let mut disk = vec![0; SIZE as usize];
    let mut held: Option<([u8; 8], Vec<u8>)> = None;
    let mut count = 0u64;
    loop {
        // Whoever waits for what is held sends nothing more.
        if let Some((other, data)) = held.take_if(|_| is_silent(&s)) {
            reply(&mut s, other, 0, &data);
        }
        let Some((command, cookie, offset, len, data)) = asked(&mut s) else { return };
        let at = offset as usize..offset as usize + len;
        let read = match command {
            0 => disk[at].to_vec(),
            1 => {
                disk[at].copy_from_slice(&data);
                Vec::new()
            }
            3 => Vec::new(),
            4 => {
                disk[at].fill(0);
                Vec::new()
            }
            _ => panic!("command {command}"),
        };
        count += 1;
        // One may wait for the next; its answer comes in two parts.
        match held.take() {
            Some((other, data)) => {
                reply(&mut s, cookie, 0, &read);
                let (first, rest) = data.split_at(data.len() / 2);
                reply(&mut s, other, 0, first);
                s.write_all(rest).unwrap();
            }
            None if count > 100 && count < 1000 => held = Some((cookie, read)),
            None => reply(&mut s, cookie, 0, &read),
        }
    }
}

fn job() -> Job {
    let (sizes, shape) = (Sizes(vec![(4096, 60), (1 << 16, 40)]), Shape::Depth(16));
    Job { sizes, shape, requests: Some(1500), seconds: 60.0, ..Job::default() }
}

#[test]
fn everything_is_sent_answered_and_verified() {
    let mix = Mix { reads: 50, trims: 10 };
    let (verify, flush_every) = (Verify::Stamped, Some(7));
    let all = 1 | SEND_FLUSH | SEND_TRIM;
    let o = Served::new(all, serve).run(&Job { mix, verify, flush_every, ..job() }).unwrap();
    assert_eq!((o.requests, o.errors), (1500, 0));
    assert!(o.verified_bytes > SIZE && o.flushes.is_some() && o.trims.is_some(), "{o:?}");
    let o = Served::new(1, serve).run(&job()).unwrap();
    assert_eq!((o.requests, o.verified_bytes), (1500, 0));
    assert!(o.bytes > 1500 * 4096);
}

#[test]
fn a_wrong_byte_from_the_server_is_found() {
    let spoiling = |mut s: UnixStream| {
        let mut disk = vec![0; SIZE as usize];
        while let Some((command, cookie, offset, len, data)) = asked(&mut s) {
            let at = offset as usize..offset as usize + len;
            if command == 1 {
                disk[at.clone()].copy_from_slice(&data);
                // It loses a bit of one block.
                disk[5 * 4096 + 9] &= 0xfe;
                disk[5 * 4096 + 10] |= 1;
            }
            let read = if command == 0 { disk[at].to_vec() } else { Vec::new() };
            reply(&mut s, cookie, 0, &read);
        }
    };
    let (mix, verify) = (Mix { reads: 0, trims: 0 }, Verify::Stamped);
    let error = Served::new(1, spoiling).run(&Job { mix, verify, ..job() }).unwrap_err();
    let at = [5 * 4096 + 9, 5 * 4096 + 10];
    assert!(at.iter().any(|at| error.contains(&format!("byte {at} is wrong"))), "{error}");
}

#[test]
fn what_the_export_does_not_know_is_not_sent() {
    let refused = |flags, mix, flush_every: Option<u32>, text: &str| {
        let served = Served::new(flags, |mut s| assert!(asked(&mut s).is_none()));
        let error = served.run(&Job { mix, flush_every, ..job() }).unwrap_err();
        assert!(error.contains(text), "{error}");
    };
    refused(1 | READ_ONLY, Mix { reads: 50, trims: 0 }, None, "cannot be written to");
    refused(1, Mix { reads: 50, trims: 50 }, None, "no discards");
    refused(1, Mix { reads: 50, trims: 0 }, Some(1), "no flushes");
}

#[test]
fn an_error_of_the_server_is_counted() {
    let failing = |mut s: UnixStream| {
        let mut count = 0;
        while let Some((_, cookie, _, len, _)) = asked(&mut s) {
            count += 1;
            let error = if count % 10 == 0 { 5 } else { 0 };
            reply(&mut s, cookie, error, &vec![7; if error == 0 { len } else { 0 }]);
        }
    };
    let o = Served::new(1, failing).run(&job()).unwrap();
    assert_eq!((o.requests, o.errors), (1350, 150));
}

#[test]
fn servers_that_lie_are_told_from_others() {
    type Lie = fn(UnixStream);
    let lies: [(&str, Lie); 6] = [
        ("hung up", |mut s| drop(asked(&mut s))),
        ("no simple reply", |mut s| {
            asked(&mut s);
            s.write_all(&[0x66; 64]).unwrap();
        }),
        ("was not sent", |mut s| {
            let (_, mut cookie, ..) = asked(&mut s).unwrap();
            cookie[7] ^= 0x40;
            reply(&mut s, cookie, 0, &[]);
        }),
        ("was not sent", |mut s| {
            // Before anything was asked.
            reply(&mut s, [0; 8], 0, &[]);
            while asked(&mut s).is_some() {}
        }),
        ("was not sent", |mut s| {
            let (_, cookie, _, len, _) = asked(&mut s).unwrap();
            reply(&mut s, cookie, 0, &vec![0; len]);
            reply(&mut s, cookie, 0, &vec![0; len]);
            while asked(&mut s).is_some() {}
        }),
        ("has answered none of", |mut s| while asked(&mut s).is_some() {}),
    ];
    for (text, lie) in lies {
        let error = Served::new(1, lie).run(&job()).unwrap_err();
        assert!(error.contains(text) && error.contains("socket"), "{text}: {error}");
    }
}

#[test]
fn a_handshake_that_is_none_has_an_end() {
    type Say = fn(UnixStream);
    let says: [(&str, Say); 8] = [
        ("takes too long", |mut s| drop(s.read(&mut [0; 64]))),
        ("takes too long", |mut s| {
            // A byte at a time, for ever.
            while s.write_all(b"N").is_ok() {
                std::thread::sleep(Duration::from_millis(60));
            }
        }),
        ("no NBD server", |mut s| s.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n").unwrap()),
        ("hung up", drop),
        ("no export \"x\"", |mut s| {
            greet(&mut s);
            answer(&mut s, 1 << 31 | 6, b"no such thing");
        }),
        ("refuses the export \"x\": 0x80000005 TLS first", |mut s| {
            greet(&mut s);
            answer(&mut s, 1 << 31 | 5, b"TLS first");
        }),
        ("does not say its size", |mut s| {
            greet(&mut s);
            answer(&mut s, 1, &[]);
        }),
        ("too short", |mut s| {
            greet(&mut s);
            answer(&mut s, 3, &[0, 0, 1]);
        }),
    ];
    for (text, say) in says {
        let served = Served::raw(say);
        let error = served.connect().map(drop).unwrap_err();
        assert!(error.contains(text), "{text}: {error}");
        served.thread.join().unwrap();
    }
    let many = Served::raw(|mut s| {
        greet(&mut s);
        for _ in 0..100 {
            answer(&mut s, 3, &[9, 9]);
        }
    });
    assert!(many.connect().map(drop).unwrap_err().contains("come to an end"));
    let none = Nbd::connect(Path::new("/nowhere/at/all"), "", PATIENCE).map(drop);
    assert!(none.unwrap_err().to_string().contains("/nowhere/at/all"));
}

#[test]
fn a_server_of_the_older_kind_is_asked_in_the_older_way() {
    let served = Served::raw(|mut s| {
        greet(&mut s);
        answer(&mut s, 1 << 31 | 1, &[]);
        let mut asked = [0; 17];
        s.read_exact(&mut asked).unwrap();
        assert_eq!(asked, *b"IHAVEOPT\0\0\0\x01\0\0\0\x01x");
        s.write_all(&[SIZE.to_be_bytes().to_vec(), vec![0, 1]].concat()).unwrap();
        serve(s);
    });
    assert_eq!(served.run(&Job { requests: Some(50), ..job() }).unwrap().requests, 50);
}
