//! Clients that break rules, vanish or never read; many clients; shutdown.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use block::{Op, Status};
use common::*;

#[test]
fn a_bad_magic_costs_the_connection_and_no_other() {
    let h = Harness::new(Setup::default());
    let mut other = h.connect().go(true, false);
    for garbage in [&[0u8; 28][..], &[0xff; 100], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let mut c = h.connect().go(true, false);
        assert_eq!(c.write(0, &[1; 512]), 0);
        c.s.write_all(garbage).unwrap();
        assert!(c.is_closed());
    }
    let mut c = h.connect();
    c.s.write_all(&[0x55; 64]).unwrap();
    let mut all = Vec::new();
    let _ = c.s.read_to_end(&mut all);
    assert_eq!(all.len(), 18, "only the greeting");
    assert_eq!(other.read(0, 512), [1; 512]);
    eventually("only one is left", || h.server().connections().len() == 1);
}

#[test]
fn frames_may_come_byte_by_byte() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    let mut raw = Client::raw(WRITE, 0, 1, 1000, 5);
    raw.extend(b"hello");
    raw.extend(Client::raw(READ, 0, 2, 999, 7));
    for byte in raw {
        c.s.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    let mut answers = [Answer::default(), Answer::default()];
    assert_eq!(c.message(0, &mut answers[0]), (1, true));
    assert_eq!(c.message(0, &mut answers[1]), (2, true));
    assert_eq!(answers[1].bytes(999, 7), b"\0hello\0");
}

#[test]
fn who_never_reads_is_bounded_and_disturbs_nobody() {
    let h = Harness::new(Setup::default());
    let mut deaf = h.connect().go(true, false);
    deaf.s.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // Asks for far more than all buffers hold, until the server takes no more requests.
    let mut sent = 0;
    while deaf.s.write_all(&Client::raw(READ, 0, 1, 0, 1 << 20)).is_ok() {
        sent += 1;
        assert!(sent < 100_000, "the server takes requests without end");
    }
    let read = h.control.seen(Op::Read).iter().map(|r| r.2).sum::<u64>();
    assert!(read <= 12 << 20, "{read} bytes are read for somebody who does not listen");
    let mut c = h.connect().go(true, false);
    for i in 0..200 {
        assert_eq!(c.write(i * 4096, &[i as u8; 4096]), 0);
        assert_eq!(c.read(i * 4096, 4096), [i as u8; 4096]);
    }
    assert_eq!(h.server().connections().len(), 2);
    drop(deaf);
    eventually("the deaf one is gone", || h.server().connections().len() == 1);
}

#[test]
fn who_sends_data_before_reading_replies_is_served() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    // More replies than the socket and the buffers hold, and then a long write.
    for _ in 0..60 {
        c.send(READ, 0, 0, 1 << 20, b"");
    }
    let write = c.send(WRITE, 0, 4 << 20, 4 << 20, &vec![6; 4 << 20]);
    let mut done = std::collections::HashSet::new();
    while done.len() < 61 {
        let mut answer = Answer::default();
        let (cookie, last) = c.message(0, &mut answer);
        assert_eq!(answer.error, 0);
        if last {
            done.insert(cookie);
        }
    }
    assert!(done.contains(&write) && h.bytes(4 << 20, 4 << 20).iter().all(|&b| b == 6));
}

#[test]
fn buffers_outlive_a_client_that_vanishes() {
    let h = Harness::new(Setup::default());
    h.data.write(0, &[0xaa; 1 << 20]);
    h.control.hold(true);
    let mut c = h.connect().go(true, false);
    for i in 0..20 {
        c.send(READ, 0, i * 4096, 4096, b"");
        c.send(WRITE, 0, (8 << 20) + i * 4096, 4096, &[0xbb; 4096]);
    }
    // And half of another request.
    c.s.write_all(&Client::raw(WRITE, 0, 99, 12 << 20, 1 << 20)).unwrap();
    c.s.write_all(&[0xcc; 300_000]).unwrap();
    eventually("all is under way", || h.control.log.lock().len() >= 41);
    drop(c);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(h.server().connections().len(), 1, "its memory is still in use");
    // The next client gets another seat; nothing of the first one's fate is seen here.
    h.control.hold(false);
    let mut next = h.connect().go(true, false);
    assert_eq!(next.read(8 << 20, 4096), [0xbb; 4096]);
    eventually("the first is gone", || h.server().connections().len() == 1);
    for i in 0..20 {
        assert_eq!(h.bytes((8 << 20) + i * 4096, 4096), [0xbb; 4096]);
    }
}

