//! [`Mirrors`]: copies of running disks to NBD servers elsewhere, which go on while guests write: for the
//! migration of storage (`Data.mirror`). A thread for each.
//!
//! It works as QEMU's mirror in the background does: all that the disk holds is sent, then what has changed
//! since, again and again ([`node::Watched`]). A guest never waits for the remote side, and whatever
//! becomes of that is no affair of the guest's. The copy counts as complete when a pass over all changes
//! takes under a second; it still lags by what was written since. So its end is [`Mirrors::finish`], which
//! sends what was written before it and has it made durable: asked by whoever has stopped the guest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use nbd::{Client, Network, Remote, TlsClient};
use node::{Content, Round, Watched};
use reactor::Clock;
use reactor::sync::Mutex;

use super::images::Image;
use super::keep::Keep;

/// How long the remote side may take for the handshake, and for each request, in nanoseconds.
const PATIENCE_NS: u64 = 30_000_000_000;
/// A copy is complete when a pass over all changes takes less, in nanoseconds.
const SHORT_NS: u64 = 1_000_000_000;
/// How long the end of a mirror may take, which somebody waits for, in nanoseconds.
const FINISH_NS: u64 = 600_000_000_000;
/// Between two looks for changes, when there are none.
const LOOK: Duration = Duration::from_millis(10);
/// Mirrors that are remembered, also when they have ended.
const MOST: usize = 64;

/// Which remote sides there may be, beside unix sockets.
#[derive(Clone, Debug, Default)]
pub(crate) enum Reach {
    /// None.
    #[default]
    Host,
    /// By TLS; in plain text on the loopback.
    Tls(TlsClient),
    /// Also in plain text.
    Plain,
}

impl Reach {
    /// From the configuration: "", "plain" or `tls:FOLDER`.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Reach> {
        match text {
            "" => Ok(Reach::Host),
            "plain" => Ok(Reach::Plain),
            _ => match text.strip_prefix("tls:") {
                Some(folder) => Ok(Reach::Tls(TlsClient::load(Path::new(folder))?)),
                None => bail!("{text:?} is neither \"tls:FOLDER\" nor \"plain\""),
            },
        }
    }

    /// Whether sockets of a network are needed.
    pub(crate) fn is_network(&self) -> bool {
        !matches!(self, Reach::Host)
    }

    fn check(&self, remote: &Remote) -> anyhow::Result<Option<&TlsClient>> {
        match (remote.network(), self) {
            (Network::No, _) | (Network::Plain, Reach::Plain) => Ok(None),
            (Network::Plain, Reach::Tls(_)) if remote.is_loopback() => Ok(None),
            (Network::Tls, Reach::Tls(tls)) => Ok(Some(tls)),
            (Network::Plain, Reach::Tls(_)) => {
                bail!("{remote}: plain text leaves this host only with `mirror = \"plain\"`")
            }
            (Network::Tls, _) => {
                bail!(
                    "{remote}: TLS needs certificates: `mirror = \"tls:FOLDER\"` in the configuration"
                )
            }
            (Network::Plain, Reach::Host) => {
                bail!("{remote}: the daemon has no network: see `mirror` in the configuration")
            }
        }
    }
}

/// How far a mirror is.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct State {
    /// The first pass: from 0 to 1.
    pub(crate) progress: f64,
    /// The remote side has all but what was written in the last moments.
    pub(crate) complete: bool,
    /// Why it has failed.
    pub(crate) failed: Option<String>,
    /// It was finished: nothing is missing.
    finished: bool,
    /// The toolstack was told that it is complete, and not that it failed.
    trusted: bool,
}

struct Mirror {
    /// The name of the image, and the domain whose end is its end.
    image: String,
    domain: String,
    /// The domain has the image for the mirror's sake. Whoever ends that takes this.
    alone: AtomicBool,
    state: Mutex<State>,
    clock: Clock,
    stop: Arc<AtomicBool>,
    /// Until when it has to be finished; 0: it goes on.
    finish: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A remote side that was reached.
pub(crate) struct Connected {
    remote: Remote,
    client: Client,
    stop: Arc<AtomicBool>,
}

/// All mirrors, by their keys.
#[derive(Default)]
pub(crate) struct Mirrors {
    all: Mutex<BTreeMap<String, Arc<Mirror>>>,
    reach: Reach,
}

impl Mirrors {
    /// None yet.
    pub(crate) fn new(reach: Reach) -> Mirrors {
        Mirrors { all: Mutex::default(), reach }
    }

    /// Connects to a remote side.
    pub(crate) fn connect(&self, remote: &str, clock: &Clock) -> anyhow::Result<Connected> {
        let remote = Remote::parse(remote)?;
        let tls = self.reach.check(&remote)?;
        let stop = Arc::new(AtomicBool::new(false));
        let client = Client::connect(&remote, tls, clock, PATIENCE_NS, stop.clone())?;
        Ok(Connected { remote, client, stop })
    }

