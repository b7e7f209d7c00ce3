//! Connections on the reactor's own thread, and their way there and back.

mod common;

use std::time::Duration;

use block::Status;
use common::*;

/// A connection that lodges with the reactor.
fn lodging(h: &Harness, structured: bool) -> Client {
    let before = h.lodgers();
    let mut c = Client::connect(&h.path).go(structured, false);
    eventually("the reactor takes it in", || {
        c.read(0, 512);
        h.lodgers() > before
    });
    c
}

#[test]
fn a_connection_alone_lodges_and_keeps_the_reactor_asleep_in_between() {
    let h = Harness::new(Setup::default());
    let mut c = lodging(&h, true);
    let (turns, sends) = (h.turns(), h.server().totals().1.sends);
    for i in 0..200u64 {
        let data = vec![i as u8; 4096];
        assert_eq!(c.ask(WRITE, 0, i * 4096, 4096, &data).error, 0);
        assert_eq!(c.read(i * 4096, 4096), data);
    }
    assert_eq!(h.lodgers(), 1);
    assert_eq!(h.server().totals().1.sends - sends, 400);
    std::thread::sleep(Duration::from_millis(30));
    // Some turns for each request, not the many of a reactor that spins.
    let turns = h.turns() - turns;
    assert!(turns < 400 * 20, "{turns} turns for 400 requests");
}

#[test]
fn what_may_take_long_is_done_at_home() {
    let h = Harness::new(Setup::default());
    let mut c = lodging(&h, true);
    // In the middle of other requests, and with data behind it that is staged already.
    h.control.hold(true);
    let reads: Vec<u64> = (0..4).map(|i| c.send(READ, 0, i * 512, 512, b"")).collect();
    let status = c.send(STATUS, 0, 0, 1 << 20, b"");
    let write = c.send(WRITE, 0, 65536, 512, &[7; 512]);
    eventually("it goes home", || h.lodgers() == 0);
    h.control.hold(false);
    let (mut answer, mut seen) = (Answer::default(), Vec::new());
    while seen.len() < 6 {
        let (cookie, last) = c.message(0, &mut answer);
        seen.extend(last.then_some(cookie));
    }
    seen.sort_unstable();
    assert_eq!(seen, [&reads[..], &[status, write]].concat());
    assert_eq!(answer.error, 0);
    assert!(!answer.extents.is_empty());
    assert_eq!(h.bytes(65536, 512), [7; 512]);
    eventually("it comes again", || {
        c.read(0, 512);
        h.lodgers() == 1
    });
}

/// Has a client, whose replies are simple ones, ask for so many blocks in one piece and read the
/// answers in large ones, so that not it but the reactor has most to do.
fn ask_for_many(mut c: Client, count: usize) -> std::thread::JoinHandle<Client> {
    std::thread::spawn(move || {
        let asked: Vec<u8> =
            (0..count as u64).flat_map(|i| Client::raw(READ, 0, i, i % 64 * 512, 512)).collect();
        let mut to = c.s.try_clone().unwrap();
        let asks = std::thread::spawn(move || std::io::Write::write_all(&mut to, &asked).unwrap());
        std::io::Read::read_exact(&mut c.s, &mut vec![0; count * (16 + 512)]).unwrap();
        asks.join().unwrap();
        c
    })
}

const MANY: usize = 50_000;

#[test]
fn those_that_keep_the_reactor_busy_go_home() {
    let h = Harness::new(Setup::default());
    let clients = [lodging(&h, false), lodging(&h, false)];
    assert_eq!(h.lodgers(), 2);
    let busy = clients.map(|c| ask_for_many(c, MANY));
    let mut left = false;
    while !left && !busy.iter().any(std::thread::JoinHandle::is_finished) {
        left = h.lodgers() == 0;
    }
    assert!(left, "they stayed until one had all of its answers");
    for client in busy {
        client.join().unwrap().read(0, 512);
    }
}

#[test]
fn one_that_has_the_reactor_for_itself_stays() {
    let h = Harness::new(Setup::default());
    let client = ask_for_many(lodging(&h, false), MANY);
    while !client.is_finished() {
        assert_eq!(h.lodgers(), 1);
        std::thread::sleep(Duration::from_millis(5));
    }
    client.join().unwrap().read(0, 512);
}

