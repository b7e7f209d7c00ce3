//! Changing the chain of an image that is being served: a new overlay in front, layers taken up or
//! committed down, another size. By control code; the reactors only pause for the switch.
//!
//! What changes on disk is changed by the code that does it offline ([`qcow::edit`]), on files
//! opened anew, while the image is at rest or in layers that no guest writes to. Then the chain is
//! read again and all reactors go on with it ([`qcow::run::Image::restack`]).

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use block::{Port, Status, Storage as _};
use file::ImageLock;
use nix::fcntl::{FallocateFlags, fallocate};
use qcow::create::CreateOptions;
use qcow::edit::Watch;
use qcow::open::{BackingRef, ChainOptions, Format, Opened};
use qcow::run::Stack;
use qcow::{ChainReader, ImageMeta, Mode};

use crate::chain::{Chain, file_id, file_leaf, lock};
use crate::device::Device;
use crate::groups::Lease;
use crate::running::{Lies, RunningLayer};
use crate::{Disk, Error, HostStorage, OpenOptions};

/// Between two looks at a job.
const TICK: Duration = Duration::from_millis(2);

/// Bytes of space that a new overlay gets before it is used.
const FIRST_SPACE: i64 = 16 << 20;

/// Whoever has a job done: told how far it is, asked how fast it may go.
pub trait JobWatch {
    /// `done` of `of` bytes of the guest's disk are done. Returns whether to go on.
    fn at(&mut self, done: u64, of: u64) -> bool;

    /// How many bytes may be moved now, on top of what was allowed before. Asked again and again.
    fn allow(&mut self) -> u64;
}

impl Disk {
    /// The files of the chain, the one that is written to first.
    pub fn chain(&self) -> impl Iterator<Item = &str> {
        self.layers().iter().map(|l| l.name.as_str())
    }

    /// Puts the overlay at `path` in front of the image: guests write to it from then on. It is made
    /// if it is not there; else it must be empty, of the image's size, and name the image as its
    /// backing file. Guests are kept waiting for the switch only.
    ///
    /// # Errors
    /// If the image or the overlay cannot be used so. The image goes on as it was then.
    pub fn snapshot(&mut self, path: &Path) -> Result<(), Error> {
        self.on_image(|_, _| ())?;
        let made = !path.exists();
        if made {
            self.make_overlay(path)?;
        }
        let done = self.put_in_front(path);
        if done.is_err() && made {
            let _ = std::fs::remove_file(path);
        }
        done
    }

    fn make_overlay(&self, path: &Path) -> Result<(), Error> {
        let fail = |e: &dyn std::fmt::Display| Error::node(path.display().to_string(), e);
        let top = &self.layers()[0];
        let below = top.path.as_deref().and_then(|p| std::path::absolute(p).ok());
        let below = below.and_then(|p| p.into_os_string().into_string().ok());
        let below =
            below.ok_or_else(|| fail(&"the image has no name that an overlay could have"))?;
        let chain = self.read(&self.numbers(), usize::MAX)?;
        let image = chain.layers[0].image().ok_or_else(|| fail(&"only qcow2 has overlays"))?;
        let mut options = CreateOptions::new(image.geometry.size());
        options.cluster_size = image.geometry.cluster_size();
        options.extended_l2 = image.geometry.sub_bits() > 0;
        options.backing = Some((below, Format::Qcow2));
        let file = File::options().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|e| fail(&e))?;
        let mut storage = HostStorage::of(file, false).map_err(|e| fail(&e))?;
        let made = qcow::create::create(&mut storage, &path.display().to_string(), &options);
        let made = made.map_err(Error::from).and_then(|()| storage.flush().map_err(|e| fail(&e)));
        // Its name must be as durable as it is.
        let dir = path.parent().filter(|d| *d != Path::new("")).unwrap_or(Path::new("."));
        let made =
            made.and_then(|()| File::open(dir).and_then(|d| d.sync_all()).map_err(|e| fail(&e)));
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn put_in_front(&mut self, path: &Path) -> Result<(), Error> {
        let name = path.display().to_string();
        let fail = |e: &dyn std::fmt::Display| Error::node(&name, e);
        let mut host = HostStorage::open(path, true).map_err(|e| fail(&e))?;
        let id = Some(file_id(&host).map_err(|e| fail(&e))?);
        if self.layers().iter().any(|l| l.id == id) {
            return Err(fail(&"is in the chain already"));
        }
        let locked = lock(&name, &mut host, &OpenOptions::write(Format::Qcow2))?;
        let file = host.into_file();
        let mut new = RunningLayer {
            port: Port { leaf: 0, unit: 0 },
            alone: true,
            lies: Lies::File(file.try_clone().map_err(|e| fail(&e))?),
            name: name.clone(),
            path: Some(path.to_owned()),
            format: Format::Qcow2,
            id,
            backing: None,
            locks: locked.into_iter().collect(),
        };
        let mut overlay = self.check_overlay(&mut new)?;
        // Space for the first writes, which come all at once: a favour. What is too much is cut when
        // the image is closed.
        let len = overlay.layers[0].storage.len();
        let from = i64::try_from(len).map_err(|e| fail(&e))?;
        let _ = fallocate(&file, FallocateFlags::empty(), from, FIRST_SPACE);
        let same = file.try_clone().map_err(|e| fail(&e))?;
        let leaf = file_leaf(vec![file]).map_err(|e| fail(&e))?;
        new.port.leaf = self.add_leaf(leaf)?;
        self.switch_to(new, &mut overlay).inspect_err(|_| {
            let _ = same.set_len(len);
        })
    }

