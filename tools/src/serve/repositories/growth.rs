//! [`Growth`]: the thread that keeps the volumes of a repository larger than what the images in them use,
//! ahead of need. Images are not asked for it, and not stopped: see [`qcow::run::Space`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use node::Growing;
use reactor::Clock;
use reactor::sync::Mutex;

use super::Repositories;
use super::attached::Attached;
use super::place::{DiskPlace, Place};
use crate::volume::author;

/// Between two looks at the images.
const LOOK: Duration = Duration::from_millis(20);

/// The same where there are none. Whoever opens one gives it its first space.
const IDLE: Duration = Duration::from_millis(200);

/// A volume grows when so many bytes of it are left, or an eighth if that is between the two.
const AHEAD_LEAST: u64 = 256 << 20;
const AHEAD_MOST: u64 = 2 << 30;

/// Of the space that a repository has left so much goes to images that wait for it; a volume whose image does
/// grows by so many bytes, if they are there.
const STEP: u64 = 64 << 20;

/// When a repository had no space it is asked again after so many nanoseconds.
const AGAIN_NS: u64 = 1_000_000_000;

/// Between two messages that there is none for an image, in nanoseconds.
const SILENCE_NS: u64 = 60_000_000_000;

/// An open image of a disk that is written to.
pub(super) struct Watched {
    place: DiskPlace,
    growing: Growing,
    /// Bytes of the disk, by now.
    size: Arc<AtomicU64>,
    /// Its repository had no space for it.
    exhausted: AtomicBool,
    turn: Mutex<Turn>,
}

/// Of who looks after an image, one at a time.
struct Turn {
    /// Not kept, so that it can be detached.
    attached: Weak<Attached>,
    /// The image is being closed.
    over: bool,
    /// When it was not made larger, and when that was said last.
    failed: Option<u64>,
    said: Option<u64>,
}

/// By how many bytes a volume of `len` is to grow whose image uses `used` of them, for a disk that may need
/// `most`. `waits`: requests have found no space.
fn wanted(used: u64, len: u64, most: u64, waits: bool) -> Option<u64> {
    let ahead = (len / 8).clamp(AHEAD_LEAST, AHEAD_MOST);
    let left = len.saturating_sub(used);
    // So that it is not done again soon.
    let more = used.saturating_add(ahead + ahead / 2).min(most).saturating_sub(len);
    match (waits && left < STEP, left < ahead && more > 0) {
        // Whatever it needs it for: snapshots inside of it, say.
        (true, _) => Some(more.max(STEP)),
        (false, true) => Some(more),
        (false, false) => None,
    }
}

impl Watched {
    /// Sees to it that the image has space.
    fn provide(&self, repositories: &Repositories, now: u64) {
        let mut turn = self.turn.lock();
        let Some((volume, len)) = self.growing.volume().filter(|_| !turn.over) else { return };
        let space = self.growing.space();
        let most = sr::most_bytes(self.size.load(Ordering::Relaxed));
        let exhausted = self.exhausted.load(Ordering::Relaxed);
        let waiting = space.waiting() > 0;
        let waits = waiting || exhausted;
        let Some(more) = wanted(space.used(), len, most, waits) else {
            return self.has_space();
        };
        let hurry = waiting && !exhausted;
        if !hurry && turn.failed.is_some_and(|then| now < then.saturating_add(AGAIN_NS)) {
            return;
        }
        turn.failed = Some(now);
        match self.grow(repositories, &mut turn, volume, (more, waits)) {
            Ok(true) => {
                turn.failed = None;
                self.has_space();
            }
            Ok(false) => {}
            Err(e) => {
                if !exhausted && turn.said.is_none_or(|then| now >= then.saturating_add(SILENCE_NS))
                {
                    turn.said = Some(now);
                    log::warn!("{}: its volume cannot be made larger: {e:#}", self.place);
                }
                self.exhausted.store(true, Ordering::Relaxed);
                if waiting || !exhausted {
                    self.growing.may_grow(false);
                }
            }
        }
    }

    fn has_space(&self) {
        if self.exhausted.swap(false, Ordering::Relaxed) {
            log::info!("{}: there is space again", self.place);
            self.growing.may_grow(true);
        }
    }

    /// Makes the volume larger, and tells the image. Returns `false` if that is better done later.
    fn grow(
        &self,
        repositories: &Repositories,
        turn: &mut Turn,
        volume: volume::Id,
        (more, waits): (u64, bool),
    ) -> anyhow::Result<bool> {
        let sr = &self.place.sr;
        let attached = match turn.attached.upgrade() {
            Some(attached) => attached,
            None => repositories.attached(sr)?,
        };
        turn.attached = Arc::downgrade(&attached);
        let mut repository = attached.repository.lock();
        let lv = repository.group().vg().lvs.iter().find(|lv| lv.id == volume);
        let lv = lv.context("it is not in the repository any more")?.name.clone();
        let (free, extent) = (repository.stat().free, repository.group().vg().extent_bytes());
        if free == 0 {
            bail!("nothing is left in repository {sr}: delete disks or snapshots");
        }
        // Others have a need as well. The last of it is for those that wait.
        let share = if waits { (free / 2).max(STEP).min(free) } else { free / 2 };
        if !waits && share < STEP {
            return Ok(false);
        }
        let mut more = more.min(share);
        loop {
            match repository.grow(&lv, more, &author()) {
                Ok(()) => break,
                // There is less in places that it can have.
                Err(sr::Error::Group(volume::Error::NoSpace { .. })) if more > extent => more /= 2,
                Err(e) => return Err(e.into()),
            }
        }
        let map = repository.group().map(&lv)?;
        drop(repository);
        // If it is elsewhere by now it needs none of it.
        self.growing.has_grown(volume, &map)?;
        Ok(true)
    }
}

