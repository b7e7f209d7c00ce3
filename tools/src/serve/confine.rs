//! What the daemon gives up before it serves guests: capabilities that it does not need, ever more
//! privileges, and system calls that it never makes. So that who takes it over by what a guest sends
//! cannot start programs, load modules, trace processes or talk to a network.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use caps::{CapSet, Capability};
use node::Reactors;
use reactor::Policy;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// What the system calls of a daemon depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mode {
    /// Reactors that never sleep wait in no call.
    pub(crate) policy: Policy,
    /// There are guests of Xen. Which of them have their pages copied, and so cost a call, is said by
    /// them and not by us.
    pub(crate) xen: bool,
    /// Devices are driven without an IOMMU.
    pub(crate) noiommu: bool,
    /// Disks may be mirrored to other hosts.
    pub(crate) network: bool,
}

/// Threads that have the same list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Threads {
    /// The reactors, which touch what guests and devices write. A thread that one of them begins has
    /// its list too.
    Reactors,
    /// All others, which open, map, listen and wait.
    Others,
}

/// Keeps the capabilities that serving needs. To be called before any thread is started: threads
/// inherit them. Nothing happens for a user who has none.
pub(crate) fn drop_capabilities(noiommu: bool) -> anyhow::Result<()> {
    // Memory for devices is locked; images may belong to anybody.
    let mut keep = vec![Capability::CAP_IPC_LOCK, Capability::CAP_DAC_OVERRIDE];
    if noiommu {
        // VFIO without an IOMMU, and where memory lies.
        keep.extend([Capability::CAP_SYS_RAWIO, Capability::CAP_SYS_ADMIN]);
    }
    let have = caps::read(None, CapSet::Permitted).context("cannot read capabilities")?;
    let keep = keep.into_iter().filter(|c| have.contains(c)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &keep).context("cannot give up capabilities")?;
    }
    caps::clear(None, CapSet::Inheritable).context("cannot give up capabilities")
}

/// From now on no thread of the process can make another system call than those of its list; others
/// fail with EPERM. Nor does anything that is started get more privileges.
pub(crate) fn limit_system_calls(mode: Mode, reactors: &Reactors) -> anyhow::Result<()> {
    let program = filter(mode, Threads::Others)?;
    seccompiler::apply_filter_all_threads(&program).context("system calls cannot be limited")?;
    for reactor in reactors.iter() {
        let program = filter(mode, Threads::Reactors)?;
        match reactor.mailbox().ask(move |_| seccompiler::apply_filter(&program)) {
            Some(done) => done.context("system calls of a reactor cannot be limited")?,
            None => bail!("a reactor has ended"),
        }
    }
    Ok(())
}

/// Lets the calls of these threads through.
fn filter(mode: Mode, threads: Threads) -> anyhow::Result<BpfProgram> {
    let calls = CALLS.iter().filter(|(who, _)| who.has(mode, threads)).flat_map(|(_, list)| *list);
    let mut rules: BTreeMap<i64, Vec<_>> = calls.map(|&call| (call, Vec::new())).collect();
    let word = |n, op, value| SeccompCondition::new(n, SeccompCmpArgLen::Dword, op, value);
    // Signals go to threads of this process only.
    let own = word(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![own])?]);
    if threads == Threads::Others {
        // Figures may be had on this host's loopback, by a socket that was made before.
        let network = [libc::AF_INET, libc::AF_INET6];
        let families =
            [libc::AF_UNIX].into_iter().chain(network.into_iter().filter(|_| mode.network));
        let of = |family| SeccompRule::new(vec![word(0, SeccompCmpOp::Eq, family as u64)?]);
        rules.insert(libc::SYS_socket, families.map(of).collect::<Result<_, _>>()?);
    }
    if threads == Threads::Reactors {
        let of = |&(_, mask, value): &(Who, u64, u64)| {
            SeccompRule::new(vec![word(1, SeccompCmpOp::MaskedEq(mask), value)?])
        };
        let allowed = IOCTLS.iter().filter(|(who, ..)| who.has(mode, threads));
        rules.insert(libc::SYS_ioctl, allowed.map(of).collect::<Result<_, _>>()?);
        let name = word(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
        rules.insert(libc::SYS_prctl, vec![SeccompRule::new(vec![name])?]);
    }
    let arch = std::env::consts::ARCH.try_into().context("no filter for this processor")?;
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()?)
}

/// Who needs calls.
#[derive(Clone, Copy)]
enum Who {
    /// All threads.
    All,
    /// All but reactors.
    Others,
    /// As `Others`, and reactors that sleep.
    Sleepers,
    /// As `Others`, and reactors that serve guests of Xen.
    Xen,
    /// As `Others`, and reactors that give memory to devices without an IOMMU.
    Noiommu,
}

