//! The client against the stand-in, and against servers that do not keep the rules.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Connection, Kind};
use super::fake::Daemon;
use super::watches::KEPT;
use super::wire::{encode, kind};
use super::{Error, Event, Nodes, Perm, Store, places};

const SOON: Option<Duration> = Some(Duration::from_secs(10));
const NOW: Option<Duration> = Some(Duration::ZERO);

fn event(token: u64, path: &str) -> Option<Event> {
    Some(Event { token, path: path.into() })
}

fn readable(store: &Store, ms: u16) -> bool {
    let mut fds = [PollFd::new(store.event_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(ms)).unwrap() == 1
}

#[test]
fn nodes() {
    let daemon = Daemon::start();
    let store = daemon.connect(0);
    assert_eq!(store.read("/a/b"), Ok(None));
    store.write("/a/b", b"\xff\0text").unwrap();
    assert_eq!(store.read("/a/b"), Ok(Some(b"\xff\0text".to_vec())));
    assert_eq!(store.read("/a"), Ok(Some(vec![])), "made on the way");
    store.mkdir("/a/c").unwrap();
    store.mkdir("/a/b").unwrap();
    assert_eq!(store.read("/a/b"), Ok(Some(b"\xff\0text".to_vec())), "it was there");
    assert_eq!(store.directory("/a"), Ok(Some(vec![b"b".to_vec(), b"c".to_vec()])));
    assert_eq!(store.directory("/a/c"), Ok(Some(vec![])));
    assert_eq!(store.directory("/none"), Ok(None));
    store.rm("/a/x").unwrap();
    store.rm("/none/x").unwrap();
    store.rm("/a").unwrap();
    assert_eq!(store.read("/a/b"), Ok(None));
    assert_eq!(store.directory("/"), Ok(Some(vec![])));
    assert_eq!(store.rm("/").unwrap_err().refusal(), Some(Errno::EINVAL));
    let longest = vec![b'v'; 4096 - 3];
    store.write("/l", &longest).unwrap();
    assert_eq!(store.read("/l"), Ok(Some(longest)));
    let e = store.write("/l", vec![0; 4096 - 2]).unwrap_err();
    assert_eq!(e.refusal(), Some(Errno::E2BIG));
    for path in ["", "a//b", "/a/", "/a b"] {
        assert!(matches!(store.read(path), Err(Error::Request { .. })), "{path}");
    }
}

#[test]
fn permissions() {
    let daemon = Daemon::start();
    let (zero, guest, other) = (daemon.connect(0), daemon.connect(5), daemon.connect(6));
    zero.write("/local/domain/5/device", "").unwrap();
    for path in ["/local", "/local/domain"] {
        zero.set_perms(path, &[Perm::read(0)]).unwrap();
    }
    let home = [Perm::none(5), Perm::read(0)];
    zero.set_perms("/local/domain/5", &home).unwrap();
    zero.set_perms("/local/domain/5/device", &home).unwrap();
    assert_eq!(zero.perms("/local/domain/5"), Ok(Some(home.to_vec())));
    assert_eq!(zero.perms("/local/domain/7"), Ok(None));
    // By a path relative to the guest's home.
    guest.write("device/state", "1").unwrap();
    assert_eq!(zero.read("/local/domain/5/device/state"), Ok(Some(b"1".to_vec())));
    assert_eq!(zero.perms("/local/domain/5/device/state"), Ok(Some(home.to_vec())));
    for path in ["/local/domain/5/device/state", "/local/domain/5/device/none"] {
        assert_eq!(other.read(path).unwrap_err().refusal(), Some(Errno::EACCES));
        assert_eq!(other.write(path, "2").unwrap_err().refusal(), Some(Errno::EACCES));
    }
    assert_eq!(guest.write("/local/x", "").unwrap_err().refusal(), Some(Errno::EACCES));
    let e = guest.set_perms("device", &[Perm::none(6)]).unwrap_err();
    assert_eq!(e.refusal(), Some(Errno::EPERM));
    guest.set_perms("device/state", &[Perm::none(5), Perm::read(6)]).unwrap();
    assert_eq!(other.read("/local/domain/5/device/state"), Ok(Some(b"1".to_vec())));
    // Domain 0 is not bound by that.
    zero.write("/local/domain/5/device/state", "3").unwrap();
    // Quotas of guests.
    let full = (0..1001).map(|i| guest.write(format!("device/n/{i}"), "")).find_map(Result::err);
    assert_eq!(full.unwrap().refusal(), Some(Errno::ENOSPC));
    let e = guest.write("device/state", [b'x'; 2049]).unwrap_err();
    assert_eq!(e.refusal(), Some(Errno::ENOSPC));
}

#[test]
fn lists_that_need_several_answers() {
    let daemon = Daemon::start();
    let store = daemon.connect(0);
    let names: Vec<Vec<u8>> =
        (0..700).map(|i| format!("a-name-of-some-length-{i:04}").into_bytes()).collect();
    for name in &names {
        store.write([b"/d/", &name[..]].concat(), "").unwrap();
    }
    assert_eq!(store.directory("/d"), Ok(Some(names.clone())));
    let inside = store.transaction(|t| t.directory("/d"));
    assert_eq!(inside, Ok(Some(names)));
    // While it changes: a list as it was at some time, without holes.
    let writer = daemon.connect(0);
    let stop = AtomicU32::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            for i in 0.. {
                writer.write(format!("/d/zz{}", i % 3), "").unwrap();
                writer.rm(format!("/d/zz{}", i % 3)).unwrap();
                std::thread::sleep(Duration::from_millis(2));
                if stop.load(Ordering::Relaxed) == 1 {
                    break;
                }
            }
        });
        for _ in 0..20 {
            let list = store.directory("/d").unwrap().unwrap();
            assert_eq!(list.iter().filter(|n| n.starts_with(b"a-")).count(), 700);
        }
        stop.store(1, Ordering::Relaxed);
    });
}