    /// Has guests write to a layer that is ready for it. `overlay`: what is in it. After an error the
    /// layer is let go of.
    pub(crate) fn switch_to(
        &mut self,
        new: RunningLayer,
        overlay: &mut Chain,
    ) -> Result<(), Error> {
        self.rest.chain.layers.insert(0, new);
        // What takes time is done before everybody waits.
        let all = self.numbers();
        let stack = Stack::new(overlay, &[self.layers()[0].port]);
        let done = stack.map_err(Error::from).and_then(|stack| {
            self.paused(|disk| {
                disk.go_on_with(&all, move |i, leaves| i.put_in_front(stack, leaves))
            })
        });
        if done.is_err() {
            let new = self.rest.chain.layers.remove(0);
            self.forget(vec![new]);
            return done;
        }
        // Others may read it from now on.
        self.share(1);
        Ok(())
    }

    /// All layers.
    pub(crate) fn numbers(&self) -> Vec<usize> {
        (0..self.layers().len()).collect()
    }

    /// Opens an overlay alone, for writing, and looks whether it shows what the image shows.
    pub(crate) fn check_overlay(&self, new: &mut RunningLayer) -> Result<Chain, Error> {
        let fail = |e: &str| Error::node(&new.name, e);
        let storage = new.reopen(&self.rest.devices, true)?;
        let opened = Opened { storage, path: new.path.clone(), name: new.name.clone(), id: new.id };
        let format = Some(Format::Qcow2);
        let writable = true;
        let options = ChainOptions { format, writable, top_only: true, ..Default::default() };
        let none = &mut |b: &BackingRef| Err(qcow::Error::refused(&b.named_by, "stays closed"));
        let chain = Chain::open(opened, options, none)?;
        let layer = &chain.layers[0];
        let top = &self.layers()[0];
        let leads_to = |b: &BackingRef| match &top.lies {
            // Volumes go by their names; what is written in an image leads nowhere here.
            Lies::Device(n) if matches!(self.rest.devices[*n], Device::Volume(_)) => {
                b.name == format!("/dev/{}", top.name)
            }
            _ => HostStorage::open(&b.path, false).is_ok_and(|host| file_id(&host).ok() == top.id),
        };
        let backing = layer.backing.as_ref();
        if !backing.is_some_and(|b| b.format == top.format && leads_to(b)) {
            return Err(fail("does not name the image, and its format, as its backing file"));
        }
        let Some(image) = layer.image() else { return Err(fail("is not qcow2")) };
        if image.l1.iter().any(|&e| e != 0) {
            return Err(fail("is not empty"));
        }
        if image.geometry.size() & !511 != self.info().size {
            return Err(fail("has another size than the image"));
        }
        new.backing.clone_from(&layer.backing);
        Ok(chain)
    }

    /// Takes up into the top layer what the layers between it and layer `base` hold (all below it if
    /// that is `None`), and cuts those off. The top layer is layer 0.
    ///
    /// # Errors
    /// If the image has internal snapshots, something cannot be read or written, or the watcher says
    /// no: then what was taken up stays, the chain is as it was, and this can be done again.
    pub fn stream(&mut self, base: Option<usize>, watch: &mut dyn JobWatch) -> Result<(), Error> {
        let name = self.rest.name().to_owned();
        let fail = |why: String| Error::node(&name, why);
        let count = self.layers().len();
        let base = base.unwrap_or(count);
        if base == 0 || base > count {
            return Err(fail(format!("there is no layer {base} below")));
        }
        if base == 1 {
            return Ok(());
        }
        self.refuse_unfit(true)?;
        if !self.on_image(move |i, _| i.start_stream(count - base, None))? {
            return Err(fail("another stream is under way".into()));
        }
        self.stream_to_its_end(watch)?;
        let below: Vec<usize> = (base..count).collect();
        self.cut(0, base - 1, &below)
    }