    /// Begins one of an open image, for as long as `domain` has it; returns its key. `alone`: the domain
    /// has it for the mirror. What was told of earlier mirrors of the image does not count any more.
    pub(crate) fn start(
        &self,
        image: &Image,
        domain: &str,
        alone: bool,
        connected: Connected,
        clock: &Clock,
        keep: &Keep,
    ) -> anyhow::Result<String> {
        let Connected { remote, client, stop } = connected;
        let info = image.info();
        if client.size() < info.size || !info.size.is_multiple_of(client.block_size().into()) {
            bail!(
                "{remote}: has {} bytes in blocks of {}, where the disk has {}",
                client.size(),
                client.block_size(),
                info.size
            );
        }
        let mut all = self.all.lock();
        if all.len() >= MOST {
            all.retain(|_, m| !m.has_ended() || m.is_untold());
        }
        if all.len() >= MOST {
            bail!("there are {MOST} mirrors already");
        }
        let watched = Watched::begin(image.door.clone(), info.max_transfer, clock.clone())?;
        let mirror = Arc::new(Mirror {
            image: image.name.clone(),
            domain: domain.to_owned(),
            alone: AtomicBool::new(alone),
            state: Mutex::default(),
            clock: clock.clone(),
            stop,
            finish: AtomicU64::new(0),
            thread: Mutex::default(),
        });
        let (m, size) = (mirror.clone(), info.size);
        let body = move || {
            let done = m.run(watched, client, size);
            let mut state = m.state.lock();
            match done {
                Ok(()) => state.finished = true,
                Err(e) => {
                    log::warn!("{}: the mirror has ended: {e:#}", m.image);
                    state.failed = Some(format!("{e:#}"));
                }
            }
        };
        let thread = std::thread::Builder::new().name("mirror".to_owned()).spawn(body);
        *mirror.thread.lock() = Some(thread.context("cannot start a thread")?);
        log::info!("{}: mirrored to {remote}", image.name);
        for older in all.values().filter(|m| m.image == image.name) {
            older.state.lock().trusted = false;
            if older.domain == domain && older.alone.swap(false, Ordering::AcqRel) {
                mirror.alone.store(true, Ordering::Release);
            }
        }
        keep.forget_mirror(&image.name);
        let key = uuid::Uuid::new_v4().to_string();
        all.insert(key.clone(), mirror);
        Ok(key)
    }

    fn get(&self, key: &str) -> anyhow::Result<Arc<Mirror>> {
        let mirror = self.all.lock().get(key).cloned();
        mirror.with_context(|| {
            format!("there is no mirror {key:?}: the daemon may have been started again")
        })
    }

    /// How far one is, for the toolstack. That it is complete is remembered, also by the next daemon.
    pub(crate) fn stat(&self, key: &str, keep: &Keep) -> anyhow::Result<State> {
        let mirror = self.get(key)?;
        let mut state = mirror.state.lock();
        let trusted = state.complete && state.failed.is_none();
        match (state.trusted, trusted && !state.finished) {
            (false, true) => keep.remember_mirror(&mirror.image)?,
            (true, false) => keep.forget_mirror(&mirror.image),
            _ => {}
        }
        state.trusted = trusted && !state.finished;
        Ok(state.clone())
    }

    /// Ends one; it has failed then, if it was not finished. Returns its image and domain if that has it for
    /// the mirror alone: from now on it does not.
    pub(crate) fn cancel(
        &self,
        key: &str,
        keep: &Keep,
    ) -> anyhow::Result<Option<(String, String)>> {
        let mirror = self.get(key)?;
        mirror.end(None);
        if std::mem::take(&mut mirror.state.lock().trusted) {
            keep.forget_mirror(&mirror.image);
        }
        let alone = mirror.alone.swap(false, Ordering::AcqRel);
        Ok(alone.then(|| (mirror.image.clone(), mirror.domain.clone())))
    }

    /// Ends one and forgets it.
    pub(crate) fn destroy(
        &self,
        key: &str,
        keep: &Keep,
    ) -> anyhow::Result<Option<(String, String)>> {
        let whose = self.cancel(key, keep)?;
        self.all.lock().remove(key);
        Ok(whose)
    }

    /// The keys of all.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.all.lock().keys().cloned().collect()
    }

    fn of(&self, image: &str, domain: Option<&str>) -> Vec<Arc<Mirror>> {
        let all = self.all.lock();
        let is = |m: &&Arc<Mirror>| m.image == image && domain.is_none_or(|d| m.domain == d);
        all.values().filter(is).cloned().collect()
    }

    /// Whether a disk is being mirrored.
    pub(crate) fn is_mirrored(&self, image: &str) -> bool {
        self.of(image, None).iter().any(|m| !m.has_ended())
    }

    /// Whether a domain has an image for a mirror's sake alone.
    pub(crate) fn is_alone(&self, image: &str, domain: &str) -> bool {
        self.of(image, Some(domain)).iter().any(|m| m.alone.load(Ordering::Acquire))
    }