#[test]
fn seats_and_their_memory_serve_one_client_after_another() {
    let h = Harness::new(Setup::default());
    for i in 0..300u64 {
        let mut c = h.connect().go(i % 2 == 0, false);
        assert_eq!(c.write(i * 512, &[i as u8; 512]), 0);
        match i % 3 {
            0 => drop(c.send(DISC, 0, 0, 0, b"")),
            1 => drop(c.send(READ, 0, 0, 8 << 20, b"")),
            _ => c.s.write_all(&Client::raw(WRITE, 0, 1, 0, 999)).unwrap(),
        }
    }
    h.wait_empty();
    let (clients, counters) = h.server().totals();
    assert_eq!((clients, counters.reads), (300, 100));
    assert!(counters.writes >= 300);
}

#[test]
fn disconnect_finishes_what_was_asked_before() {
    let h = Harness::new(Setup::default());
    h.control.hold(true);
    let mut c = h.connect().go(true, false);
    for i in 0..10 {
        c.send(WRITE, 0, i * 512, 512, &[7; 512]);
    }
    c.send(DISC, 0, 0, 0, b"");
    eventually("writes are under way", || h.control.seen(Op::Write).len() == 10);
    h.control.hold(false);
    for _ in 0..10 {
        let mut answer = Answer::default();
        assert!(c.message(0, &mut answer).1 && answer.error == 0);
    }
    assert!(c.is_closed());
    assert_eq!(h.bytes(0, 5120), [7; 5120]);
    // Also if the client does not wait: bytes already in the socket count.
    for round in 0..20 {
        let mut c = h.connect().go(true, false);
        for i in 0..150 {
            c.send(WRITE, 0, i * 512, 512, &[round; 512]);
        }
        c.send(DISC, 0, 0, 0, b"");
        drop(c);
        h.wait_empty();
        assert!(h.bytes(0, 150 * 512).iter().all(|&b| b == round));
    }
}

#[test]
fn a_flush_covers_the_writes_of_all_connections() {
    let h = Harness::new(Setup::default());
    let (mut a, mut b) = (h.connect().go(true, false), h.connect().go(true, false));
    assert_eq!(a.write(0, &[1; 512]), 0);
    assert_eq!(b.ask(FLUSH, 0, 0, 0, b"").error, 0);
    let log = h.control.log.lock();
    assert_eq!((log[0].0, log[1].0), (Op::Write, Op::Flush));
}