#[test]
fn transactions_are_all_or_nothing_and_are_done_again() {
    let daemon = Daemon::start();
    let (a, b) = (daemon.connect(0), daemon.connect(0));
    a.write("/n", "1").unwrap();
    let mut tries = 0;
    let sum = a.transaction(|t| -> Result<u32, Error> {
        tries += 1;
        let n: u32 = String::from_utf8(t.read("/n")?.unwrap()).unwrap().parse().unwrap();
        if tries < 3 {
            b.write("/n", (n + 10).to_string())?;
        }
        t.write("/n", (n + 1).to_string())?;
        t.write("/new/x", "")?;
        assert_eq!(b.read("/new"), Ok(None), "not yet to be seen");
        assert_eq!(t.directory("/new")?.unwrap().len(), 1);
        Ok(n + 1)
    });
    assert_eq!((sum, tries), (Ok(22), 3));
    assert_eq!(b.read("/n"), Ok(Some(b"22".to_vec())));
    // One that fails leaves nothing.
    let e = a.transaction(|t| -> Result<(), Error> {
        t.rm("/n")?;
        t.rm("/").map(drop)
    });
    assert_eq!(e.unwrap_err().refusal(), Some(Errno::EINVAL));
    assert_eq!(b.read("/n"), Ok(Some(b"22".to_vec())));
    // Nodes made below the same one do meet: the parent changes.
    let mut first = true;
    a.transaction(|t| -> Result<(), Error> {
        t.write("/p/a", "")?;
        if std::mem::take(&mut first) {
            b.write("/p/b", "")?;
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(a.directory("/p").unwrap().unwrap().len(), 2);
}

#[test]
fn a_transaction_that_always_meets_others_ends() {
    let daemon = Daemon::start();
    let (a, b) = (daemon.connect(0), daemon.connect(0));
    let mut tries = 0;
    let e = a.transaction(|t| -> Result<(), Error> {
        tries += 1;
        t.read("/n")?;
        b.write("/n", tries.to_string())
    });
    assert_eq!((e, tries), (Err(Error::Conflict(24)), 24));
}

#[test]
fn a_refusal_that_came_of_a_mixture_is_looked_at_again() {
    let daemon = Daemon::start();
    let (a, b) = (daemon.connect(0), daemon.connect(0));
    a.write("/x", "1").unwrap();
    a.write("/y", "1").unwrap();
    let mut tries = 0;
    let pair = a.transaction(|t| {
        tries += 1;
        let x = t.read("/x")?;
        if tries == 1 {
            b.write("/x", "2")?;
            b.write("/y", "2")?;
        }
        let y = t.read("/y")?;
        if x == y { Ok(x) } else { Err(Error::Conflict(0)) }
    });
    assert_eq!((pair, tries), (Ok(Some(b"2".to_vec())), 2));
}

#[test]
fn watches() {
    let daemon = Daemon::start();
    let (a, b) = (daemon.connect(0), daemon.connect(0));
    assert!(!readable(&a, 0));
    a.watch("/d", 7).unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(7, "/d")), "one at once");
    assert_eq!((a.next_event(NOW), readable(&a, 0)), (Ok(None), false));
    assert!(matches!(a.watch("/e", 7), Err(Error::Request { .. })));
    b.write("/d/x/y", "").unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(7, "/d/x/y")));
    b.write("/dd", "").unwrap();
    b.transaction(|t| -> Result<(), Error> {
        t.write("/d/p", "")?;
        t.write("/d/q", "")?;
        assert_eq!(a.next_event(NOW), Ok(None));
        Ok(())
    })
    .unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(7, "/d/p")), "and nothing of /dd");
    assert!(readable(&a, 10_000));
    assert_eq!(a.next_event(SOON), Ok(event(7, "/d/q")));
    // What lies above is removed.
    a.watch("/d/x/y", 8).unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(8, "/d/x/y")));
    b.rm("/d/x").unwrap();
    let mut both = [a.next_event(SOON).unwrap().unwrap(), a.next_event(SOON).unwrap().unwrap()];
    both.sort_by_key(|e| e.token);
    assert_eq!(both.map(|e| (e.token, e.path)), [(7, b"/d/x".to_vec()), (8, b"/d/x/y".to_vec())]);
    b.set_perms("/d", &[Perm::none(3)]).unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(7, "/d")));
    a.unwatch(7).unwrap();
    a.unwatch(7).unwrap();
    b.write("/d/z", "").unwrap();
    a.watch("@releaseDomain", 9).unwrap();
    assert_eq!(a.next_event(SOON), Ok(event(9, "@releaseDomain")));
    daemon.domain(false);
    assert_eq!(a.next_event(SOON), Ok(event(9, "@releaseDomain")));
    assert_eq!(a.watch("/a b", 10).map_err(|e| e.refusal()), Err(None));
    a.watch("/new", 10).unwrap();
}

