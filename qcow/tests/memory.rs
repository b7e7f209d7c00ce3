//! The map and the epochs on a model of memory: every order that the language allows is tried.
//!
//! The files under test are included over the model's atomics. What decides is proven too: each of
//! the `…_matters` tests does one line of them less strictly and demands that the model finds out.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

/// What the files are made of: the model's atomics, with one line of the source done weakly.
mod atomics {
    pub(crate) use std::sync::atomic::Ordering;

    use super::{LAST, Weakening, weakening};

    #[derive(Debug)]
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

    #[track_caller]
    fn order(order: Ordering) -> Ordering {
        if weakening() == Some(Weakening::Relaxed) { Ordering::Relaxed } else { order }
    }

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }

        #[track_caller]
        pub(crate) fn load(&self, o: Ordering) -> u64 {
            let key = (loom::thread::current().id(), std::ptr::from_ref(self).addr());
            if weakening() == Some(Weakening::Lost) {
                return LAST.with_borrow(|last| last[&key]);
            }
            let value = self.0.load(order(o));
            LAST.with_borrow_mut(|last| last.insert(key, value));
            value
        }

        #[track_caller]
        pub(crate) fn store(&self, value: u64, o: Ordering) {
            match weakening() {
                Some(Weakening::Lost) => {}
                Some(Weakening::NoGeneration) => self.0.store(u64::from(value as u32), o),
                _ => self.0.store(value, order(o)),
            }
        }

        #[track_caller]
        pub(crate) fn compare_exchange(
            &self,
            old: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            if weakening() == Some(Weakening::Torn) {
                let seen = self.0.load(Ordering::Acquire);
                return if seen == old { Ok(self.0.swap(new, success)) } else { Err(seen) };
            }
            self.0.compare_exchange(old, new, order(success), failure)
        }
    }

    #[track_caller]
    pub(crate) fn fence(o: Ordering) {
        if weakening() == Some(Weakening::Relaxed) {
            return loom::sync::atomic::fence(Ordering::AcqRel);
        }
        loom::sync::atomic::fence(o);
    }

    pub(crate) fn prefetch(_: &AtomicU64) {}

    pub(crate) fn zeroed(n: usize) -> Option<Box<[AtomicU64]>> {
        Some((0..n).map(|_| AtomicU64::new(0)).collect())
    }
}

#[path = "../src/run/epochs.rs"]
mod epochs;
#[expect(dead_code, unreachable_pub, reason = "a public module, not all of which is used here")]
#[path = "../src/map.rs"]
mod map;

use epochs::{Announced, Epoch, all_past};
use map::{Map, Pages, Word};

const SOURCES: [(&str, &str); 2] = [
    ("map.rs", include_str!("../src/map.rs")),
    ("epochs.rs", include_str!("../src/run/epochs.rs")),
];

/// How a line is done less strictly than it is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weakening {
    /// A load, store or exchange: relaxed. A sequentially consistent fence: acquire and release.
    Relaxed,
    /// An exchange: a load, and a store.
    Torn,
    /// A directory entry: without its generation.
    NoGeneration,
    /// A store: not at all. A load that is compared with an earlier one: gives the same again.
    Lost,
}