impl Who {
    fn has(self, mode: Mode, threads: Threads) -> bool {
        threads == Threads::Others
            || match self {
                Who::All => true,
                Who::Others => false,
                Who::Sleepers => mode.policy == Policy::Adaptive,
                Who::Xen => mode.xen,
                Who::Noiommu => mode.noiommu,
            }
    }
}

/// Those of `ioctl` that reactors may make: mask and value of the number.
const IOCTLS: &[(Who, u64, u64)] = &[
    // Memory of devices: all of VFIO and iommufd.
    (Who::All, 0xff00, (b';' as u64) << 8),
    // IOCTL_GNTDEV_GRANT_COPY, IOCTL_EVTCHN_NOTIFY.
    (Who::Xen, 0xffff, (b'G' as u64) << 8 | 8),
    (Who::Xen, 0xffff, (b'E' as u64) << 8 | 4),
];

/// The only table of calls: who may make which.
const CALLS: &[(Who, &[i64])] = &[
    // Requests to files; telling other threads, and guests whose events may come again; the log.
    (
        Who::All,
        &[
            libc::SYS_io_uring_enter,
            libc::SYS_io_submit,
            libc::SYS_io_getevents,
            libc::SYS_write,
            libc::SYS_writev,
        ],
    ),
    // Sleeping, and what woke a sleeper; requests of NBD clients on the reactor's own thread.
    #[cfg(target_arch = "x86_64")]
    (Who::Sleepers, &[libc::SYS_poll]),
    (Who::Sleepers, &[libc::SYS_read, libc::SYS_recvmsg]),
    // Images come and go: their files' descriptors, lengths and locks, memory that the kernel keeps in
    // place, and connections to devices in other processes, whose sockets may be full.
    (
        Who::All,
        &[
            libc::SYS_close,
            libc::SYS_fcntl,
            libc::SYS_fstat,
            libc::SYS_statx,
            libc::SYS_fsync,
            libc::SYS_fdatasync,
            libc::SYS_fallocate,
            libc::SYS_ftruncate,
            libc::SYS_io_uring_register,
            libc::SYS_io_destroy,
            libc::SYS_sendmsg,
            libc::SYS_shutdown,
            libc::SYS_ppoll,
        ],
    ),
    // Memory.
    (
        Who::All,
        &[
            libc::SYS_brk,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_mremap,
            libc::SYS_mprotect,
            libc::SYS_madvise,
            libc::SYS_mlock,
            libc::SYS_mlock2,
            libc::SYS_munlock,
            libc::SYS_memfd_create,
            libc::SYS_geteuid,
            libc::SYS_prlimit64,
            libc::SYS_getrandom,
        ],
    ),
    // Threads: waiting for each other, and new ones, for compressed clusters.
    (
        Who::All,
        &[
            libc::SYS_futex,
            libc::SYS_sched_yield,
            libc::SYS_nanosleep,
            libc::SYS_clock_nanosleep,
            libc::SYS_clock_gettime,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_sched_getaffinity,
            libc::SYS_gettid,
            libc::SYS_getpid,
            libc::SYS_sigaltstack,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_restart_syscall,
            libc::SYS_exit,
            libc::SYS_exit_group,
        ],
    ),
    // Where memory lies, and keeping it there.
    (Who::Noiommu, &[libc::SYS_io_uring_setup, libc::SYS_pread64]),
    // Files, and devices: VFIO, gntdev, evtchn, block devices.
    (
        Who::Others,
        &[
            libc::SYS_readv,
            libc::SYS_pwrite64,
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_openat,
            libc::SYS_lseek,
            libc::SYS_newfstatat,
            libc::SYS_fstatfs,
            libc::SYS_readlinkat,
            libc::SYS_faccessat,
            libc::SYS_faccessat2,
            libc::SYS_getdents64,
            libc::SYS_getcwd,
            libc::SYS_flock,
            libc::SYS_ioctl,
            libc::SYS_dup,
            libc::SYS_dup3,
            libc::SYS_sync_file_range,
            libc::SYS_fadvise64,
            libc::SYS_mkdirat,
            libc::SYS_unlinkat,
            libc::SYS_renameat,
            libc::SYS_renameat2,
            libc::SYS_fchmod,
            libc::SYS_fchmodat,
            libc::SYS_umask,
        ],
    ),
    // The same by their older names.
    #[cfg(target_arch = "x86_64")]
    (
        Who::Others,
        &[
            libc::SYS_open,
            libc::SYS_stat,
            libc::SYS_lstat,
            libc::SYS_readlink,
            libc::SYS_access,
            libc::SYS_mkdir,
            libc::SYS_unlink,
            libc::SYS_rename,
            libc::SYS_chmod,
        ],
    ),
    // Threads, time, signals.
    (
        Who::Others,
        &[
            libc::SYS_io_setup,
            libc::SYS_set_tid_address,
            libc::SYS_sched_setaffinity,
            libc::SYS_prctl,
            libc::SYS_clock_getres,
            libc::SYS_eventfd2,
            libc::SYS_epoll_create1,
            libc::SYS_epoll_ctl,
            libc::SYS_timerfd_create,
            libc::SYS_timerfd_settime,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigtimedwait,
        ],
    ),
    // Sockets of this host: control, xenstore, vfio-user; what makes them is limited above.
    (
        Who::Others,
        &[
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_accept4,
            libc::SYS_getsockname,
            libc::SYS_getpeername,
            libc::SYS_getsockopt,
            libc::SYS_setsockopt,
            libc::SYS_sendto,
            libc::SYS_recvfrom,
        ],
    ),
    // The machine, and what follows this: reactors give up more.
    (
        Who::Others,
        &[
            libc::SYS_uname,
            libc::SYS_sysinfo,
            libc::SYS_getuid,
            libc::SYS_getgid,
            libc::SYS_getegid,
            libc::SYS_seccomp,
        ],
    ),
];

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use nix::poll::{PollTimeout, poll};

    use super::*;

    const POLL: Mode = Mode { policy: Policy::Poll, xen: true, noiommu: false, network: false };

    /// Runs `f` on a thread with that list.
    fn limited<T: Send>(mode: Mode, threads: Threads, f: impl FnOnce() -> T + Send) -> T {
        let program = filter(mode, threads).unwrap();
        let body = || {
            seccompiler::apply_filter(&program).unwrap();
            f()
        };
        std::thread::scope(|s| s.spawn(body).join().unwrap())
    }

    fn sleeps() -> bool {
        match poll(&mut [], PollTimeout::ZERO) {
            Ok(_) => true,
            Err(nix::errno::Errno::EPERM) => false,
            Err(e) => panic!("{e}"),
        }
    }

    fn opens() -> bool {
        match std::fs::File::open("/dev/null") {
            Ok(_) => true,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::PermissionDenied);
                false
            }
        }
    }

    #[test]
    fn a_reactor_opens_no_file_and_sleeps_only_if_it_may() {
        let adaptive = Mode { policy: Policy::Adaptive, ..POLL };
        assert_eq!(limited(POLL, Threads::Others, || (sleeps(), opens())), (true, true));
        assert_eq!(limited(adaptive, Threads::Reactors, || (sleeps(), opens())), (true, false));
        assert_eq!(limited(POLL, Threads::Reactors, || (sleeps(), opens())), (false, false));
        // Nor does a thread that it begins.
        let begun = || std::thread::spawn(|| (sleeps(), opens())).join().unwrap();
        assert_eq!(limited(POLL, Threads::Reactors, begun), (false, false));
    }

    /// Of a socket that is nowhere in the file system.
    fn name() -> std::os::unix::net::SocketAddr {
        use std::os::linux::net::SocketAddrExt as _;
        let name = format!("polldisk-confine-{}", std::process::id());
        std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap()
    }

    #[test]
    fn no_thread_starts_programs_or_signals_others() {
        assert!(nix::sys::signal::kill(nix::unistd::getppid(), None).is_ok());
        for threads in [Threads::Reactors, Threads::Others] {
            let (run, kill, socket, network) = limited(POLL, threads, || {
                let run = std::process::Command::new("/bin/true").status().err().map(|e| e.kind());
                let kill = nix::sys::signal::kill(nix::unistd::getppid(), None);
                let network = std::net::TcpListener::bind("127.0.0.1:0").err().map(|e| e.kind());
                let socket = std::os::unix::net::UnixListener::bind_addr(&name()).is_ok();
                (run, kill, socket, network)
            });
            assert_eq!(run, Some(ErrorKind::PermissionDenied), "{threads:?}");
            assert_eq!(kill, Err(nix::errno::Errno::EPERM), "{threads:?}");
            assert_eq!(network, Some(ErrorKind::PermissionDenied), "{threads:?}");
            assert_eq!(socket, threads == Threads::Others);
        }
    }

    /// But for mirrors, if they are wanted; and reactors never.
    #[test]
    fn a_network_is_there_only_if_it_is_asked_for() {
        let network = Mode { network: true, ..POLL };
        let binds = || std::net::TcpListener::bind("127.0.0.1:0").is_ok();
        assert!(!limited(POLL, Threads::Others, binds));
        assert!(limited(network, Threads::Others, binds));
        assert!(!limited(network, Threads::Reactors, binds));
        let other = || {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), None).err()
        };
        assert_eq!(limited(network, Threads::Others, other), Some(nix::errno::Errno::EPERM));
    }

    /// What a reactor may ask of devices is asked by number: see the cases with guests whose pages are
    /// copied in the lab. All else is refused.
    #[test]
    fn other_ioctls_are_refused_to_a_reactor() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let asked = |threads| {
            limited(POLL, threads, || {
                assert!(!std::io::IsTerminal::is_terminal(&null));
                Error::last_os_error().raw_os_error()
            })
        };
        assert_eq!(asked(Threads::Others), Some(libc::ENOTTY));
        assert_eq!(asked(Threads::Reactors), Some(libc::EPERM));
    }
}