#[test]
fn a_guest_sees_only_what_it_may() {
    let daemon = Daemon::start();
    let (zero, guest) = (daemon.connect(0), daemon.connect(4));
    zero.write("/local/domain/4/a", "").unwrap();
    zero.set_perms("/local/domain/4/a", &[Perm::none(0), Perm::read(4)]).unwrap();
    zero.write("/local/domain/4/b", "").unwrap();
    guest.watch("/local", 1).unwrap();
    assert_eq!(guest.next_event(SOON), Ok(event(1, "/local")));
    guest.watch("a", 2).unwrap();
    assert_eq!(guest.next_event(SOON), Ok(event(2, "a")), "as it was written");
    zero.write("/local/domain/4/b", "secret").unwrap();
    zero.write("/local/domain/4/a", "1").unwrap();
    assert_eq!(guest.next_event(SOON), Ok(event(1, "/local/domain/4/a")));
    assert_eq!(guest.next_event(SOON), Ok(event(2, "a")));
    guest.watch("@releaseDomain", 3).unwrap();
    guest.next_event(SOON).unwrap();
    daemon.domain(false);
    assert_eq!(guest.read("a"), Ok(Some(b"1".to_vec())));
    assert_eq!(guest.next_event(NOW), Ok(None));
}

#[test]
fn a_storm_of_a_guest_takes_no_memory_and_holds_nobody_up() {
    let daemon = Daemon::start();
    let (zero, guest) = (daemon.connect(0), daemon.connect(0));
    zero.watch("/storm", 1).unwrap();
    zero.watch("/calm", 2).unwrap();
    for _ in 0..2 {
        zero.next_event(SOON).unwrap();
    }
    for i in 0..2000 {
        guest.write(format!("/storm/{i}"), "").unwrap();
    }
    guest.write("/calm", "x").unwrap();
    // A round trip: all events before its answer are here.
    zero.read("/calm").unwrap();
    let events: Vec<Event> = std::iter::from_fn(|| zero.next_event(NOW).unwrap()).collect();
    assert!(events.len() <= KEPT + 1, "{}", events.len());
    assert!(events[..2].iter().any(|e| e.token == 2));
    assert!(events.iter().any(|e| e.path == b"/storm"), "something was lost, and it says so");
}