thread_local! {
    /// The weakened line: its file, and its number. The model's threads all run on this one.
    static WEAK: Cell<Option<(&'static str, u32, Weakening)>> = const { Cell::new(None) };
    /// What each of the model's threads has loaded last from each word.
    static LAST: RefCell<HashMap<(thread::ThreadId, usize), u64>> = RefCell::default();
}

/// What is done weakly at the caller's line.
#[track_caller]
fn weakening() -> Option<Weakening> {
    let here = std::panic::Location::caller();
    let (file, line, how) = WEAK.get()?;
    let same_file = here.file().rsplit('/').next() == Some(file);
    (same_file && here.line() == line).then_some(how)
}

/// Weakens the line that is `code` from now on, in the function that begins with `function`.
fn weaken(function: &str, code: &str, how: Weakening) {
    let mut found = Vec::new();
    for (file, text) in SOURCES {
        let Some(start) = text.find(function) else { continue };
        let first = text[..start].matches('\n').count() as u32 + 1;
        let body = text[start..].lines().zip(first..).take_while(|(l, _)| !l.starts_with("    }"));
        found.extend(body.filter(|(l, _)| l.trim() == code).map(|(_, n)| (file, n, how)));
    }
    assert_eq!(found.len(), 1, "{function}: {code}");
    WEAK.set(found.pop());
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Where the cluster lies at first, and then.
const OLD: u64 = 512;
const NEW: u64 = 1024;

fn at(host: u64) -> Word {
    Word::mapped(0, host, true)
}

// ---- the reuse rule ----

/// A guest cluster that a home reactor moves, and satellites read.
struct Moved {
    map: Map,
    epoch: Epoch,
    announced: Vec<Announced>,
    /// The host cluster at [`OLD`]: read by satellites' I/O, written by its next use. The model
    /// tells of any two uses that do not certainly follow each other.
    cluster: UnsafeCell<()>,
    reused: AtomicBool,
}

impl Moved {
    fn new(satellites: usize) -> Arc<Moved> {
        let map = Map::new(1, 0, 0, 1).unwrap();
        assert!(Pages::new(&map).load(&map, 0, &[at(OLD)]));
        Arc::new(Moved {
            map,
            epoch: Epoch::new(),
            announced: (0..satellites).map(|_| Announced::new()).collect(),
            cluster: UnsafeCell::new(()),
            reused: AtomicBool::new(false),
        })
    }

    /// The I/O of a request that was looked up to lie at `host`.
    fn io(&self, host: u64) {
        if host == OLD {
            assert!(!self.reused.load(atomics::Ordering::Relaxed), "I/O to a cluster used again");
            self.cluster.with(|_| ());
        }
    }

    /// A satellite wakes up, makes a request whose I/O outlives a turn, and with `more` another one
    /// in a later turn; then it sleeps.
    fn satellite(&self, n: usize, more: bool) {
        let announced = &self.announced[n];
        let stamp = announced.wake(&self.epoch);
        let host = self.map.lookup(0).host();
        // A turn begins with the request in flight: what it was stamped with is the oldest.
        announced.announce(self.epoch.get().min(stamp));
        self.io(host);
        if more {
            announced.announce(self.epoch.get());
            self.io(self.map.lookup(0).host());
        }
        announced.quiet();
    }

    /// The home reactor moves the cluster, and uses the old place again when it may.
    fn home(&self, tries: usize) {
        assert!(self.map.claim(0, at(OLD)));
        self.map.publish(0, at(NEW));
        let ended = self.epoch.advance();
        for _ in 0..tries {
            if all_past(self.announced.iter(), ended) {
                self.cluster.with_mut(|_| ());
                self.reused.store(true, atomics::Ordering::Relaxed);
                return;
            }
            thread::yield_now();
        }
    }
}

/// Satellites that sleep in between, one of them `more` than once, and a home reactor.
fn reuse(satellites: usize, rounds: usize, more: bool, preemptions: usize) {
    check(preemptions, move || {
        let all = Moved::new(satellites);
        let threads: Vec<_> = (0..satellites)
            .map(|n| {
                let all = all.clone();
                thread::spawn(move || (0..rounds).for_each(|_| all.satellite(n, more)))
            })
            .collect();
        all.home(2);
        threads.into_iter().for_each(|t| t.join().unwrap());
        // Nobody is left: it is used again at last.
        assert!(all_past(all.announced.iter(), 0));
    });
}

#[test]
fn a_cluster_in_use_is_not_reused_by_a_satellite_that_turns() {
    reuse(1, 1, true, 4);
}

#[test]
fn a_cluster_in_use_is_not_reused_by_a_satellite_that_sleeps() {
    reuse(1, 2, false, 4);
}

#[test]
fn a_cluster_in_use_is_not_reused_by_two_satellites() {
    reuse(2, 1, false, 2);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_fence_of_who_wakes_matters() {
    weaken("pub(super) fn wake(", "fence(Ordering::SeqCst);", Weakening::Relaxed);
    reuse(1, 2, false, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_fence_of_who_asks_matters() {
    weaken("pub(super) fn all_past", "fence(Ordering::SeqCst);", Weakening::Relaxed);
    reuse(1, 2, false, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_release_of_an_announcement_matters() {
    weaken(
        "pub(super) fn announce(",
        "self.0.store(oldest, Ordering::Release);",
        Weakening::Relaxed,
    );
    reuse(1, 1, false, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_acquire_of_an_announcement_matters() {
    let line = "all.all(|a| a.0.load(Ordering::Acquire) > epoch)";
    weaken("pub(super) fn all_past", line, Weakening::Relaxed);
    reuse(1, 1, false, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_release_of_an_epoch_matters() {
    weaken(
        "pub(super) fn advance",
        "self.0.store(now + 1, Ordering::Release);",
        Weakening::Relaxed,
    );
    reuse(1, 1, true, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_acquire_of_an_epoch_matters() {
    weaken("pub(super) fn get", "self.0.load(Ordering::Acquire)", Weakening::Relaxed);
    reuse(1, 1, true, 4);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_word_of_who_wakes_matters() {
    // Instead of 0, which stops all reuse until the epoch is known: nothing, as it were.
    weaken("pub(super) fn wake(", "self.0.store(0, Ordering::Relaxed);", Weakening::Lost);
    reuse(1, 1, false, 4);
}

// ---- pages ----

/// One place for the pages of two clusters.
fn two_pages() -> (Arc<Map>, Pages) {
    let map = Arc::new(Map::new(2, 0, 0, 1).unwrap());
    let mut pages = Pages::new(&map);
    assert!(pages.load(&map, 0, &[at(OLD)]));
    (map, pages)
}

/// The owner loads `sequence` of pages with words into the one place, while another reactor looks
/// both clusters up. `fine` says which host offsets a cluster may be found at.
fn eviction(sequence: &'static [(u64, u64)], fine: fn(u64, u64) -> bool, preemptions: usize) {
    check(preemptions, move || {
        let (map, mut pages) = two_pages();
        let reader = {
            let map = map.clone();
            thread::spawn(move || {
                for cluster in [0, 1] {
                    let word = map.lookup(cluster);
                    let right = word == Word::ABSENT || fine(cluster, word.host());
                    assert!(right, "a word of another page: {cluster} at {}", word.host());
                }
            })
        };
        for &(page, host) in sequence {
            assert!(pages.load(&map, page, &[at(host)]));
        }
        reader.join().unwrap();
    });
}

/// Host offsets of cluster 1 are 4096 and more.
fn own(cluster: u64, host: u64) -> bool {
    (cluster == 1) == (host >= 4096)
}

/// Page 1 comes into page 0's place, and page 0 comes back, moved.
const TO_AND_FRO: &[(u64, u64)] = &[(1, 4096), (0, NEW)];

#[test]
fn a_reader_gets_no_word_of_another_page() {
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_generation_matters() {
    let line = "entry.store(value, Ordering::Release);";
    weaken("pub fn load(", line, Weakening::NoGeneration);
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_second_look_at_the_directory_matters() {
    let line = "if entry.load(Ordering::Relaxed) != seen {";
    weaken("fn lookup_paged(", line, Weakening::Lost);
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_acquire_of_a_word_matters() {
    let line = "let value = word.load(Ordering::Acquire);";
    weaken("fn lookup_paged(", line, Weakening::Relaxed);
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_release_of_a_word_matters() {
    let line = "slot.store(word.0, Ordering::Release);";
    weaken("pub fn load(", line, Weakening::Relaxed);
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_acquire_of_a_directory_entry_matters() {
    weaken("fn lookup_paged(", "let seen = entry.load(Ordering::Acquire);", Weakening::Relaxed);
    eviction(TO_AND_FRO, own, 4);
}

#[test]
#[should_panic(expected = "a word of another page")]
fn the_release_of_a_directory_entry_matters() {
    weaken("pub fn load(", "entry.store(value, Ordering::Release);", Weakening::Relaxed);
    eviction(TO_AND_FRO, own, 4);
}

/// A mapping that has changed and whose page was evicted and came back is not found as it was by
/// whoever has seen the epoch after the change.
fn stale(preemptions: usize) {
    check(preemptions, || {
        let (map, mut pages) = two_pages();
        let epoch = Arc::new(Epoch::new());
        let reader = {
            let (map, epoch) = (map.clone(), epoch.clone());
            thread::spawn(move || {
                let stamp = epoch.get();
                let word = map.lookup(0);
                let right = word == Word::ABSENT
                    || (own(0, word.host()) && stamp == 0)
                    || word.host() == NEW;
                assert!(right, "a stale mapping");
            })
        };
        assert!(map.claim(0, at(OLD)));
        map.publish(0, at(NEW));
        epoch.advance();
        assert!(pages.load(&map, 1, &[at(4096)]) && pages.load(&map, 0, &[at(NEW)]));
        reader.join().unwrap();
    });
}

#[test]
fn a_reader_gets_no_stale_mapping() {
    stale(4);
}

#[test]
#[should_panic(expected = "a stale mapping")]
fn the_acquire_of_an_epoch_matters_for_mappings() {
    weaken("pub(super) fn get", "self.0.load(Ordering::Acquire)", Weakening::Relaxed);
    stale(4);
}

// ---- claims ----

/// Two reactors move the same cluster; each holds the claim alone, and sees what was done under the
/// one before it.
fn claims(preemptions: usize) {
    check(preemptions, || {
        let (map, _) = two_pages();
        let all = Arc::new((map, UnsafeCell::new(())));
        let change = |all: &(Arc<Map>, UnsafeCell<()>)| {
            let (map, table) = all;
            let seen = map.lookup(0);
            if !map.claim(0, seen) {
                return 0;
            }
            // The model tells of two that come here at once.
            table.with_mut(|_| ());
            let held = map.lookup(0);
            assert!(held.claimed() && held.host() == seen.host(), "two hold a claim");
            map.publish(0, at(seen.host() + OLD));
            OLD
        };
        let other = {
            let all = all.clone();
            thread::spawn(move || change(&all))
        };
        let moved = change(&all) + other.join().unwrap();
        let word = all.0.lookup(0);
        assert!(!word.claimed() && moved > 0);
        assert_eq!(word.host(), OLD + moved, "a move was lost");
    });
}

#[test]
fn a_claim_has_one_holder() {
    claims(4);
}

const EXCHANGE: &str =
    "word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()";

#[test]
#[should_panic(expected = "Causality violation")]
fn the_order_of_claims_matters() {
    weaken("pub fn replace(", EXCHANGE, Weakening::Relaxed);
    claims(4);
}

#[test]
#[should_panic(expected = "a move was lost")]
fn that_a_claim_is_one_exchange_matters() {
    weaken("pub fn replace(", EXCHANGE, Weakening::Torn);
    claims(4);
}