    /// Lets the stream that was begun go on, and waits for its end.
    pub(crate) fn stream_to_its_end(&mut self, watch: &mut dyn JobWatch) -> Result<(), Error> {
        let fail = |why: String| Error::node(self.rest.name(), why);
        let mut granted = 0u64;
        let mut stopped = false;
        let ended = loop {
            let progress = self.on_image(|i, _| i.stream_progress())?;
            // What was not used is not saved up.
            if progress.copied >= granted {
                let more = watch.allow();
                granted = granted.saturating_add(more);
                self.on_image(move |i, _| i.grant_stream(more))?;
            }
            if let Some(status) = progress.ended {
                break status;
            }
            if !stopped && !watch.at(progress.at, progress.of) {
                stopped = true;
                self.on_image(|i, _| i.cancel_stream())?;
            }
            std::thread::sleep(TICK);
        };
        match ended {
            Status::Ok => Ok(()),
            _ if stopped => Err(fail("stopped; what was taken up stays".into())),
            e => Err(fail(format!("cannot take up what lies below: {e}"))),
        }
    }

    /// Writes what layer `depth` (at least 1: not the top layer) holds into the one below it, and
    /// takes it out of the chain. Guests go on.
    ///
    /// # Errors
    /// If something cannot be read or written, somebody else uses one of the layers, or the watcher
    /// says no. The disk shows what it did before, and this can be done again.
    pub fn commit(&mut self, depth: usize, watch: &mut dyn JobWatch) -> Result<(), Error> {
        let count = self.layers().len();
        if depth == 0 || depth + 1 >= count {
            let why = format!("there is no layer {depth} below the top with another one below it");
            return Err(Error::node(self.rest.name(), why));
        }
        self.refuse_unfit(false)?;
        // Nobody else may read what is about to change.
        self.upgrade(depth + 1)?;
        let done = self.commit_down(depth, watch).and_then(|()| {
            let below: Vec<usize> = (depth + 1..count).collect();
            self.cut(depth - 1, depth, &below)
        });
        let kept = if done.is_ok() { depth } else { depth + 1 };
        self.share(kept);
        done
    }

    /// Control code is going to write to a layer, which nobody else may use.
    fn upgrade(&mut self, depth: usize) -> Result<(), Error> {
        let layer = &self.layers()[depth];
        for lock in &layer.locks {
            lock.upgrade().map_err(|e| Error::node(&layer.name, e))?;
        }
        let device = layer.lies.device();
        let lease = device.and_then(|n| self.rest.devices[n].as_volume());
        lease.map_or(Ok(()), Lease::upgrade)
    }

    /// Nobody writes to a layer any more; others may read it.
    fn share(&mut self, depth: usize) {
        let layer = &self.layers()[depth];
        layer.locks.iter().for_each(ImageLock::share);
        let device = layer.lies.device();
        if let Some(lease) = device.and_then(|n| self.rest.devices[n].as_volume()) {
            lease.share();
        }
    }

    /// Where layer `depth`, which is about to go, is shorter than the one above and the one below, it
    /// hides what the latter has behind its end: it gets zeroes there, which go down as well.
    fn lengthen(&mut self, depth: usize) -> Result<(), Error> {
        let which: Vec<usize> = (depth - 1..self.layers().len()).collect();
        let chain = self.read(&which, usize::MAX)?;
        let size = |n: usize| chain.layers[n].size();
        let snapshots = |n: usize| chain.layers[n].image().map_or(0, |i| i.header.nb_snapshots);
        let refuse = |n: usize, why: &str| {
            Err(Error::node(&chain.layers[n].name, format!("has internal snapshots, {why}")))
        };
        if snapshots(1) > 0 {
            return refuse(1, "which would be lost");
        }
        if snapshots(0) > 0 && size(1) < size(2) {
            return refuse(
                0,
                "which may be of disks larger than the layer below, and would show more",
            );
        }
        if size(1) >= size(0).min(size(2)) {
            return Ok(());
        }
        self.upgrade(depth)?;
        let done = self
            .read(&which[1..], 0)
            .and_then(|c| Ok(qcow::edit::resize(&mut ChainReader::new(c), size(0))?));
        self.share(depth);
        done
    }

