//! [`Watches`]: what is watched, and the events that nobody has taken yet. Pure.
//!
//! A guest can write under its directory as fast as it likes, so events are kept per watch, each
//! path once and only a few of them. If there are more they become one event for all that the watch
//! covers: nothing is lost but how much happened. A watch with many events does not hold up others.

use std::collections::{HashMap, VecDeque};

use super::wire::decimal;

/// Something changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// The watch.
    pub token: u64,
    /// What changed, or what lies above it. The path of the watch itself means: anything there.
    pub path: Vec<u8>,
}

/// Paths that are kept for one watch.
pub(crate) const KEPT: usize = 16;

#[derive(Debug)]
struct Watch {
    path: Vec<u8>,
    /// So many levels below the path are told apart.
    levels: Option<usize>,
    pending: VecDeque<Vec<u8>>,
}

/// All watches of a connection.
#[derive(Default, Debug)]
pub(crate) struct Watches {
    by_token: HashMap<u64, Watch>,
    /// The tokens with pending events, each once.
    ready: VecDeque<u64>,
}

impl Watches {
    /// A new watch; false if there is one of this token.
    pub(crate) fn add(&mut self, token: u64, path: &[u8], levels: Option<usize>) -> bool {
        let free = !self.by_token.contains_key(&token);
        if free {
            let watch = Watch { path: path.to_vec(), levels, pending: VecDeque::new() };
            self.by_token.insert(token, watch);
        }
        free
    }

    /// Forgets a watch and its events. What was watched.
    pub(crate) fn remove(&mut self, token: u64) -> Option<Vec<u8>> {
        self.ready.retain(|&t| t != token);
        self.by_token.remove(&token).map(|w| w.path)
    }

    /// What is watched by a token.
    pub(crate) fn path(&self, token: u64) -> Option<&[u8]> {
        self.by_token.get(&token).map(|w| &w.path[..])
    }

    /// An event came, as the text of its message: path and token, each with a zero byte, and perhaps
    /// more behind. False if it is none. One of a watch that is gone counts as one, and is left.
    pub(crate) fn event(&mut self, payload: &[u8]) -> bool {
        let mut parts = payload.split(|&b| b == 0);
        let (Some(path), Some(token), Some(_)) = (parts.next(), parts.next(), parts.next()) else {
            return false;
        };
        let Some(token) = decimal(token) else { return false };
        let Some(watch) = self.by_token.get_mut(&token) else { return true };
        let path = watch.levels.map_or(path, |levels| above(path, watch.path.len(), levels));
        if watch.pending.is_empty() {
            self.ready.push_back(token);
        } else if watch.pending.iter().any(|p| p == path) {
            return true;
        }
        if watch.pending.len() == KEPT {
            watch.pending.clear();
            watch.pending.push_back(watch.path.clone());
        } else {
            watch.pending.push_back(path.to_vec());
        }
        true
    }

    /// Takes the next event, from each watch in turn.
    pub(crate) fn take(&mut self) -> Option<Event> {
        let token = self.ready.pop_front()?;
        let pending = &mut self.by_token.get_mut(&token)?.pending;
        let path = pending.pop_front()?;
        if !pending.is_empty() {
            self.ready.push_back(token);
        }
        Some(Event { token, path })
    }

    /// Whether nothing is to be taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }
}

/// The path up to so many levels behind its first `base` bytes.
fn above(path: &[u8], base: usize, levels: usize) -> &[u8] {
    let behind = path.get(base..).unwrap_or_default();
    let slashes = behind.iter().enumerate().filter(|(_, b)| **b == b'/');
    slashes.map(|(at, _)| base + at).nth(levels).map_or(path, |end| &path[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fire(w: &mut Watches, path: &str, token: u64) {
        assert!(w.event(format!("{path}\0{token}\0").as_bytes()));
    }

    fn all(w: &mut Watches) -> Vec<(u64, String)> {
        std::iter::from_fn(|| w.take())
            .map(|e| (e.token, String::from_utf8(e.path).unwrap()))
            .collect()
    }

    #[test]
    fn events_of_a_path_are_one_and_watches_take_turns() {
        let mut w = Watches::default();
        assert!(w.add(1, b"/a", None) && w.add(2, b"/b", None) && !w.add(1, b"/c", None));
        for path in ["/a/x", "/a/x", "/a/y", "/a/x", "/a/z"] {
            fire(&mut w, path, 1);
        }
        fire(&mut w, "/b/s", 2);
        let event = |t, p: &str| (t, p.to_owned());
        let expected = [event(1, "/a/x"), event(2, "/b/s"), event(1, "/a/y"), event(1, "/a/z")];
        assert_eq!(all(&mut w), expected);
        assert!(w.is_empty());
        fire(&mut w, "/a/x", 1);
        assert_eq!(all(&mut w), [event(1, "/a/x")], "taken, so it may come again");
    }

    #[test]
    fn a_flood_becomes_one_event_for_all_and_takes_no_memory() {
        let mut w = Watches::default();
        w.add(1, b"/a", None);
        w.add(2, b"/b", None);
        fire(&mut w, "/b/s", 2);
        for i in 0..10_000 {
            fire(&mut w, &format!("/a/{i}"), 1);
            assert!(w.by_token[&1].pending.len() <= KEPT && w.ready.len() == 2);
        }
        let events = all(&mut w);
        assert_eq!(events[0], (2, "/b/s".to_owned()));
        assert_eq!(events[1], (1, "/a".to_owned()), "before those that came later");
        assert_eq!(events.last().unwrap().1, "/a/9999");
    }

    #[test]
    fn events_of_watches_that_are_gone_are_left() {
        let mut w = Watches::default();
        w.add(1, b"/a", None);
        fire(&mut w, "/a", 1);
        assert_eq!(w.remove(1), Some(b"/a".to_vec()));
        assert_eq!((w.remove(1), w.is_empty()), (None, true));
        fire(&mut w, "/a", 1);
        assert_eq!(w.take(), None);
    }

    #[test]
    fn forms() {
        let mut w = Watches::default();
        w.add(1, b"/a", None);
        for garbage in [&b""[..], b"/a", b"/a\0", b"/a\x001", b"/a\0x\0", b"\0\0\0"] {
            assert!(!w.event(garbage), "{garbage:?}");
        }
        assert!(w.event(b"/a\x001\0more\0"), "old kernels put data behind");
        assert_eq!(w.take().map(|e| e.path), Some(b"/a".to_vec()));
    }

    #[test]
    fn what_is_deep_below_is_one_place() {
        let mut w = Watches::default();
        w.add(1, b"/a/b", Some(2));
        for i in 0..100 {
            assert!(w.event(format!("/a/b/7/9/key{i}/x\x001\0").as_bytes()));
        }
        assert!(w.event(b"/a/b/7\x001\0"));
        assert_eq!(w.take().unwrap().path, b"/a/b/7/9");
        assert_eq!(w.take().unwrap().path, b"/a/b/7");
        assert!(w.is_empty());
    }
}