#[test]
fn many_threads_and_pieces() {
    let daemon = Daemon::start();
    for seed in 1..=3 {
        daemon.chop(seed);
        let (store, counter) = (daemon.connect(0), daemon.connect(0));
        store.watch("/t", 0).unwrap();
        store.write("/t/sum", "0").unwrap();
        std::thread::scope(|s| {
            for t in 0..3u64 {
                let (store, counter) = (&store, &counter);
                s.spawn(move || {
                    for i in 0..12u64 {
                        let path = format!("/t/{t}/{i}");
                        let value = vec![t as u8; (i * 37 % 300) as usize];
                        store.write(&path, &value).unwrap();
                        assert_eq!(store.read(&path), Ok(Some(value)));
                        assert_eq!(store.read(format!("{path}x")), Ok(None));
                    }
                    for _ in 0..3 {
                        let add = counter.transaction(|t| {
                            let sum = String::from_utf8(t.read("/t/sum")?.unwrap()).unwrap();
                            let sum: u32 = sum.parse().unwrap();
                            t.write("/t/sum", (sum + 1).to_string())
                        });
                        assert_eq!(add, Ok(()));
                    }
                });
            }
        });
        assert_eq!(store.read("/t/sum"), Ok(Some(b"9".to_vec())));
        assert_eq!(store.directory("/t").unwrap().unwrap().len(), 4);
        while store.next_event(NOW).unwrap().is_some() {}
        store.rm("/t").unwrap();
    }
}

#[test]
fn death_of_the_daemon_is_told_to_all() {
    let daemon = Daemon::start();
    let store = daemon.connect(0);
    store.write("/a", "").unwrap();
    std::thread::scope(|s| {
        let waiter = s.spawn(|| store.next_event(None));
        daemon.freeze(true);
        let asker = s.spawn(|| store.read("/a"));
        std::thread::sleep(Duration::from_millis(20));
        drop(daemon);
        assert!(matches!(waiter.join().unwrap(), Err(Error::Closed(_))));
        assert!(matches!(asker.join().unwrap(), Err(Error::Closed(_))));
    });
    assert!(readable(&store, 0));
    assert!(matches!(store.write("/a", "x"), Err(Error::Closed(_))));
    assert!(matches!(store.transaction(|t| t.read("/a")), Err(Error::Closed(_))));
}

#[test]
fn a_daemon_that_hangs_is_not_waited_for() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let store = Store::on(ours, Duration::from_millis(50)).unwrap();
    let e = store.read("/a").unwrap_err();
    assert_eq!(e.to_string(), "the connection to xenstore is over: no answer within 0.05 s");
    assert_eq!(store.next_event(NOW).unwrap_err(), e);
    drop(theirs);
}

/// Sends an answer, whatever was asked, and says what a read makes of it.
fn answered(answer: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let store = Store::on(ours, Duration::from_secs(5)).unwrap();
    std::thread::scope(|s| {
        s.spawn(move || {
            let mut request = [0; 16 + 3];
            theirs.read_exact(&mut request).unwrap();
            theirs.write_all(answer).unwrap();
            // Gone; what is torn stays so.
        });
        store.read("/a")
    })
}

#[test]
fn answers_are_not_trusted() {
    let message = |kind, req_id, payload: &[u8]| encode(kind, req_id, 0, payload);
    assert_eq!(answered(&message(kind::READ, 1, b"v")), Ok(Some(b"v".to_vec())));
    assert_eq!(answered(&message(kind::ERROR, 1, b"ENOENT\0")), Ok(None));
    let refused = answered(&message(kind::ERROR, 1, b"EACCES\0")).unwrap_err();
    assert_eq!(refused.to_string(), "xenstore: read /a: EACCES: Permission denied");
    let mut long = message(kind::READ, 1, b"");
    long[12..].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
    for (what, bytes) in [
        ("another request's", message(kind::READ, 2, b"v")),
        ("another kind", message(kind::WRITE, 1, b"OK\0")),
        ("no number, which only the kernel's device may", message(kind::READ, 0, b"v")),
        ("an event that is none", message(kind::WATCH_EVENT, 0, b"/a")),
        ("too long", long),
        ("torn in the header", message(kind::READ, 1, b"v")[..9].to_vec()),
        ("torn behind it", message(kind::READ, 1, b"value")[..18].to_vec()),
        ("nothing", vec![]),
    ] {
        assert!(matches!(answered(&bytes), Err(Error::Closed(_))), "{what}");
    }
    // An event for a watch that there is not is nothing; the answer may be behind it.
    let mut two = encode(kind::WATCH_EVENT, 77, 5, b"/x\x009\0");
    two.extend(message(kind::READ, 1, b"v"));
    assert_eq!(answered(&two), Ok(Some(b"v".to_vec())));
}