#[test]
fn the_number_of_clients_is_bounded() {
    let h = Harness::new(Setup::default());
    let mut clients: Vec<Client> = (0..64).map(|_| h.connect()).collect();
    eventually("all are seated", || h.server().connections().len() == 64);
    let mut more = h.connect();
    assert!(more.is_closed());
    assert_eq!(h.server().refused(), 1);
    clients.truncate(60);
    eventually("some have left", || h.server().connections().len() == 60);
    let mut clients: Vec<Client> = clients.into_iter().map(|c| c.go(true, false)).collect();
    for (i, c) in clients.iter_mut().enumerate() {
        c.send(WRITE, 0, i as u64 * 4096, 4096, &[i as u8 + 1; 4096]);
    }
    for c in &mut clients {
        let mut answer = Answer::default();
        c.message(0, &mut answer);
        assert_eq!(answer.error, 0);
    }
    for i in 0..60 {
        assert_eq!(h.bytes(i * 4096, 4096), [i as u8 + 1; 4096]);
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test of time")]
fn shutdown_lets_clients_finish_and_removes_the_socket() {
    let mut h = Harness::new(Setup::default());
    h.control.hold(true);
    let mut busy = h.connect().go(true, false);
    let mut idle = h.connect().go(true, false);
    let mut greeted = h.connect();
    greeted.greet();
    busy.send(WRITE, 0, 0, 512, &[3; 512]);
    eventually("it is under way", || !h.control.log.lock().is_empty());
    let server = h.server.take().unwrap();
    let began = Instant::now();
    let ended = std::thread::spawn(move || server.shutdown(Duration::from_secs(10)));
    assert!(idle.is_closed() && greeted.is_closed());
    eventually("no more are let in", || UnixStream::connect(&h.path).is_err());
    // What comes now is refused, with its data, unless its thread has not heard of the end yet.
    let late = busy.send(WRITE, 0, 512, 512, &[4; 512]);
    h.control.hold(false);
    let mut errors = Vec::new();
    while errors.len() < 2 {
        let mut answer = Answer::default();
        let mut magic = [0; 4];
        if busy.s.read_exact(&mut magic).is_err() {
            break;
        }
        // The server may have gone to sleep before this request came: then it is not read at all.
        let mut rest = vec![0; if magic == [0x67, 0x44, 0x66, 0x98] { 12 } else { 16 }];
        busy.s.read_exact(&mut rest).unwrap();
        if rest.len() == 12 {
            errors.push(u32::from_be_bytes(rest[..4].try_into().unwrap()));
        } else {
            let len = u32::from_be_bytes(rest[12..].try_into().unwrap());
            let mut payload = vec![0; len as usize];
            busy.s.read_exact(&mut payload).unwrap();
            assert_eq!(rest[4..12], late.to_be_bytes());
            answer.error = u32::from_be_bytes(payload[..4].try_into().unwrap());
            errors.push(answer.error);
        }
    }
    errors.sort_unstable();
    let taken = errors == [0, 0];
    assert!(taken || errors == [0] || errors == [0, 108], "{errors:?}");
    assert_eq!(ended.join().unwrap(), 0);
    assert!(began.elapsed() < Duration::from_secs(5) && !h.path.exists());
    let late = vec![if taken { 4 } else { 0 }; 512];
    assert_eq!((h.bytes(0, 512), h.bytes(512, 512)), (vec![3; 512], late));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test of time")]
fn shutdown_does_not_wait_longer_than_it_was_told() {
    let mut h = Harness::new(Setup::default());
    let mut hung = h.connect().go(true, false);
    let mut deaf = h.connect().go(true, false);
    for _ in 0..20 {
        deaf.send(READ, 0, 0, 1 << 20, b"");
    }
    // In the middle of a request for ever.
    let mut slow = h.connect().go(true, false);
    slow.s.write_all(&Client::raw(WRITE, 0, 1, 0, 100_000)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    h.control.hold(true);
    hung.send(FLUSH, 0, 0, 0, b"");
    eventually("it is under way", || !h.control.seen(Op::Flush).is_empty());
    let began = Instant::now();
    let left = h.server.take().unwrap().shutdown(Duration::from_millis(300));
    let took = began.elapsed();
    assert!(left >= 1, "the device has not answered");
    assert!(took > Duration::from_millis(290) && took < Duration::from_secs(3), "{took:?}");
    assert!(hung.is_closed());
    let mut rest = Vec::new();
    let _ = deaf.s.read_to_end(&mut rest);
}

#[test]
fn a_device_that_is_gone_says_so_to_everyone() {
    let h = Harness::new(Setup::default());
    h.control.fail(0..u64::MAX, Status::Gone);
    for structured in [true, false] {
        let mut c = h.connect().go(structured, false);
        assert_eq!(c.ask(READ, 0, 0, 4 << 20, b"").error, 108);
        assert_eq!(c.ask(FLUSH, 0, 0, 0, b"").error, 108);
        assert_eq!(c.ask(ZEROES, 0, 1, 1 << 20, b"").error, 108);
        assert_eq!(c.write(1, &vec![1; 1 << 20]), 108);
    }
}

#[test]
fn random_bytes_never_harm_the_server() {
    let h = Harness::new(Setup::default());
    let mut random = Random(42);
    for _ in 0..300 {
        let mut c = h.connect();
        c.greet();
        if random.below(2) == 0 {
            c = h.connect().go(random.below(2) == 0, random.below(2) == 0);
        }
        for _ in 0..random.below(6) {
            // Requests and options with some right parts.
            let mut raw = if random.below(3) == 0 {
                [&b"IHAVEOPT\0\0\0"[..], &[random.below(14) as u8]].concat()
            } else {
                let offset = random.below(20 << 20);
                let (command, flags) = (random.below(9) as u16, random.below(40) as u16);
                Client::raw(command, flags, 5, offset, random.below(1 << 22) as u32)
            };
            let len = random.below(5000) as usize;
            raw.extend(random.bytes(len));
            if c.s.write_all(&raw).is_err() {
                break;
            }
        }
    }
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &[1; 512]), 0);
    assert_eq!(c.read(0, 512), [1; 512]);
    drop(c);
    h.wait_empty();
}
