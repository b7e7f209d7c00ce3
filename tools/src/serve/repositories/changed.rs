//! Changed blocks: `Volume.list_changed_blocks`, and bitmaps for NBD clients. See [`sr::changed`].

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use node::{Disk as Running, Member, Source};
use reactor::sync::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use sr::changed::BLOCK;
use sr::{Blocks, Difference, Repository};

use super::attached::Attached;
use super::fault::Fault;
use super::place::DiskPlace;
use super::{Repositories, parse};
use crate::serve::images::Images;
use crate::serve::keep::Keep;

/// How often, and how long after each other, a disk is looked for that is being opened, closed or merged.
const LOOKS: u32 = 1000;
const LOOK: Duration = Duration::from_millis(10);

#[derive(Deserialize)]
struct Args {
    sr: String,
    /// From this one.
    key: String,
    /// To this one.
    key2: String,
    offset: i64,
    length: i64,
}

/// Bytes of all bitmaps for NBD clients together, at most: room for three of the largest, or for those of hundreds
/// of ordinary disks.
const BITMAPS: usize = 128 << 20;

/// The volumes that a difference is read from. While they are open no merge changes them.
struct Opened {
    images: Vec<(String, Source)>,
    records: Vec<(String, Source)>,
}

impl Opened {
    /// Opens them, but for the uppermost one of a disk that runs.
    fn open(
        attached: &Attached,
        repository: &Repository<Member>,
        difference: &Difference,
        running: Option<&str>,
    ) -> Result<Opened, Fault> {
        let open = |lvs: &[String]| {
            let others = lvs.iter().filter(|lv| Some(lv.as_str()) != running);
            let opened = others.map(|lv| {
                Ok((lv.clone(), attached.devices.volume(repository.group(), lv, false)?))
            });
            opened.collect::<Result<Vec<_>, Fault>>()
        };
        Ok(Opened { images: open(&difference.images)?, records: open(&difference.records)? })
    }

    /// Reads all that they say of a difference, and what the running disk holds by itself.
    fn read(self, mut blocks: Blocks, running: Option<&mut Running>) -> Result<Blocks, Fault> {
        running.map(|disk| disk.at_rest(|reader| blocks.add_held(reader))).transpose()?;
        for (lv, image) in self.images {
            blocks.add_image(image, &lv)?;
        }
        for (lv, mut record) in self.records {
            blocks.add_record(&mut record, &lv)?;
        }
        Ok(blocks)
    }
}

/// In which blocks of a range of `to` it differs from `from`. `images`: those that are open, if `to` may be written
/// to.
fn changed(
    images: Option<&Images>,
    attached: &Attached,
    (sr, from, to): (&str, &str, &str),
    (offset, len): (u64, u64),
) -> Result<Blocks, Fault> {
    for _ in 0..LOOKS {
        let is_snapshot = attached.repository.lock().disk(to)?.0.read_only;
        let open = images.filter(|_| !is_snapshot).and_then(|i| i.changes(&format!("{sr}/{to}")));
        // `Err`: it ends.
        if let Ok(mut running) = open.map(|changes| changes.hold()).transpose() {
            let repository = attached.repository.lock();
            let difference = repository.difference(from, to)?;
            let (disk, node) = repository.disk(to)?;
            if !disk.read_only && images.is_none() {
                return Err(Fault::in_use(to));
            }
            let top = repository.group().vg().lv(&node.lv).map_err(sr::Error::from)?.id;
            // If it does not run somebody opens or closes it, or merges it.
            let waits = !disk.read_only && running.is_none() && attached.devices.uses(top) > 0;
            if !attached.interrupt(&difference.images) && !waits {
                let blocks = Blocks::new(&difference, offset, len)?;
                let top = running.as_ref().map(|_| node.lv.as_str());
                let opened = Opened::open(attached, &repository, &difference, top)?;
                // Other disks grow meanwhile.
                drop(repository);
                return opened.read(blocks, running.as_mut().map(|held| held.disk()));
            }
        }
        std::thread::sleep(LOOK);
    }
    Err(Fault::in_use(to))
}

/// The disks that are written to above images of a difference. What a daemon that died was to write belongs into
/// these images, also into one that has become a snapshot's in the moment when it died.
fn written(repository: &Repository<Member>, difference: &Difference) -> BTreeSet<String> {
    let over = difference.images.iter().flat_map(|lv| repository.over(lv));
    let disks = over.filter(|key| repository.disk(key).is_ok_and(|(disk, _)| !disk.read_only));
    disks.map(str::to_owned).collect()
}

