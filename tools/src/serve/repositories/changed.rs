//! Changed blocks: `Volume.list_changed_blocks`, and bitmaps for NBD clients. See [`sr::changed`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use node::{Disk as Running, Member};
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

/// Reads all that a difference says.
fn read(
    attached: &Attached,
    repository: &Repository<Member>,
    difference: &Difference,
    (offset, len): (u64, u64),
    running: Option<(&mut Running, &str)>,
) -> Result<Blocks, Fault> {
    let mut blocks = Blocks::new(difference, offset, len)?;
    let open = |lv: &str| attached.devices.volume(repository.group(), lv, false);
    let mut images = difference.images.clone();
    if let Some((running, top)) = running {
        images.retain(|lv| lv != top);
        running.at_rest(|reader| blocks.add_held(reader))?;
    }
    for lv in &images {
        blocks.add_image(open(lv)?, lv)?;
    }
    for lv in &difference.records {
        blocks.add_record(&mut open(lv)?, lv)?;
    }
    Ok(blocks)
}

/// In which blocks of a range of `to` it differs from `from`. `images`: those that are open, if `to` may be written
/// to.
fn changed(
    images: Option<&Images>,
    attached: &Attached,
    (sr, from, to): (&str, &str, &str),
    range: (u64, u64),
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
                let top = node.lv.as_str();
                let running = running.as_mut().map(|held| (held.disk(), top));
                return read(attached, &repository, &difference, range, running);
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

/// Blocks as a bitmap.
struct Shown(Blocks);

impl ::nbd::Bitmap for Shown {
    fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        self.0.run(offset, most)
    }
}

/// The blocks of a snapshot that have changed since others: a bitmap for each of those, by its key.
struct Since {
    repositories: Arc<Repositories>,
    place: DiskPlace,
    keep: Arc<Keep>,
    /// What was asked for last: several connections ask for the same.
    last: Mutex<Option<(String, Arc<Shown>)>>,
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
        if let Some((_, blocks)) = last.as_ref().filter(|(from, _)| from == name) {
            return Some(blocks.clone());
        }
        match self.read(name) {
            Ok(blocks) => {
                let blocks = Arc::new(Shown(blocks));
                *last = Some((name.to_owned(), blocks.clone()));
                Some(blocks)
            }
            Err(fault) => {
                log::info!("a bitmap for a client: {fault}");
                None
            }
        }
    }
}
