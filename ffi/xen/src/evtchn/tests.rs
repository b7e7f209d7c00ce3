//! Events against the stand-in: ports that fall silent, the notifier, the listener.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::Wake;

use super::{Events, Listener, Notifier};
use crate::Error;
use crate::fake::Host;

const SOON: Duration = Duration::from_secs(10);

fn readable(fd: &impl AsFd, ms: u16) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(ms)).unwrap() == 1
}

fn pending(events: &Events) -> Vec<u32> {
    let mut ports = [0; 8];
    let n = events.pending(&mut ports).unwrap();
    ports[..n].to_vec()
}

#[test]
fn a_port_fires_once_until_it_is_written_back() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let events = host.events();
    assert!(!readable(&*events, 0) && pending(&events).is_empty());
    let (a, b) = (guest.alloc_port(), guest.alloc_port());
    let (at, bt) = (events.bind(3, a).unwrap(), events.bind(3, b).unwrap());
    assert_eq!(pending(&events), [at, bt], "each once when it is bound");
    assert!(!readable(&*events, 0));
    guest.notify(a);
    assert!(!readable(&*events, 0), "it is silent, and does not forget");
    events.unmask(&[at, bt]).unwrap();
    assert!(readable(&*events, 0));
    assert_eq!(pending(&events), [at]);
    events.unmask(&[at]).unwrap();
    events.unmask(&[at]).unwrap();
    guest.notify(b);
    guest.notify(b);
    guest.notify(a);
    guest.notify(b);
    assert_eq!(pending(&events), [bt, at]);
    events.unmask(&[at, bt]).unwrap();
    assert_eq!(pending(&events), [bt], "two that came while it was silent are one");
    events.unmask(&[bt]).unwrap();
    assert!(pending(&events).is_empty());
}

#[test]
fn ports_are_bound_by_one_and_given_up() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let port = guest.alloc_port();
    let (ours, others) = (host.events(), host.events());
    let refused = |e: &Events, domid, port| match e.bind(domid, port) {
        Err(Error::Bind { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&ours, 4, port), Errno::ESRCH);
    assert_eq!(refused(&ours, 3, port + 1), Errno::EINVAL);
    let local = ours.bind(3, port).unwrap();
    assert_eq!(refused(&others, 3, port), Errno::EINVAL);
    let text = others.bind(3, port).unwrap_err().to_string();
    assert_eq!(text, "cannot bind to event channel 1 of domain 3: EINVAL: Invalid argument");
    ours.notify(local).unwrap();
    assert!(guest.take_event(port, Duration::ZERO) && !guest.take_event(port, Duration::ZERO));
    let not_ours = Err(Error::Os { what: "send an event", why: Errno::ENOTCONN });
    assert_eq!(others.notify(local), not_ours);
    assert!(others.unbind(local).is_err());
    others.unmask(&[local, 77]).unwrap();
    ours.unbind(local).unwrap();
    assert_eq!(ours.notify(local), not_ours);
    assert_eq!(pending(&ours), [local], "what fired before is still read");
    // As after a restart.
    let again = others.bind(3, port).unwrap();
    drop(others);
    assert!(host.bound().is_empty());
    let local = ours.bind(3, port).unwrap();
    assert_eq!(again, local);
    host.destroy(3);
    ours.notify(local).unwrap();
    ours.unbind(local).unwrap();
}

#[test]
fn after_an_overflow_all_can_fire_again() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let events = host.events();
    let ports: Vec<u32> = (0..20).map(|_| guest.alloc_port()).collect();
    for &port in &ports {
        events.bind(3, port).unwrap();
    }
    host.overflow();
    assert!(readable(&*events, 0));
    assert_eq!(events.pending(&mut [0; 64]), Err(Error::Overflow));
    assert!(pending(&events).is_empty() && !readable(&*events, 0));
    for &port in &ports {
        guest.notify(port);
    }
    let mut all = [0; 64];
    assert_eq!(events.pending(&mut all), Ok(20));
}

#[test]
fn the_notifier_sends_for_reactors() {
    for spin in [Some(Duration::ZERO), Some(Duration::from_micros(200)), None] {
        let host = Host::new();
        let guest = host.guest(3, 1);
        let events = host.events();
        let notifier = Notifier::start(spin, None).unwrap();
        let ports: Vec<u32> = (0..3).map(|_| guest.alloc_port()).collect();
        std::thread::scope(|s| {
            for &port in &ports {
                let bell = notifier.bell(&events, events.bind(3, port).unwrap()).unwrap();
                let guest = guest.clone();
                s.spawn(move || {
                    for _ in 0..100 {
                        bell.ring();
                        assert!(guest.take_event(port, SOON), "an event is lost");
                    }
                });
            }
        });
        assert!(notifier.sent() >= 300);
        assert_eq!(host.calls().notifies, notifier.sent());
    }
}

#[test]
fn many_rings_are_few_events_and_none_is_lost() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let events = host.events();
    let port = guest.alloc_port();
    let local = events.bind(3, port).unwrap();
    let notifier = Notifier::start(Some(Duration::ZERO), None).unwrap();
    let bell = notifier.bell(&events, local).unwrap();
    for _ in 0..10_000 {
        bell.ring();
    }
    drop(bell);
    // The last ring was before the end, so its event is sent.
    assert!(notifier.sent() <= 10_000 && guest.take_event(port, Duration::ZERO));
    for _ in 0..500 {
        let bell = notifier.bell(&events, local).unwrap();
        bell.ring();
        drop(bell);
        assert!(guest.take_event(port, Duration::ZERO), "the last ring is not heard");
    }
}

#[test]
fn bells_are_used_again() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let events = host.events();
    let local = events.bind(3, guest.alloc_port()).unwrap();
    let notifier = Notifier::start(Some(Duration::ZERO), None).unwrap();
    let bells: Vec<_> = std::iter::from_fn(|| notifier.bell(&events, local)).collect();
    assert_eq!(bells.len(), 8192);
    drop(bells);
    assert!(notifier.bell(&events, local).is_some());
    events.unbind(local).unwrap();
    notifier.bell(&events, local).unwrap().ring();
}

#[test]
fn the_listener_wakes_who_sleeps_and_a_storm_does_not_keep_it_busy() {
    let host = Host::new();
    let guest = host.guest(3, 1);
    let events = host.events();
    let port = guest.alloc_port();
    events.bind(3, port).unwrap();
    let wake = Wake::new().unwrap();
    let listener = Listener::start(events.clone(), wake.clone()).unwrap();
    // The event of the binding: wait until it is taken.
    for _ in 0..5 {
        wake.about_to_sleep();
        listener.rearm();
        // Nothing to do: sleeps until the guest sends an event.
        let sender = std::thread::spawn({
            let guest = guest.clone();
            move || {
                std::thread::sleep(Duration::from_millis(5));
                guest.notify(port);
            }
        });
        assert!(readable(&wake.fd(), 10_000), "it sleeps through");
        wake.awake();
        sender.join().unwrap();
    }
    // While the reactor is awake events cost a call or two, however many they are.
    std::thread::sleep(Duration::from_millis(20));
    let before = host.calls().event_calls;
    for _ in 0..1000 {
        guest.notify(port);
    }
    std::thread::sleep(Duration::from_millis(20));
    let calls = host.calls().event_calls - before;
    assert!(calls <= 4, "{calls}");
}
