//! Clients that negotiate in every way, right and wrong.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;
use crate::export::AllData;
use crate::export::tests::export;

/// The whole of it.
fn greeted<T>(
    line: &Line<'_>,
    attach: impl FnMut() -> Result<T, String>,
) -> Result<Session<T>, End> {
    let no_zeroes = greet(line)?;
    let terms = Terms { no_zeroes, ..Terms::default() };
    negotiate(line, &export(Box::new(AllData)), terms, attach)
}

/// A client's end of a handshake that runs on another thread.
struct Client {
    s: UnixStream,
}

impl Client {
    fn option(&mut self, option: u32, data: &[u8]) {
        let mut raw = proto::OPTION_MAGIC.to_be_bytes().to_vec();
        raw.extend(option.to_be_bytes());
        raw.extend((data.len() as u32).to_be_bytes());
        raw.extend(data);
        self.s.write_all(&raw).unwrap();
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut raw = [0; N];
        self.s.read_exact(&mut raw).unwrap();
        raw
    }

    /// The next reply to `option`: its type and data.
    fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(u64::from_be_bytes(self.take()), proto::OPTION_REPLY_MAGIC);
        assert_eq!(u32::from_be_bytes(self.take()), option);
        let kind = u32::from_be_bytes(self.take());
        let mut data = vec![0; u32::from_be_bytes(self.take()) as usize];
        self.s.read_exact(&mut data).unwrap();
        (kind, data)
    }

    /// Sends an option and returns the replies up to the final one.
    fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.option(option, data);
        let mut all = Vec::new();
        loop {
            let reply = self.reply(option);
            let last = reply.0 == option_reply::ACK || reply.0 >> 31 == 1;
            all.push(reply);
            if last {
                return all;
            }
        }
    }

    /// The type of the only reply.
    fn verdict(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.ask(option, data);
        assert_eq!(replies.len(), 1);
        replies[0].0
    }
}

fn go(name: &str, items: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((items.len() as u16).to_be_bytes());
    items.iter().for_each(|i| data.extend(i.to_be_bytes()));
    data
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for q in queries {
        data.extend((q.len() as u32).to_be_bytes());
        data.extend(q.as_bytes());
    }
    data
}

/// Runs `client` against a handshake with a deadline of `ms` and returns how that ended. The
/// first `refusals` attaches fail.
fn with(
    ms: u64,
    flags: u32,
    refusals: usize,
    client: impl FnOnce(&mut Client) + Send + 'static,
) -> Result<Session<()>, End> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let thread = std::thread::spawn(move || {
        let mut c = Client { s: theirs };
        assert_eq!(&c.take::<16>(), b"NBDMAGICIHAVEOPT");
        assert_eq!(c.take(), [0, 3]);
        c.s.write_all(&flags.to_be_bytes()).unwrap();
        client(&mut c);
    });
    let (clock, stop, wake) = (Clock::real(), AtomicBool::new(false), Wake::new().unwrap());
    let deadline = clock.now() + ms * 1_000_000;
    let line = Line { fd: ours.as_fd(), wake: &wake, stop: &stop, clock: &clock, deadline };
    let mut left = refusals;
    let end = greeted(&line, || {
        if left == 0 {
            return Ok(());
        }
        left -= 1;
        Err("no room".to_owned())
    });
    drop(ours);
    thread.join().unwrap();
    end
}

#[test]
fn export_name_with_and_without_zeroes() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let session = with(5000, flags, 0, move |c| {
            c.option(option::EXPORT_NAME, b"disk");
            assert_eq!(c.take::<10>()[..], [0, 0, 0, 0, 0x40, 0, 0, 0, 0x09, 0x6d]);
            let mut rest = Vec::new();
            c.s.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, vec![0; zeroes]);
        });
        let s = session.unwrap();
        assert!(!s.structured && s.contexts.is_empty() && !s.aligned);
    }
    let end = with(5000, 3, 0, |c| c.option(option::EXPORT_NAME, b""));
    assert!(matches!(end, Err(End::Refused(_))));
    let end = with(5000, 3, 1, |c| c.option(option::EXPORT_NAME, b"disk"));
    assert_eq!(end.unwrap_err(), End::Refused("no room".to_owned()));
}