#[test]
fn one_that_has_nothing_to_do_makes_place() {
    let h = Harness::new(Setup::default());
    let mut c = lodging(&h, false);
    eventually("it goes home", || h.lodgers() == 0);
    c.read(0, 512);
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let h = Harness::new(Setup::default());
    h.data.write(0, &[3; 16 << 20]);
    let (mut lazy, mut other) = (lodging(&h, true), lodging(&h, true));
    // More than sockets take.
    for i in 0..16 {
        lazy.send(READ, 0, i << 20, 1 << 20, b"");
    }
    for i in 0..200 {
        assert_eq!(other.read(i * 512, 512), [3; 512]);
    }
    let (mut answer, mut ended) = (Answer::default(), 0);
    while ended < 16 {
        ended += u32::from(lazy.message(0, &mut answer).1);
    }
    assert!(answer.data.iter().all(|(_, bytes)| bytes.iter().all(|&b| b == 3)));
    assert_eq!(answer.data.iter().map(|d| d.1.len()).sum::<usize>(), 16 << 20);
}

#[test]
fn a_claim_that_others_hold_is_waited_for_at_home() {
    let h = Harness::new(Setup::default());
    let (mut a, mut b) = (lodging(&h, true), lodging(&h, true));
    h.control.hold(true);
    // Part of a block has it alone; the other's write to it has to wait.
    a.send(WRITE, 0, 100, 10, &[1; 10]);
    eventually("it is read", || !h.control.seen(block::Op::Read).is_empty());
    b.send(WRITE, 0, 0, 512, &[2; 512]);
    eventually("it is at home", || h.lodgers() <= 1);
    h.control.hold(false);
    for c in [&mut a, &mut b] {
        let mut answer = Answer::default();
        assert_eq!(c.message(0, &mut answer), (c.sent(), true));
        assert_eq!(answer.error, 0);
    }
    let bytes = h.bytes(0, 512);
    assert!(bytes.iter().all(|&b| b == 2) || bytes[100..110] == [1; 10], "{bytes:?}");
}

#[test]
fn one_that_goes_with_requests_in_flight_ends() {
    let h = Harness::new(Setup::default());
    for polite in [true, false] {
        let mut c = lodging(&h, true);
        h.control.hold(true);
        c.send(WRITE, 0, 0, 512, &[9; 512]);
        c.send(READ, 0, 4096, 512, b"");
        if polite {
            c.send(DISC, 0, 0, 0, b"");
        }
        drop(c);
        eventually("it goes home", || h.lodgers() == 0);
        assert_eq!(h.server().connections().len(), 1, "its buffers are the disk's yet");
        h.control.hold(false);
        h.wait_empty();
        assert_eq!(h.bytes(0, 512), [9; 512]);
    }
}

#[test]
fn a_server_that_stops_calls_them_home() {
    let mut h = Harness::new(Setup::default());
    let mut c = lodging(&h, true);
    // One that sleeps, with nothing in flight; and one with a request.
    let _idle = lodging(&h, false);
    h.control.hold(true);
    let before = h.control.seen(block::Op::Read).len();
    c.send(READ, 0, 0, 512, b"");
    eventually("it is asked", || h.control.seen(block::Op::Read).len() > before);
    let server = h.server.take().unwrap();
    let end = std::thread::spawn(move || server.shutdown(Duration::from_secs(10)));
    eventually("they go home", || h.lodgers() == 0);
    h.control.hold(false);
    assert_eq!(c.message(512, &mut Answer::default()), (c.sent(), true));
    assert_eq!(end.join().unwrap(), 0);
}

#[test]
fn errors_and_wrong_words_of_a_lodger() {
    let h = Harness::new(Setup::default());
    let mut c = lodging(&h, true);
    h.control.fail(4096..8192, Status::Medium);
    assert_eq!(c.ask(READ, 0, 4096, 512, b"").error, 5);
    assert_eq!(c.ask(READ, 0, 1 << 40, 512, b"").error, 22);
    assert_eq!(h.lodgers(), 1);
    std::io::Write::write_all(&mut c.s, &[0xff; 28]).unwrap();
    h.wait_empty();
    assert_eq!(h.lodgers(), 0);
}