impl Repositories {
    /// Keeps space ready for the image of this name, if it is a disk's that is written to, until
    /// [`Repositories::unwatch`]. `size`: of the disk, by now.
    pub(crate) fn watch(
        &self,
        name: &str,
        place: &Place,
        growing: Option<Growing>,
        size: Arc<AtomicU64>,
        clock: &Clock,
    ) {
        let (Place::Disk(place), Some(growing)) = (place, growing) else { return };
        let turn = Turn { attached: Weak::new(), over: false, failed: None, said: None };
        let watched = Arc::new(Watched {
            place: place.clone(),
            growing,
            size,
            exhausted: AtomicBool::new(false),
            turn: Mutex::new(turn),
        });
        watched.growing.may_grow(true);
        // What a guest writes at once needs no waiting.
        watched.provide(self, clock.now());
        self.watched.lock().insert(name.to_owned(), watched);
    }

    /// Ends it, before the image is closed.
    pub(crate) fn unwatch(&self, name: &str) {
        let watched = self.watched.lock().remove(name);
        if let Some(watched) = watched {
            // Waits for who is at it.
            watched.turn.lock().over = true;
            watched.growing.may_grow(false);
        }
    }

    fn all_watched(&self) -> Vec<Arc<Watched>> {
        self.watched.lock().values().cloned().collect()
    }

    /// Whether the repository had no more space for the image of this name.
    pub(crate) fn is_exhausted(&self, name: &str) -> bool {
        self.watched.lock().get(name).is_some_and(|w| w.exhausted.load(Ordering::Relaxed))
    }
}

/// For tests.
#[cfg(test)]
impl Repositories {
    /// What is left by a daemon that dies before it has told the image.
    pub(crate) fn grow_untold(&self, sr: &str, key: &str, more: u64) {
        let attached = self.attached(sr).unwrap();
        let mut repository = attached.repository.lock();
        let lv = repository.disk(key).unwrap().1.lv.clone();
        repository.grow(&lv, more, &author()).unwrap();
    }

    /// Has the image's requests wait for space.
    pub(crate) fn wait_for_space(&self, name: &str) {
        let watched = self.watched.lock().get(name).cloned().unwrap();
        watched.growing.may_grow(true);
    }
}

/// See the module's text.
pub(crate) struct Growth {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Growth {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there is none to be had.
    pub(crate) fn start(repositories: Arc<Repositories>, clock: Clock) -> anyhow::Result<Growth> {
        let (stop, stopped) = channel::<()>();
        let body = move || {
            let mut wait = IDLE;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let all = repositories.all_watched();
                all.iter().for_each(|w| w.provide(&repositories, clock.now()));
                wait = if all.is_empty() { IDLE } else { LOOK };
            }
            // Nobody is to wait for space that does not come.
            repositories.all_watched().iter().for_each(|w| w.growing.may_grow(false));
        };
        let thread = std::thread::Builder::new().name("growth".to_owned()).spawn(body);
        Ok(Growth { stop, thread: thread.context("no thread for the growth of volumes")? })
    }

    /// Ends it.
    pub(crate) fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            log::error!("the thread for the growth of volumes has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const TIB: u64 = 1 << 40;

    #[test]
    fn how_much_is_ahead_of_an_image() {
        let most = sr::most_bytes(TIB);
        // A new disk's first volume; one that is written to; larger ones.
        assert_eq!(wanted(MIB, 64 * MIB, most, false), Some(321 * MIB));
        assert_eq!(wanted(128 * MIB, 385 * MIB, most, false), None);
        assert_eq!(wanted(130 * MIB, 385 * MIB, most, false), Some(129 * MIB));
        assert_eq!(wanted(7168 * MIB, 8192 * MIB, most, false), None);
        assert_eq!(wanted(7169 * MIB, 8192 * MIB, most, false), Some(513 * MIB));
        assert_eq!(wanted(TIB / 2, TIB / 2, most, false), Some(3072 * MIB));
        // Whoever waits gets some.
        assert_eq!(wanted(385 * MIB, 385 * MIB, most, true), Some(384 * MIB));
        assert_eq!(wanted(300 * MIB, 385 * MIB, most, true), Some(299 * MIB));
        // No more than the disk needs, unless it needs more.
        let most = sr::most_bytes(100 * MIB);
        assert_eq!(wanted(MIB, 64 * MIB, most, false), Some(most - 64 * MIB));
        assert_eq!(wanted(MIB, most, most, false), None);
        assert_eq!(wanted(most, most, most, false), None);
        assert_eq!(wanted(most, most, most, true), Some(STEP));
        assert_eq!(wanted(u64::MAX, MIB, u64::MAX, true), Some(u64::MAX - MIB));
    }
}