impl Repositories {
    /// `Volume.list_changed_blocks`.
    pub(super) fn list_changed(&self, images: &Images, args: &Value) -> Result<Value, Fault> {
        let args: Args = parse(args)?;
        let attached = self.attached(&args.sr)?;
        let (sr, from, to) = (&*args.sr, &*args.key, &*args.key2);
        let whole = args.length == -1;
        let range = (u64::try_from(args.offset), u64::try_from(args.length));
        let range = match range {
            (Ok(offset), _) if whole => (offset, u64::MAX),
            (Ok(offset), Ok(len)) => (offset, len),
            _ => {
                return Err(Fault::other("arguments: `offset` or `length` is negative".to_owned()));
            }
        };
        let disks = {
            let repository = attached.repository.lock();
            written(&repository, &repository.difference(from, to)?)
        };
        for key in disks {
            if !images.put_in(&self.wanted(&self.place(sr, &key)?)?) {
                return Err(Fault::not_put_in(&key));
            }
        }
        let blocks = changed(Some(images), &attached, (sr, from, to), range)?;
        Ok(json!({"granularity": BLOCK, "bitmap": STANDARD.encode(blocks.bytes())}))
    }

    /// What NBD clients are told of a snapshot's changes; `None`: it is no snapshot.
    pub(crate) fn bitmaps(
        self: &Arc<Self>,
        place: &super::Place,
        keep: &Arc<Keep>,
    ) -> anyhow::Result<Option<Box<dyn ::nbd::Bitmaps>>> {
        let super::Place::Disk(place) = place else { return Ok(None) };
        let attached = self.of_place(place)?;
        if !attached.repository.lock().disk(&place.key)?.0.read_only {
            return Ok(None);
        }
        let (repositories, place, keep) = (self.clone(), place.clone(), keep.clone());
        Ok(Some(Box::new(Since { repositories, place, keep, last: Mutex::default() })))
    }
}

/// How much memory bitmaps for clients take.
#[derive(Default)]
pub(super) struct Budget(AtomicUsize);

impl Budget {
    /// Takes so many bytes, if they are there.
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Taken> {
        let add = |taken: usize| taken.checked_add(bytes).filter(|&sum| sum <= BITMAPS);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(Taken { budget: self.clone(), bytes })
    }
}

/// Given back when dropped.
struct Taken {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Blocks as a bitmap.
struct Shown {
    blocks: Blocks,
    _taken: Taken,
}

impl ::nbd::Bitmap for Shown {
    fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        self.blocks.run(offset, most)
    }
}

/// The blocks of a snapshot that have changed since others: a bitmap for each of those, by its key.
struct Since {
    repositories: Arc<Repositories>,
    place: DiskPlace,
    keep: Arc<Keep>,
    /// What was asked for last, while a client has it: several connections ask for the same.
    last: Mutex<Option<(String, Weak<Shown>)>>,
}

impl Since {
    fn read(&self, from: &str) -> Result<Blocks, Fault> {
        let DiskPlace { sr, key, .. } = &self.place;
        let attached =
            self.repositories.at_hand(sr).ok_or_else(|| Fault::of("Sr_not_attached", sr))?;
        {
            let repository = attached.repository.lock();
            for disk in written(&repository, &repository.difference(from, key)?) {
                let (_, node) = repository.disk(&disk)?;
                let top = repository.group().vg().lv(&node.lv).map_err(sr::Error::from)?.id;
                // Whoever opened it has put in what there was.
                if attached.devices.uses(top) == 0 && self.keep.has_changes(&format!("{sr}/{disk}"))
                {
                    return Err(Fault::not_put_in(&disk));
                }
            }
        }
        changed(None, &attached, (sr, from, key), (0, u64::MAX))
    }
}

impl ::nbd::Bitmaps for Since {
    fn names(&self) -> Vec<String> {
        let Some(attached) = self.repositories.at_hand(&self.place.sr) else { return Vec::new() };
        let repository = attached.repository.lock();
        let all = repository.list().map(|(disk, _)| disk.key.clone());
        all.filter(|from| repository.difference(from, &self.place.key).is_ok()).collect()
    }

    fn open(&self, name: &str) -> Option<Arc<dyn ::nbd::Bitmap>> {
        let mut last = self.last.lock();
        if let Some((from, blocks)) = last.as_ref()
            && from == name
            && let Some(blocks) = blocks.upgrade()
        {
            return Some(blocks);
        }
        let shown = self.read(name).and_then(|blocks| {
            let taken = self.repositories.bitmaps.take(blocks.bytes().len());
            let why = || Fault::other(format!("others take {BITMAPS} bytes for theirs"));
            Ok(Arc::new(Shown { blocks, _taken: taken.ok_or_else(why)? }))
        });
        match shown {
            Ok(shown) => {
                *last = Some((name.to_owned(), Arc::downgrade(&shown)));
                Some(shown)
            }
            Err(fault) => {
                log::info!("a bitmap for a client: {fault}");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_have_so_much_memory_and_no_more() {
        let budget = Arc::new(Budget::default());
        let first = budget.take(BITMAPS - 1).unwrap();
        assert!(budget.take(2).is_none() && budget.take(usize::MAX).is_none());
        let second = budget.take(1).unwrap();
        assert!(budget.take(1).is_none());
        drop(first);
        assert!(budget.take(BITMAPS - 1).is_some());
        drop(second);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }
}