#[test]
fn go_with_all_that_can_be_agreed() {
    let session = with(5000, 3, 1, |c| {
        assert_eq!(c.verdict(option::STARTTLS, b""), option_reply::ERR_POLICY);
        assert_eq!(c.verdict(11, b""), option_reply::ERR_UNSUP);
        assert_eq!(c.verdict(99, &[7; 60000]), option_reply::ERR_UNSUP);
        let list = c.ask(option::LIST, b"");
        assert_eq!(list[0], (option_reply::SERVER, b"\0\0\0\x04diska disk".to_vec()));
        assert_eq!(c.verdict(option::LIST, b"x"), option_reply::ERR_INVALID);
        let set = queries("disk", &["qemu:x", "base:allocation", "base:"]);
        assert_eq!(c.verdict(option::SET_META_CONTEXT, &set), option_reply::ERR_INVALID);
        assert_eq!(c.verdict(option::STRUCTURED_REPLY, b""), option_reply::ACK);
        for list in [vec![], vec!["base:"], vec!["nope", "base:allocation"]] {
            let replies = c.ask(option::LIST_META_CONTEXT, &queries("disk", &list));
            assert_eq!(replies[0].1, b"\0\0\0\0base:allocation");
        }
        for none in ["base:other", "x:", "base:allocatio", "nocolon"] {
            let none = queries("disk", &[none]);
            assert_eq!(c.verdict(option::LIST_META_CONTEXT, &none), option_reply::ACK);
            assert_eq!(c.verdict(option::SET_META_CONTEXT, &none), option_reply::ACK);
        }
        let info = c.ask(option::INFO, &go("disk", &[]));
        assert_eq!((info.len(), info[0].1.len()), (3, 12));
        let set = c.ask(option::SET_META_CONTEXT, &set);
        assert_eq!(set[0], (option_reply::META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()));
        assert_eq!(c.verdict(option::GO, &go("other", &[])), option_reply::ERR_UNKNOWN);
        let failed = c.ask(option::GO, &go("disk", &[3]));
        assert_eq!(failed.last().unwrap().0, option_reply::ERR_PLATFORM);
        let items = c.ask(option::GO, &go("disk", &[1, 2, 3, 77]));
        let items: Vec<_> = items.iter().map(|i| &i.1[..]).collect();
        assert_eq!(items[0], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x09, 0xed]);
        assert_eq!(items[1..3], [b"\0\x01disk".as_slice(), b"\0\x02a disk"]);
        assert_eq!(items[3], [0, 3, 0, 0, 2, 0, 0, 1, 0, 0, 2, 0, 0, 0]);
    });
    let s = session.unwrap();
    assert!(s.structured && s.contexts.len() == 1 && s.aligned);
}

#[test]
fn a_selection_is_replaced_also_by_a_request_that_fails() {
    let session = with(5000, 3, 0, |c| {
        c.ask(option::STRUCTURED_REPLY, b"");
        c.ask(option::SET_META_CONTEXT, &queries("disk", &["base:allocation"]));
        let other = queries("other", &["base:allocation"]);
        assert_eq!(c.verdict(option::SET_META_CONTEXT, &other), option_reply::ERR_UNKNOWN);
        c.ask(option::GO, &go("disk", &[]));
    });
    let s = session.unwrap();
    assert!(s.structured && s.contexts.is_empty() && !s.aligned);
}

#[test]
fn data_that_contradicts_itself_is_answered() {
    let end = with(5000, 3, 0, |c| {
        let mut long = go("disk", &[3]);
        long[0] = 0xff;
        let bad_go: [&[u8]; 5] =
            [b"", b"\0\0\0", &long, &go("disk", &[3])[..11], b"\0\0\0\0\0\x02\0"];
        for bad in bad_go {
            assert_eq!(c.verdict(option::GO, bad), option_reply::ERR_INVALID);
            assert_eq!(c.verdict(option::INFO, bad), option_reply::ERR_INVALID);
        }
        let mut many = queries("disk", &[]);
        many[8..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(c.verdict(option::LIST_META_CONTEXT, &many), option_reply::ERR_TOO_BIG);
        let mut cut = queries("disk", &["base:"]);
        cut.pop();
        assert_eq!(c.verdict(option::LIST_META_CONTEXT, &cut), option_reply::ERR_INVALID);
        cut.extend([b':', 0]);
        assert_eq!(c.verdict(option::LIST_META_CONTEXT, &cut), option_reply::ERR_INVALID);
        assert_eq!(c.verdict(option::ABORT, b"bye"), option_reply::ACK);
    });
    assert_eq!(end.unwrap_err(), End::Left);
}

#[test]
fn rule_breakers_and_the_silent_are_cut_off() {
    let broke = |end: Result<Session<()>, End>| match end {
        Err(End::Broke(what)) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(broke(with(5000, 4, 0, |_| ())), "unknown client flags");
    let magic = with(5000, 3, 0, |c| c.s.write_all(&[0x42; 16]).unwrap());
    assert_eq!(broke(magic), "wrong option magic");
    let long = with(5000, 3, 0, |c| {
        let mut raw = proto::OPTION_MAGIC.to_be_bytes().to_vec();
        raw.extend([0, 0, 0, 7, 0, 1, 0, 1]);
        c.s.write_all(&raw).unwrap();
    });
    assert_eq!(broke(long), "option data too long");
    let many = with(5000, 3, 0, |c| {
        for _ in 0..MAX_OPTIONS {
            c.option(99, b"");
            c.reply(99);
        }
    });
    assert_eq!(broke(many), "too many options");
    // Says nothing, or one byte; or asks for ever and never reads.
    let silent = |c: &mut Client| {
        let _ = c.s.read(&mut [0; 1]);
    };
    assert_eq!(with(50, 3, 0, silent).unwrap_err(), End::Late);
    let slow = move |c: &mut Client| {
        c.s.write_all(b"I").unwrap();
        silent(c);
    };
    assert_eq!(with(50, 3, 0, slow).unwrap_err(), End::Late);
    assert_eq!(with(5000, 3, 0, |_| ()).unwrap_err(), End::Left);
}

#[test]
fn a_shutdown_ends_it_at_once() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let (clock, wake) = (Clock::real(), Wake::new().unwrap());
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let (s, w) = (stop.clone(), wake.clone());
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        s.store(true, Ordering::Release);
        w.wake();
    });
    let deadline = clock.now() + 60_000_000_000;
    let line = Line { fd: ours.as_fd(), wake: &wake, stop: &stop, clock: &clock, deadline };
    let end = greeted(&line, || Ok(()));
    assert_eq!(end.unwrap_err(), End::Stopped);
    thread.join().unwrap();
}
