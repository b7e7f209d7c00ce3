//! [`Door`]: makes portals to a running image, spread over its reactors.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dma::Region;
use reactor::{Mailbox, Portal};

use crate::{Error, Frontend, ReactorCore};

/// An image on one of its reactors.
pub(crate) struct Entry {
    pub(crate) mailbox: Mailbox<ReactorCore>,
    /// Index in its core.
    pub(crate) image: usize,
    /// The reactor's number.
    pub(crate) reactor: usize,
}

/// Makes portals to a running image. Clones take turns together.
#[derive(Clone)]
pub struct Door {
    /// The home reactor's first.
    entries: Arc<[Entry]>,
    next: Arc<AtomicUsize>,
    name: Arc<str>,
}

impl Door {
    /// To the image at `entries`, the one on its home reactor first.
    pub(crate) fn new(entries: Arc<[Entry]>, name: &str) -> Door {
        Door { entries, next: Arc::default(), name: name.into() }
    }

    /// The image's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image's index in its home reactor's core.
    pub(crate) fn image(&self) -> usize {
        self.entries[0].image
    }

    /// Runs `call` on the home reactor; `None` if it has ended.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut ReactorCore) -> T + Send + 'static,
    ) -> Option<T> {
        self.entries[0].mailbox.ask(call)
    }

    /// The image on all of its reactors, the home reactor first.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One of its reactors: the home reactor, and then the others in turn.
    pub(crate) fn entry(&self, number: usize) -> &Entry {
        &self.entries[number % self.entries.len()]
    }

    /// A portal for `depth` requests in flight over `regions`: to the next of the reactors, in turn.
    ///
    /// # Errors
    /// If a device cannot reach the memory, descriptors are short, or the reactor has ended.
    pub fn open(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.open_at(turn % self.entries.len(), depth, regions)
    }

    /// The same at the home reactor, out of turn.
    pub(crate) fn open_home(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        self.open_at(0, depth, regions)
    }

    fn open_at(&self, at: usize, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        let fail = |why: String| Error::node(&*self.name, why);
        let gone = || fail("the reactor has ended".to_owned());
        let Entry { mailbox, image, .. } = &self.entries[at];
        let wake = mailbox.ask(|core| core.wake()).ok_or_else(gone)?;
        let (portal, end) = Portal::new(depth, regions, wake).map_err(|e| fail(e.to_string()))?;
        let image = *image;
        let added = mailbox.ask(move |core: &mut ReactorCore| {
            core.add_frontend(image, |owner, _| Ok(Frontend::Portal(Box::new(end(owner)))))
        });
        added.ok_or_else(gone)?.map_err(fail)?;
        let mailbox = mailbox.clone();
        Ok(portal.with_lodging(Arc::new(move |lodger| mailbox.post(|core| core.lodge(lodger)))))
    }
}
