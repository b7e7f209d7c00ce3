//! Counts a thread's system calls by trapping them: syscall user dispatch (Linux 5.11, x86-64).
//!
//! While it is on, each system call of the thread raises SIGSYS instead; the handler counts it,
//! carries it out from a stub that the kernel was told to let through, and returns through another
//! part of the same stub. So a call costs some microseconds, and no call costs nothing.
//!
//! Two kinds of calls cannot be carried out from within a handler. The return from another signal's
//! handler works on the stack that it is made on: the handler of SIGSYS returns to the stub, which
//! makes it there. What starts a thread or a process would have the child begin in the middle of
//! the handler, on another stack: from there on the thread is not trapped, and nothing is counted.

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::global_asm;
    use std::cell::Cell;

    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    const OFF: u64 = 0;
    const ON: u64 = 1;
    /// Values of the selector: trap nothing, or everything outside the stub.
    const ALLOW: u8 = 0;
    const BLOCK: u8 = 1;
    /// Length of the instruction that makes a system call.
    const SYSCALL_LEN: i64 = 2;
    const SA_RESTORER: u64 = 0x0400_0000;

    // The stub: a system call with its number and arguments in the kernel's registers' order, and
    // the return from a signal handler. Contiguous, so that one range lets both through.
    global_asm!(
        ".pushsection .text.polldisk_stub,\"ax\",@progbits",
        ".globl polldisk_stub_begin",
        "polldisk_stub_begin:",
        ".globl polldisk_stub_call",
        "polldisk_stub_call:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "ret",
        ".globl polldisk_stub_return",
        "polldisk_stub_return:",
        "mov rax, 15",
        "syscall",
        "ud2",
        ".globl polldisk_stub_end",
        "polldisk_stub_end:",
        ".popsection",
    );

    unsafe extern "C" {
        static polldisk_stub_begin: u8;
        static polldisk_stub_end: u8;
        fn polldisk_stub_call(n: i64, a: i64, b: i64, c: i64, d: i64, e: i64, f: i64) -> i64;
        fn polldisk_stub_return();
    }

    /// The kernel's own layout of a signal action; libc's wrapper would put its own restorer in.
    #[repr(C)]
    struct KernelAction {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }

    thread_local! {
        static COUNT: Cell<u64> = const { Cell::new(0) };
        /// Read by the kernel at each system call of the thread.
        static SELECTOR: Cell<u8> = const { Cell::new(BLOCK) };
        /// A call was made that ends the counting.
        static LOST: Cell<bool> = const { Cell::new(false) };
    }

    extern "C" fn on_sigsys(_sig: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        COUNT.with(|n| n.set(n.get() + 1));
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel passes the interrupted thread's context, which is ours alone here.
        let regs = unsafe { &mut (*context).uc_mcontext.gregs };
        let call = regs[libc::REG_RAX as usize];
        match call {
            libc::SYS_rt_sigreturn => {
                let stub = polldisk_stub_return as unsafe extern "C" fn() as usize;
                regs[libc::REG_RIP as usize] = stub as i64;
                return;
            }
            libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => {
                LOST.with(|l| l.set(true));
                SELECTOR.with(|s| s.set(ALLOW));
                regs[libc::REG_RIP as usize] -= SYSCALL_LEN;
                return;
            }
            _ => {}
        }
        let r = |i: i32| regs[i as usize];
        // SAFETY: carries out exactly the call that the interrupted code asked for, which is not
        // one that depends on the stack that it is made on.
        let result = unsafe {
            polldisk_stub_call(
                call,
                r(libc::REG_RDI),
                r(libc::REG_RSI),
                r(libc::REG_RDX),
                r(libc::REG_R10),
                r(libc::REG_R8),
                r(libc::REG_R9),
            )
        };
        regs[libc::REG_RAX as usize] = result;
    }

    /// Starts counting on the calling thread; returns whether the kernel can.
    pub(crate) fn start() -> bool {
        let action = KernelAction {
            handler: on_sigsys as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)
                as usize,
            flags: libc::SA_SIGINFO as u64 | libc::SA_NODEFER as u64 | SA_RESTORER,
            restorer: polldisk_stub_return as unsafe extern "C" fn() as usize,
            mask: 0,
        };
        // SAFETY: the structure has the kernel's layout, and handler and restorer live for ever.
        let set = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, libc::SIGSYS, &raw const action, 0usize, 8usize)
        };
        if set != 0 {
            return false;
        }
        LOST.with(|l| l.set(false));
        let begin = &raw const polldisk_stub_begin as usize;
        let len = &raw const polldisk_stub_end as usize - begin;
        SELECTOR.with(|s| {
            s.set(BLOCK);
            // SAFETY: the stub's range and the selector's address stay valid while the thread lives.
            let on =
                unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, ON, begin, len, s.as_ptr()) };
            on == 0
        })
    }

    /// Stops counting.
    pub(crate) fn stop() {
        // SAFETY: takes no pointer. It is trapped once itself, which `count` is read before.
        unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, OFF, 0usize, 0usize, 0usize) };
    }

    /// System calls of the calling thread that were trapped; `None` if since [`start`] there was one
    /// after which no more could be.
    pub(crate) fn count() -> Option<u64> {
        (!LOST.with(Cell::get)).then(|| COUNT.with(Cell::get))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    /// Not on this processor.
    pub(crate) fn start() -> bool {
        false
    }

    pub(crate) fn stop() {}

    pub(crate) fn count() -> Option<u64> {
        None
    }
}

pub(crate) use imp::{count, start, stop};

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn counts_calls_and_lets_them_through() {
        std::thread::spawn(|| {
            if !super::start() {
                println!("skipped: the kernel has no syscall user dispatch");
                return;
            }
            let before = super::count().unwrap();
            let pids: Vec<u32> = (0..5).map(|_| std::process::id()).collect();
            let mid = super::count().unwrap();
            std::thread::sleep(std::time::Duration::from_micros(1));
            let after = super::count().unwrap();
            super::stop();
            let stopped = super::count();
            let _ = std::process::id();
            assert_eq!(super::count(), stopped);
            // SAFETY: has no arguments.
            assert!(pids.iter().all(|&p| i64::from(p) == unsafe { libc::syscall(39) }));
            assert_eq!(mid - before, 5);
            assert!(after > mid);
        })
        .join()
        .unwrap();
    }

    static SIGNALS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn on_signal(_: i32) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn other_signals_are_handled_meanwhile() {
        // SAFETY: the handler only adds to an atomic.
        unsafe { libc::signal(libc::SIGUSR2, on_signal as extern "C" fn(i32) as usize) };
        std::thread::spawn(|| {
            if !super::start() {
                println!("skipped: the kernel has no syscall user dispatch");
                return;
            }
            let before = super::count().unwrap();
            for i in 1..=3 {
                // SAFETY: takes a number.
                assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
                assert_eq!(SIGNALS.load(Ordering::Relaxed), i);
            }
            let after = super::count().unwrap();
            super::stop();
            // At least the sending and the return from the handler.
            assert!(after - before >= 6, "{}", after - before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn starting_a_thread_or_a_process_works_and_ends_the_counting() {
        std::thread::spawn(|| {
            for process in [false, true] {
                if !super::start() {
                    println!("skipped: the kernel has no syscall user dispatch");
                    return;
                }
                assert!(super::count().is_some());
                if process {
                    assert!(std::process::Command::new("true").status().unwrap().success());
                } else {
                    assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
                }
                assert_eq!(super::count(), None);
                super::stop();
            }
        })
        .join()
        .unwrap();
    }
}