#[test]
fn garbage_never_hangs_or_kills() {
    let mut seed = 7u64;
    let mut random = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % n
    };
    for _ in 0..300 {
        let mut bytes = encode(kind::READ, 1, 0, b"some value");
        for _ in 0..=random(3) {
            let at = random(bytes.len() as u64) as usize;
            bytes[at] = random(256) as u8;
        }
        match answered(&bytes) {
            Ok(_) | Err(Error::Closed(_) | Error::Refused { .. }) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn lists_that_make_no_sense_are_refused() {
    for answer in [&b"a"[..], b"a\0\0b\0", b"a/b\0", b"\xff\0", b"..\0"] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let store = Store::on(ours, Duration::from_secs(5)).unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut request = [0; 16 + 3];
                theirs.read_exact(&mut request).unwrap();
                theirs.write_all(&encode(kind::DIRECTORY, 1, 0, answer)).unwrap();
            });
            let e = store.directory("/a").unwrap_err();
            assert_eq!(e.refusal(), Some(Errno::EIO), "{answer:?}");
        });
    }
}

#[test]
fn where_it_is_looked_for() {
    let with = |name: &'static str, value: &'static str| {
        places(move |n| (n == name).then(|| value.into()))
    };
    let paths = |p: Vec<std::path::PathBuf>| -> Vec<String> {
        p.iter().map(|p| p.display().to_string()).collect()
    };
    assert_eq!(paths(with("XENSTORED_PATH", "/x")), ["/x"]);
    assert_eq!(
        paths(with("XENSTORED_RUNDIR", "/run/x")),
        ["/run/x/socket", "/dev/xen/xenbus", "/proc/xen/xenbus"]
    );
    assert_eq!(paths(with("", ""))[0], "/var/run/xenstored/socket");
    let e = Store::connect_to("/nonexistent".as_ref()).unwrap_err();
    assert_eq!(
        e.to_string(),
        "cannot connect to xenstore at /nonexistent: ENOENT: No such file or directory"
    );
}

#[test]
fn over_a_socket_of_the_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("socket");
    let daemon = Daemon::listen(&place).unwrap();
    let (a, b) = (Store::connect_to(&place).unwrap(), Store::connect_to(&place).unwrap());
    a.write("/a", "1").unwrap();
    assert_eq!(b.read("/a"), Ok(Some(b"1".to_vec())));
    drop(daemon);
    assert!(matches!(b.read("/a"), Err(Error::Closed(_))));
}

#[test]
fn the_kernel_answers_watches_without_their_number() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(ours));
    let connection = Connection::new(file, Kind::Device, Duration::from_secs(5)).unwrap();
    let store = Store { connection };
    let longest = 4096 - 16;
    assert_eq!(store.write("/a", vec![0; longest - 2]).unwrap_err().refusal(), Some(Errno::E2BIG));
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut request = [0; 16 + 5];
            theirs.read_exact(&mut request).unwrap();
            // An old kernel's event: no numbers in it, and first.
            let mut bytes = encode(kind::WATCH_EVENT, 0xdead, 0xbeef, b"/a\x001\0");
            bytes.extend(encode(kind::WATCH, 0, 0, b"OK\0"));
            theirs.write_all(&bytes).unwrap();
            theirs.read_exact(&mut request[..16 + 3]).unwrap();
            theirs.write_all(&encode(kind::READ, 0, 0, b"v")).unwrap();
        });
        store.watch("/a", 1).unwrap();
        assert_eq!(store.next_event(NOW), Ok(event(1, "/a")));
        assert!(matches!(store.read("/a"), Err(Error::Closed(_))));
    });
}
