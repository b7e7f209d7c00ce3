//! The wake-up protocol on a model of memory: every order that the language allows is tried.

use loom::sync::atomic::{AtomicU64 as Work, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// What the protocol is made of.
mod atomics {
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
}

#[path = "../src/wake/flag.rs"]
mod flag;

use flag::Flag;

/// A stand-in for the eventfd.
struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rings.lock().unwrap() += 1;
        self.rung.notify_one();
    }

    fn read(&self) -> u64 {
        std::mem::take(&mut *self.rings.lock().unwrap())
    }

    /// Sleeps until it is readable. For ever, the model finds.
    fn sleep(&self) {
        let mut rings = self.rings.lock().unwrap();
        while *rings == 0 {
            rings = self.rung.wait(rings).unwrap();
        }
    }
}

/// `wakers` threads do one piece of work each; the sleeper sleeps until all is done.
fn run(wakers: u64, preemptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let bell = Bell { rings: Mutex::new(0), rung: Condvar::new() };
        let all = Arc::new((Flag::new(), bell, Work::new(0)));
        let threads: Vec<_> = (0..wakers)
            .map(|_| {
                let all = all.clone();
                thread::spawn(move || {
                    let (flag, bell, work) = &*all;
                    work.fetch_add(1, Relaxed);
                    if flag.must_ring() {
                        bell.ring();
                    }
                })
            })
            .collect();
        let (flag, bell, work) = &*all;
        while work.load(Relaxed) < wakers {
            flag.about_to_sleep();
            if work.load(Relaxed) < wakers {
                bell.sleep();
            }
            flag.awake(|| bell.read());
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        // Late rings are read with the next sleep; then there is nothing to wake anybody.
        flag.about_to_sleep();
        flag.awake(|| bell.read());
        assert_eq!(bell.read(), 0, "a ring that nobody reads would end every sleep at once");
    });
}

#[test]
fn one_waker() {
    run(1, 5);
}

#[test]
fn two_wakers() {
    run(2, 3);
}
