//! Random calls while the daemon is killed again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

use super::{Host, SR, device};

/// A caller among others, and what it knows of its disks.
struct Caller<'a> {
    host: &'a Host,
    name: String,
    rng: sim::Rng,
    /// By key, the values that a key of its own may have: more than one where a call has failed.
    mine: BTreeMap<String, Vec<String>>,
    /// Destroyed.
    gone: BTreeSet<String>,
    failed: u64,
}

impl Caller<'_> {
    /// How many disks it has at least and at most, so that the repository is never full.
    const DISKS: std::ops::Range<usize> = 4..16;

    fn new(host: &Host, number: u64) -> Caller<'_> {
        let (name, rng) = (format!("of {number}"), sim::Rng::new(number));
        Caller { host, name, rng, mine: BTreeMap::new(), gone: BTreeSet::new(), failed: 0 }
    }

    fn call(&mut self, method: &str, args: Value) -> Option<Value> {
        let (done, answer) = self.host.call(method, args);
        self.failed += u64::from(!done);
        done.then_some(answer)
    }

    /// One call, or a few to the same end; returns how many of them succeeded.
    fn step(&mut self, n: u64) -> u64 {
        let at = self.rng.below(self.mine.len().max(1) as u64) as usize;
        let key = self.mine.keys().nth(at).cloned().unwrap_or_default();
        let of = |key: &str| json!({"sr": SR, "key": key});
        let done = match self.rng.below(8) {
            _ if self.mine.len() < Self::DISKS.start => self.create(),
            0 if self.mine.len() < Self::DISKS.end => self.create(),
            0 | 1 => {
                self.mine.remove(&key);
                self.destroy(&key)
            }
            2 => match self.call("Volume.snapshot", of(&key)) {
                Some(answer) => {
                    assert_eq!(answer["read_write"], false);
                    true
                }
                None => false,
            },
            3 => return self.tidy(),
            _ => {
                let value = n.to_string();
                let args = json!({"sr": SR, "key": key, "k": "v", "v": value});
                let done = self.call("Volume.set", args).is_some();
                let values = self.mine.get_mut(&key).unwrap();
                if done {
                    values.clear();
                }
                values.push(value);
                done
            }
        };
        u64::from(done)
    }

    fn create(&mut self) -> bool {
        let new =
            json!({"sr": SR, "name": self.name, "description": "", "size": 1, "sharable": false});
        let Some(answer) = self.call("Volume.create", new) else { return false };
        self.mine.insert(answer["key"].as_str().unwrap().to_owned(), vec![String::new()]);
        true
    }

    /// Compares what there is with what it knows, and destroys what it has lost sight of: snapshots, and
    /// disks of calls that failed.
    fn tidy(&mut self) -> u64 {
        let Some(all) = self.call("SR.ls", json!({"sr": SR})) else { return 0 };
        self.compare(&all);
        let mut done = 1;
        for disk in all.as_array().unwrap() {
            let key = disk["key"].as_str().unwrap();
            if disk["name"] == *self.name && !self.mine.contains_key(key) {
                done += u64::from(self.destroy(key));
            }
        }
        done
    }

    /// Where it fails it may have been done all the same.
    fn destroy(&mut self, key: &str) -> bool {
        let done = self.call("Volume.destroy", json!({"sr": SR, "key": key})).is_some();
        self.gone.extend(done.then(|| key.to_owned()));
        done
    }

    fn compare(&self, all: &Value) {
        for (key, values) in &self.mine {
            let disk = find(all, key);
            let disk = disk.unwrap_or_else(|| panic!("{key} is lost"));
            let value = disk["keys"]["v"].as_str().unwrap_or_default();
            assert!(values.iter().any(|v| v == value), "{key}: {value} is none of {values:?}");
        }
        for key in &self.gone {
            assert!(find(all, key).is_none(), "{key} is back");
        }
    }
}

fn find<'a>(all: &'a Value, key: &str) -> Option<&'a Value> {
    all.as_array().unwrap().iter().find(|disk| disk["key"] == *key)
}

/// Calls of all kinds from several processes at once, while the daemon is killed again and again. As many as
/// `SMAPI_CALLS` says.
#[test]
fn random_calls_with_kills_in_between_lose_nothing() {
    const CALLERS: u64 = 8;
    const KILL_EACH: u64 = 8;
    let calls = std::env::var("SMAPI_CALLS").map_or(80, |n| n.parse().unwrap());
    let Some(host) = Host::new() else { return };
    let config = device(&host.dir.path().join("disk"));
    let new = json!({"uuid": SR, "configuration": config, "name": "", "description": ""});
    host.ok("SR.create", new);
    let (over, succeeded) = (AtomicBool::new(false), AtomicU64::new(0));
    let caller = |number: u64| {
        let mut caller = Caller::new(&host, number);
        for n in 0..calls / CALLERS {
            let _attached = host.call("SR.attach", json!({"configuration": config}));
            succeeded.fetch_add(caller.step(n), Relaxed);
        }
        caller
    };
    let (callers, kills) = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|n| {
                let caller = &caller;
                scope.spawn(move || caller(n))
            })
            .collect();
        // By what was done and not by time: so all come to their end on a slow machine, too.
        let killer = scope.spawn(|| {
            let (mut kills, mut next) = (0, KILL_EACH);
            while !over.load(Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(5));
                if succeeded.load(Relaxed) >= next {
                    host.kill_daemon();
                    kills += 1;
                    next = succeeded.load(Relaxed) + KILL_EACH;
                }
            }
            kills
        });
        let callers: Vec<_> = callers.into_iter().map(|c| c.join().unwrap()).collect();
        over.store(true, Relaxed);
        (callers, killer.join().unwrap())
    });
    host.ok("SR.attach", json!({"configuration": config}));
    let all = host.ok("SR.ls", json!({"sr": SR}));
    callers.iter().for_each(|caller| caller.compare(&all));
    let disks: usize = callers.iter().map(|caller| caller.mine.len()).sum();
    let failures: u64 = callers.iter().map(|caller| caller.failed).sum();
    println!("{calls} calls, {failures} failed, {kills} kills, {disks} disks known");
    assert!(disks >= 8 && kills > 2);
    // One that is under way, and one that meets the next daemon while it is killed in turn.
    assert!(failures <= 2 * CALLERS * (kills + 1), "more failed than the kills account for");
    // Nothing is left that cannot be destroyed.
    for disk in all.as_array().unwrap() {
        host.ok("Volume.destroy", json!({"sr": SR, "key": disk["key"]}));
    }
    let stat = host.ok("SR.stat", json!({"sr": SR}));
    assert_eq!(stat["free_space"], stat["total_space"]);
}
