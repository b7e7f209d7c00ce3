//! Counts a thread's system calls by trapping them: syscall user dispatch (Linux 5.11, x86-64).
//!
//! While it is on, each system call of the thread raises SIGSYS instead; the handler counts it,
//! carries it out from a stub that the kernel was told to let through, and returns through another
//! part of the same stub. So a call costs some microseconds, and no call costs nothing.

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::global_asm;
    use std::cell::Cell;

    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    const OFF: u64 = 0;
    const ON: u64 = 1;
    /// Value of the selector: trap everything outside the stub.
    const BLOCK: u8 = 1;
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
        static SELECTOR: Cell<u8> = const { Cell::new(BLOCK) };
    }

    extern "C" fn on_sigsys(_sig: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        COUNT.with(|n| n.set(n.get() + 1));
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel passes the interrupted thread's context, which is ours alone here.
        let regs = unsafe { &mut (*context).uc_mcontext.gregs };
        let r = |i: i32| regs[i as usize];
        // SAFETY: carries out exactly the call that the interrupted code asked for.
        let result = unsafe {
            polldisk_stub_call(
                r(libc::REG_RAX),
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
        let begin = &raw const polldisk_stub_begin as usize;
        let len = &raw const polldisk_stub_end as usize - begin;
        SELECTOR.with(|s| {
            // SAFETY: the stub's range and the selector's address stay valid while the thread lives.
            let on =
                unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, ON, begin, len, s.as_ptr()) };
            set == 0 && on == 0
        })
    }

    /// Stops counting.
    pub(crate) fn stop() {
        // SAFETY: takes no pointer. It is trapped once itself, which `count` is read before.
        unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, OFF, 0usize, 0usize, 0usize) };
    }

    /// System calls of the calling thread that were trapped.
    pub(crate) fn count() -> u64 {
        COUNT.with(Cell::get)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    /// Not on this processor.
    pub(crate) fn start() -> bool {
        false
    }

    pub(crate) fn stop() {}

    pub(crate) fn count() -> u64 {
        0
    }
}

pub(crate) use imp::{count, start, stop};

#[cfg(test)]
mod tests {
    #[test]
    fn counts_calls_and_lets_them_through() {
        std::thread::spawn(|| {
            if !super::start() {
                println!("skipped: the kernel has no syscall user dispatch");
                return;
            }
            let before = super::count();
            let pids: Vec<u32> = (0..5).map(|_| std::process::id()).collect();
            let mid = super::count();
            std::thread::sleep(std::time::Duration::from_micros(1));
            let after = super::count();
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
}