    fn commit_down(&mut self, depth: usize, watch: &mut dyn JobWatch) -> Result<(), Error> {
        // An earlier try may have left tables on disk that the reactors have not followed.
        self.paused(|disk| {
            disk.refuse_unfit(false)?;
            // An earlier try may have ended with a header that only shows.
            disk.settle_header(depth + 1)?;
            let lengthened = disk.lengthen(depth);
            disk.follow(depth, lengthened)
        })?;
        let which: Vec<usize> = (depth..self.layers().len()).collect();
        let chain = self.read(&which, 1)?;
        // Clusters that the lower layer writes anew hold more than the upper one hides, if they are
        // larger than what the upper one maps, or if it grows.
        let unit = |n: usize| match chain.layers[n].image() {
            Some(i) => (i.geometry.unit_size(), i.geometry.cluster_size()),
            None => (0, 0),
        };
        let keep = unit(1).1 <= unit(0).0 && chain.layers[1].size() >= chain.layers[0].size();
        let mut reader = ChainReader::new(chain);
        let of = reader.size();
        let pace = Pace::new(watch, of, self.rest.name());
        let mut on = Committing { disk: self, pace, keep };
        qcow::edit::commit(&mut reader, 1, false, &mut on)?;
        Ok(())
    }

    /// Has layer `above` name as its backing file what layer `last` names, and the layers between
    /// them forgotten. `below`: those that stay behind that.
    fn cut(&mut self, above: usize, last: usize, below: &[usize]) -> Result<(), Error> {
        let backing = self.layers()[last].backing.clone();
        let mut which: Vec<usize> = (0..=above).collect();
        which.extend(below);
        let to = match &backing {
            Some(b) => Some((self.name_from(above, last, b)?, b.format)),
            None => None,
        };
        if above > 0 {
            self.upgrade(above)?;
        }
        let all = self.numbers();
        let to_name = to.as_ref().map(|(name, format)| (name.as_str(), *format));
        let done = self.paused(|disk| disk.rename_backing(above, to_name, &all, &which));
        if above > 0 {
            self.share(above);
        }
        done?;
        let layers = &mut self.rest.chain.layers;
        layers[above].backing = backing
            .map(|b| BackingRef { name: to.map_or_else(|| b.name.clone(), |(name, _)| name), ..b });
        let gone: Vec<RunningLayer> = layers.drain(above + 1..=last).collect();
        self.forget(gone);
        Ok(())
    }

    /// What layer `above` shall call the file that layer `by` names.
    fn name_from(&self, above: usize, by: usize, backing: &BackingRef) -> Result<String, Error> {
        let dir = |n: usize| self.layers()[n].path.as_deref().and_then(Path::parent);
        if Path::new(&backing.name).is_absolute() || dir(above) == dir(by) {
            return Ok(backing.name.clone());
        }
        let path = std::path::absolute(&backing.path).ok();
        let name = path.and_then(|p| p.into_os_string().into_string().ok());
        name.ok_or_else(|| Error::node(&backing.name, "has no name that another image could have"))
    }

    /// Gives the disk another size. Making it smaller takes what lies behind.
    ///
    /// # Errors
    /// If the image cannot have that size; it goes on as it was then.
    pub fn resize(&mut self, size: u64) -> Result<(), Error> {
        self.refuse_unfit(false)?;
        let could_be = self.on_image(move |i, _| i.could_be(size))?;
        could_be.map_err(|e| Error::node(self.rest.name(), e))?;
        self.paused(|disk| {
            disk.refuse_unfit(false)?;
            let chain = disk.read(&disk.numbers(), 0)?;
            let changed = qcow::edit::resize(&mut ChainReader::new(chain), size);
            disk.follow(0, changed.map_err(Error::from))
        })
    }

    /// Goes on with what a change of layer `at` has left on disk, also if it failed: what is in memory
    /// fits neither what there is now nor what there was. While paused. Returns how the change ended;
    /// if nobody can go on the image is out of service.
    pub(crate) fn follow<T>(&mut self, at: usize, changed: Result<T, Error>) -> Result<T, Error> {
        let settled = if changed.is_err() { self.settle_header(at) } else { Ok(()) };
        let all = self.numbers();
        let followed = settled
            .and_then(|()| self.open(&all))
            .and_then(|files| self.restack(files, &all, false));
        if followed.is_err() {
            self.on_image(|i, _| i.put_out_of_service())?;
        }
        // What the change says says more.
        let changed = changed?;
        followed.map(|()| changed)
    }

    /// Makes the header durable as it reads: a write of it that failed may show and not be on disk.
    fn settle_header(&self, at: usize) -> Result<(), Error> {
        let layer = &self.layers()[at];
        if layer.format != Format::Qcow2 {
            // All of it is a guest's, and it may be shorter than a header.
            return Ok(());
        }
        let mut storage = layer.reopen(&self.rest.devices, true)?;
        let mut header = [0; 512];
        let done = storage
            .read_at(0, &mut header)
            .and_then(|()| storage.write_at(0, &header))
            .and_then(|()| storage.flush());
        done.map_err(|e| Error::node(&layer.name, e))
    }

