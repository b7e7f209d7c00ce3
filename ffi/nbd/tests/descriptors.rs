//! A process that is out of descriptors: in a test program of its own, since the limit is the
//! process's.

mod common;

use std::time::Duration;

use common::*;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};

#[test]
fn accepting_pauses_while_there_are_no_descriptors() {
    let h = Harness::new(Setup::default());
    let mut first = h.connect().go(true, false);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // The client's own socket comes from the same process: made before the limit falls.
    let sockets: Vec<_> = (0..3)
        .map(|_| {
            nix::sys::socket::socket(
                nix::sys::socket::AddressFamily::Unix,
                nix::sys::socket::SockType::Stream,
                nix::sys::socket::SockFlag::empty(),
                None,
            )
            .unwrap()
        })
        .collect();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    let address = nix::sys::socket::UnixAddr::new(&h.path).unwrap();
    for s in &sockets {
        nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(s), &address).unwrap();
    }
    let cpu = || {
        let used = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        used.user_time().tv_sec() * 1_000_000
            + used.user_time().tv_usec()
            + used.system_time().tv_sec() * 1_000_000
            + used.system_time().tv_usec()
    };
    let before = cpu();
    std::thread::sleep(Duration::from_millis(700));
    let used = cpu() - before;
    assert!(used < 200_000, "{used} us of processor time: a busy loop");
    assert_eq!(first.write(0, &[1; 512]), 0, "who is in is served");
    assert_eq!(h.server().connections().len(), 1);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    eventually("the waiting are let in", || h.server().connections().len() == 4);
}
