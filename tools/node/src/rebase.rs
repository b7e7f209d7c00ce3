//! A running image gets another backing file, and shows what it did: [`Disk::rebase`]. By control
//! code.
//!
//! Both chains below the image hold still, so where they differ is found while guests go on. What
//! the old one shows there is taken up as by a stream; then the image names the new one.

use std::path::PathBuf;

use block::Port;
use qcow::ChainReader;
use qcow::edit::differing;
use qcow::open::{BackingRef, Format, MAX_DEPTH, allowed_host_file};

use crate::chain::{file_leaf, open_chain};
use crate::live::{JobWatch, Pace};
use crate::running::{Lies, RunningLayer};
use crate::source::Kind;
use crate::{Disk, Error, NodeSpec, OpenOptions};

impl Disk {
    /// Gives the image another backing file (or none): its name, as it shall stand in the image, and
    /// its format. The disk shows what it did before. Files are opened in the folders `allow` only,
    /// or anywhere if there are none.
    ///
    /// # Errors
    /// If that file or one below it cannot be opened or read, or the watcher says no. The chain is as
    /// it was then, and this can be done again.
    pub fn rebase(
        &mut self,
        backing: Option<(&str, Format)>,
        allow: &[PathBuf],
        watch: &mut dyn JobWatch,
    ) -> Result<(), Error> {
        self.on_image(|_, _| ())?;
        self.refuse_unfit(true)?;
        let count = self.layers().len();
        let to = backing.map(|(name, format)| self.named(name, format)).transpose()?;
        let done = self.bring_in(to.as_ref(), allow).and_then(|()| {
            self.take_up_what_differs(count, watch)?;
            let old: Vec<usize> = (0..count).collect();
            let new: Vec<usize> = [0].into_iter().chain(count..self.layers().len()).collect();
            let name = to.as_ref().map(|b| (b.name.as_str(), b.format));
            self.paused(|disk| disk.rename_backing(0, name, &old, &new))
        });
        if done.is_err() {
            self.on_image(|i, _| i.cancel_stream())?;
        }
        let layers = &mut self.rest.chain.layers;
        let gone: Vec<RunningLayer> = match &done {
            Ok(()) => layers.drain(1..count).collect(),
            Err(_) => layers.drain(count..).collect(),
        };
        if done.is_ok() {
            layers[0].backing = to;
        }
        self.forget(gone);
        done
    }

    fn named(&self, name: &str, format: Format) -> Result<BackingRef, Error> {
        let top = &self.layers()[0];
        let (by, path) = (&top.name, top.path.as_deref());
        Ok(BackingRef::new(by, name.as_bytes(), path, Some(format.name()), None, 1)?)
    }

    /// Opens the new backing file and those below it, behind the layers that are there.
    fn bring_in(&mut self, to: Option<&BackingRef>, allow: &[PathBuf]) -> Result<(), Error> {
        let Some(to) = to else { return Ok(()) };
        let found = allowed_host_file(to, allow)?;
        let backing_format = self.rest.chain.backing_format();
        let allow_backing = allow.to_vec();
        let options = OpenOptions { backing_format, allow_backing, ..OpenOptions::read(to.format) };
        let chain = open_chain(&NodeSpec::File(found.path), &options)?;
        if chain.layers.len() >= MAX_DEPTH {
            let why = format!("its chain has {} layers already", chain.layers.len());
            return Err(Error::node(&to.name, why));
        }
        for layer in chain.layers {
            let fail = |e: &dyn std::fmt::Display| Error::node(&layer.name, e);
            if layer.data.is_some() {
                return Err(fail(&"has a data file, and so cannot be brought in"));
            }
            let format = layer.format();
            let (locks, id) = (layer.storage.locks, layer.storage.id);
            let Kind::Host(host) = layer.storage.kind else { return Err(fail(&"is no file")) };
            if id.is_some() && id == self.layers()[0].id {
                return Err(fail(&"is the image itself"));
            }
            let file = host.into_file();
            let again = file.try_clone().map_err(|e| fail(&e))?;
            let leaf = self.add_leaf(file_leaf(vec![file]).map_err(|e| fail(&e))?)?;
            self.rest.chain.layers.push(RunningLayer {
                port: Port { leaf, unit: 0 },
                alone: true,
                lies: Lies::File(again),
                name: layer.name,
                path: layer.path,
                format,
                id,
                backing: layer.backing,
                locks,
            });
        }
        Ok(())
    }

    fn take_up_what_differs(
        &mut self,
        count: usize,
        watch: &mut dyn JobWatch,
    ) -> Result<(), Error> {
        let all = self.layers().len();
        let reader = |which: Vec<usize>| {
            let some = !which.is_empty();
            some.then(|| self.read(&which, usize::MAX).map(ChainReader::new)).transpose()
        };
        let (old, new) = (reader((1..count).collect())?, reader((count..all).collect())?);
        let top = self.read(&(0..count).collect::<Vec<_>>(), usize::MAX)?;
        let Some(top) = top.layers[0].image() else { return Ok(()) };
        let (size, bits) = (top.geometry.size(), top.geometry.cluster_bits());
        // An image without a backing file shows zeroes, as no chain does.
        let (Some(mut one), mut other) = (if old.is_some() { (old, new) } else { (new, old) })
        else {
            return Ok(());
        };
        let name = self.rest.name().to_owned();
        let mut pace = Pace::new(watch, 2 * size, &name);
        let only = differing(&mut one, other.as_mut(), size, bits, &mut pace)?;
        // At rest: what guests empty from then on must hide what comes below.
        if !self.paused(|disk| disk.on_image(|i, _| i.start_stream(0, Some(only))))? {
            return Err(Error::node(&name, "another stream is under way"));
        }
        self.stream_to_its_end(&mut Half { watch, begins: size })
    }
}

/// The second half of a job.
struct Half<'w> {
    watch: &'w mut dyn JobWatch,
    begins: u64,
}

impl JobWatch for Half<'_> {
    fn at(&mut self, done: u64, of: u64) -> bool {
        self.watch.at(self.begins + done, self.begins + of)
    }

    fn allow(&mut self) -> u64 {
        self.watch.allow()
    }
}