    /// Has layer `at` name another backing file (or none), and the reactors serve the chain `new`
    /// instead of `old`. While paused. After a failure all is as it was, or out of service.
    pub(crate) fn rename_backing(
        &mut self,
        at: usize,
        to: Option<(&str, Format)>,
        old: &[usize],
        new: &[usize],
    ) -> Result<(), Error> {
        let set = |disk: &Disk, to: Option<(&str, Format)>| {
            let layer = &disk.layers()[at];
            let mut storage = layer.reopen(&disk.rest.devices, true)?;
            qcow::edit::set_backing(&mut storage, &layer.name, to).map_err(Error::from)
        };
        self.refuse_unfit(false)?;
        let done = set(self, to)
            .and_then(|()| self.open(new))
            .and_then(|files| self.restack(files, new, false));
        if done.is_err() {
            // The header may have changed all the same, and files go by what it says.
            let was = self.layers()[at].backing.clone();
            let back = set(self, was.as_ref().map(|b| (b.name.as_str(), b.format)))
                .and_then(|()| self.open(old))
                .and_then(|files| self.restack(files, old, false));
            if back.is_err() {
                self.on_image(|i, _| i.put_out_of_service())?;
            }
        }
        done
    }

    /// Refuses to change an image that is corrupt, or, with `below`, to have something else
    /// below one with internal snapshots, which would show it.
    pub(crate) fn refuse_unfit(&self, below: bool) -> Result<(), Error> {
        let layer = &self.layers()[0];
        let mut storage = layer.reopen(&self.rest.devices, false)?;
        let image = ImageMeta::open(&mut storage, &layer.name, Mode::Read)?;
        let (header, snapshots) = (&image.header, image.header.nb_snapshots);
        if header.is_corrupt() || !self.on_image(|i, _| i.is_consistent())? {
            let why = "is corrupt; it must be repaired first, while nobody uses it";
            return Err(Error::node(self.rest.name(), why));
        }
        if below && snapshots > 0 {
            let why =
                format!("has {snapshots} internal snapshots, which would show something else");
            return Err(Error::node(self.rest.name(), why));
        }
        Ok(())
    }
}

/// A watcher of offline code that is asked by a job's: keeps the job to what that allows.
pub(crate) struct Pace<'w> {
    watch: &'w mut dyn JobWatch,
    done: u64,
    of: u64,
    /// Bytes that may be moved.
    allowed: u64,
    name: String,
}

impl<'w> Pace<'w> {
    /// For a job of `of` bytes in all on a disk of this name.
    pub(crate) fn new(watch: &'w mut dyn JobWatch, of: u64, name: &str) -> Pace<'w> {
        Pace { watch, done: 0, of, allowed: 0, name: name.to_owned() }
    }
}

impl Watch for Pace<'_> {
    fn at(&mut self, bytes: u64) -> Result<(), qcow::Error> {
        self.done = bytes;
        match self.watch.at(bytes, self.of) {
            true => Ok(()),
            false => Err(qcow::Error::refused(&self.name, "stopped")),
        }
    }

    fn moves(&mut self, bytes: u64) -> Result<(), qcow::Error> {
        // What was not used before is not saved up, but for what one question brought.
        while self.allowed < bytes {
            self.allowed = self.allowed.saturating_add(self.watch.allow());
            if self.allowed < bytes {
                std::thread::sleep(TICK);
                self.at(self.done)?;
            }
        }
        self.allowed -= bytes;
        Ok(())
    }
}

/// Looks on at a commit, and has the reactors follow.
struct Committing<'d> {
    disk: &'d mut Disk,
    pace: Pace<'d>,
    /// What guests read lies where it did.
    keep: bool,
}

impl Watch for Committing<'_> {
    fn at(&mut self, bytes: u64) -> Result<(), qcow::Error> {
        self.pace.at(bytes)
    }

    fn moves(&mut self, bytes: u64) -> Result<(), qcow::Error> {
        self.pace.moves(bytes)
    }

    fn switched(&mut self) -> Result<(), qcow::Error> {
        let keep = self.keep;
        let all = self.disk.numbers();
        // Opened in the pause, which cuts the file that is written to.
        let done = self.disk.paused(|disk| disk.restack(disk.open(&all)?, &all, keep));
        done.map_err(|e| qcow::Error::refused(self.disk.rest.name(), e.to_string()))
    }
}