    /// The domains that have an image for mirrors alone, or this one if it does: from now on they do not.
    pub(crate) fn take_alone(&self, image: &str, domain: Option<&str>) -> Vec<String> {
        let mut mirrors = self.of(image, domain);
        mirrors.retain(|m| m.alone.swap(false, Ordering::AcqRel));
        mirrors.iter().map(|m| m.domain.clone()).collect()
    }

    /// Whether the toolstack relies on a mirror of a disk.
    pub(crate) fn is_trusted(&self, image: &str) -> bool {
        self.of(image, None).iter().any(|m| m.state.lock().trusted)
    }

    /// The guest has stopped: sends what is missing, and ends: mirrors of the domain, or of all of them if
    /// it is the `last` that has the image. A mirror that is not complete yet just ends: nobody relies on
    /// it, and a guest's end does not wait for it.
    ///
    /// # Errors
    /// If the toolstack was told that a mirror is complete, also by a daemon before this one, and the remote
    /// side lacks something: told once.
    pub(crate) fn finish(
        &self,
        image: &str,
        domain: &str,
        last: bool,
        keep: &Keep,
    ) -> anyhow::Result<()> {
        let (mut told, mut lacks) = (false, None);
        for mirror in self.of(image, (!last).then_some(domain)) {
            let complete = mirror.state.lock().complete;
            let until = mirror.clock.now().saturating_add(FINISH_NS);
            mirror.end(complete.then_some(until));
            let mut state = mirror.state.lock();
            if std::mem::take(&mut state.trusted) {
                told = true;
                lacks = lacks.or(state.failed.clone());
            }
        }
        if told {
            keep.forget_mirror(image);
        } else if keep.has_mirror(image) && !self.is_trusted(image) {
            keep.forget_mirror(image);
            lacks = Some("the daemon that sent them has ended: mirror it again".to_owned());
        }
        match lacks {
            Some(why) => bail!("{image}: the remote side lacks the last writes: {why}"),
            None => Ok(()),
        }
    }

    /// Ends all of an image: it closes, or will be another one.
    pub(crate) fn stop(&self, image: &str) {
        self.of(image, None).iter().for_each(|m| m.end(None));
    }
}

impl Mirror {
    fn has_ended(&self) -> bool {
        let state = self.state.lock();
        state.finished || state.failed.is_some()
    }

    /// Whether the toolstack relies on it, and was not told that it failed.
    fn is_untold(&self) -> bool {
        let state = self.state.lock();
        state.trusted && state.failed.is_some()
    }

    /// Has it end, in order until then or at once, and waits for that.
    fn end(&self, in_order: Option<u64>) {
        match in_order {
            Some(until) => self.finish.store(until, Ordering::Release),
            None => self.stop.store(true, Ordering::Release),
        }
        // Others wait as long.
        let mut thread = self.thread.lock();
        if thread.take().is_some_and(|t| t.join().is_err()) {
            self.state.lock().failed = Some("its thread panicked".to_owned());
        }
    }

    fn run(&self, mut watched: Watched, mut client: Client, size: u64) -> anyhow::Result<()> {
        let clock = &self.clock;
        let (mut first, mut began) = (true, clock.now());
        // A pass that began after the guest had stopped has all of it.
        let mut last = false;
        loop {
            let Round { bytes, at } = self.round(&mut watched, &mut client)?;
            if at > 0 {
                if first {
                    self.state.lock().progress = at as f64 / size as f64;
                }
                continue;
            }
            client.settle()?;
            if last {
                client.flush()?;
                client.disconnect();
                return Ok(());
            }
            let took = clock.now() - began;
            let mut state = self.state.lock();
            state.progress = 1.0;
            state.complete |= took < SHORT_NS;
            let complete = state.complete;
            drop(state);
            if first {
                client.flush()?;
            }
            first = false;
            last = self.is_finishing();
            if !last && complete && bytes == 0 {
                while watched.changed()? == 0 && !self.is_finishing() {
                    self.check()?;
                    client.look()?;
                    std::thread::sleep(LOOK);
                }
                last = self.is_finishing();
            }
            began = clock.now();
        }
    }

    fn is_finishing(&self) -> bool {
        self.finish.load(Ordering::Acquire) > 0
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.stop.load(Ordering::Acquire) {
            bail!("ended from here");
        }
        let until = self.finish.load(Ordering::Acquire);
        if until > 0 && self.clock.now() > until {
            bail!("they could not be sent within {} s", FINISH_NS / 1_000_000_000);
        }
        Ok(())
    }

    fn round(&self, watched: &mut Watched, client: &mut Client) -> anyhow::Result<Round> {
        self.check()?;
        let done = watched.round(&mut |at, what| {
            let sent = match what {
                Content::Bytes(bytes) => client.write(at, bytes),
                Content::Zeroes(len) => client.write_zeroes(at, len),
            };
            sent.map_err(|e| e.to_string())
        });
        Ok(done?)
    }
}
