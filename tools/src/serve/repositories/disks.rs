//! The methods of disks and snapshots: `Volume.*`.
//!
//! Locks are taken in this order: a running disk, its repository, the group's devices.

use std::time::Duration;

use node::{Disk as Running, Member};
use qcow::ChainReader;
use qcow::open::{ImageMeta, Mode};
use serde::Deserialize;
use serde_json::{Value, json};
use sr::{Disk, NewDisk, Node, Repository, Stacked, Text};

use super::attached::Attached;
use super::fault::Fault;
use super::place::volume_owner;
use super::{Repositories, TYPE, author, parse};
use crate::ctl::Held;
use crate::serve::images::Images;

/// How often, and how long after each other, a disk is looked for that is being opened or closed.
const LOOKS: u32 = 1000;
const LOOK: Duration = Duration::from_millis(10);

#[derive(Deserialize)]
struct Create {
    sr: String,
    name: String,
    description: String,
    size: u64,
    sharable: bool,
}

/// Arguments of all other methods.
#[derive(Deserialize)]
struct Args {
    sr: String,
    key: String,
    /// Of a revert.
    snapshot: Option<String>,
    /// Of what is composed: what the other one shall stand on.
    key2: Option<String>,
    k: Option<String>,
    v: Option<String>,
    new_name: Option<String>,
    new_description: Option<String>,
    new_size: Option<u64>,
}

/// What is said of a disk.
pub(super) fn answer(sr: &str, disk: &Disk, node: &Node) -> Value {
    json!({
        "key": disk.key,
        "uuid": disk.key,
        "name": disk.name,
        "description": disk.description,
        "read_write": !disk.read_only,
        "sharable": disk.sharable,
        "virtual_size": node.size,
        "physical_utilisation": node.used,
        "uri": [format!("{TYPE}://{sr}/{}", disk.key)],
        "keys": disk.keys,
        "volume_type": [if node.record.is_some() { "CBT_Metadata" } else { "Data" }, null],
        "cbt_enabled": disk.cbt,
    })
}

fn wanted<'a, T>(value: &'a Option<T>, name: &str) -> Result<&'a T, Fault> {
    value.as_ref().ok_or_else(|| Fault::other(format!("arguments: `{name}` is missing")))
}

impl Repositories {
    pub(super) fn of_disk(
        &self,
        images: &Images,
        method: &str,
        args: &Value,
    ) -> Result<Value, Fault> {
        let author = author();
        if method == "create" {
            let args: Create = parse(args)?;
            let attached = self.attached(&args.sr)?;
            let mut repository = attached.repository.lock();
            let Create { sr, name, description, size, sharable } = args;
            let key =
                repository.create_disk(&NewDisk { name, description, size, sharable }, &author)?;
            let (disk, node) = repository.disk(&key)?;
            return Ok(answer(&sr, disk, node));
        }
        if method == "list_changed_blocks" {
            return self.list_changed(images, args);
        }
        let args: Args = parse(args)?;
        let attached = self.attached(&args.sr)?;
        // Later the image may be in use by others, or have another shape.
        let changed: &[Option<&String>] = match method {
            "snapshot" | "clone" | "resize" => &[Some(&args.key)],
            "compose" => &[Some(&args.key), args.key2.as_ref()],
            _ => &[],
        };
        for &key in changed.iter().flatten() {
            let all = images.put_in(&self.wanted(&self.place(&args.sr, key)?)?);
            // Below a snapshot it can be put in later, unless that was compared already.
            let later = method == "snapshot" && !attached.repository.lock().disk(key)?.0.cbt;
            if !all && !later {
                return Err(Fault::not_put_in(key));
            }
        }
        let with_disk =
            |touches, f: &mut Change<'_>| with_disk(images, &attached, &args, touches, f);
        match method {
            "stat" => {
                let repository = attached.repository.lock();
                let (disk, node) = repository.disk(&args.key)?;
                return Ok(answer(&args.sr, disk, node));
            }
            "snapshot" | "clone" => {
                if method == "snapshot" {
                    // So the toolstack ends a migration that is called off: it says nothing else.
                    self.mirrors.stop(&format!("{}/{}", args.sr, args.key));
                }
                let mut made = Value::Null;
                with_disk(Touches::Top, &mut |repository, running| {
                    note_size(repository, running.as_deref(), &args.key)?;
                    let stacked = match method {
                        "snapshot" => repository.snapshot(&args.key, &author)?,
                        _ => repository.clone_disk(&args.key, &author)?,
                    };
                    go_on(&attached, repository, running, &stacked)?;
                    let (disk, node) = repository.disk(&stacked.key)?;
                    made = answer(&args.sr, disk, node);
                    Ok(())
                })?;
                return Ok(made);
            }
            "destroy" => {
                let gone = with_disk(Touches::All, &mut |repository, running| {
                    if running.is_some() {
                        return Err(Fault::in_use(&args.key));
                    }
                    Ok(repository.destroy(&args.key, &author)?)
                });
                match gone {
                    Ok(()) => attached.repository.lock().discard(),
                    // The toolstack destroys some twice.
                    Err(fault) if fault.is_no_disk() => {}
                    Err(fault) => return Err(fault),
                }
            }
            "data_destroy" => {
                with_disk(Touches::All, &mut |repository, running| {
                    if running.is_some() {
                        return Err(Fault::in_use(&args.key));
                    }
                    Ok(repository.destroy_data(&args.key, &author)?)
                })?;
                attached.repository.lock().discard();
            }
            "revert" => {
                let snapshot = wanted(&args.snapshot, "snapshot")?;
                with_disk(Touches::All, &mut |repository, running| {
                    if running.is_some() {
                        return Err(Fault::in_use(&args.key));
                    }
                    Ok(repository.revert(snapshot, &args.key, &author)?)
                })?;
                attached.repository.lock().discard();
            }
            "compose" => {
                let below = wanted(&args.key2, "key2")?;
                with_disk(Touches::With(below), &mut |repository, running| {
                    if running.is_some() {
                        return Err(Fault::in_use(&args.key));
                    }
                    Ok(repository.compose(&args.key, below, &author)?)
                })?;
                attached.repository.lock().discard();
            }
            "resize" => {
                let size = *wanted(&args.new_size, "new_size")?;
                if self.mirrors.is_mirrored(&format!("{}/{}", args.sr, args.key)) {
                    let why = "the disk is being copied elsewhere (Data.mirror): try again when that has ended";
                    return Err(Fault::cannot_resize(why.to_owned()));
                }
                with_disk(Touches::Top, &mut |repository, running| {
                    resize(&attached, repository, running, &args.key, size)
                })?;
            }
            _ => return set(&attached, method, &args),
        }
        Ok(Value::Null)
    }
}

/// What is done to a repository and to a disk of it, if that runs.
type Change<'a> =
    dyn FnMut(&mut Repository<Member>, Option<&mut Running>) -> Result<(), Fault> + 'a;

/// What a change does to the volumes that are there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Touches<'a> {
    /// The disk's own, if it is one for writing, is not written to any more, or by us.
    Top,
    /// What nobody needs without the disk goes.
    All,
    /// All that the disk stands on, and what this disk is.
    With(&'a str),
}

/// Changes a disk, which nobody opens or closes meanwhile.
fn with_disk(
    images: &Images,
    attached: &Attached,
    args: &Args,
    touches: Touches<'_>,
    f: &mut Change<'_>,
) -> Result<(), Fault> {
    let name = format!("{}/{}", args.sr, args.key);
    for _ in 0..LOOKS {
        // `Err`: it ends.
        if let Ok(mut running) = images.changes(&name).map(|c| c.hold()).transpose() {
            let mut repository = attached.repository.lock();
            let (disk, node) = repository.disk(&args.key)?;
            let touched = match touches {
                Touches::All => repository.goes_with(&args.key)?,
                Touches::With(other) => {
                    let mut all = repository.chain(&args.key)?;
                    all.push(repository.disk(other)?.1);
                    all
                }
                Touches::Top if disk.read_only => Vec::new(),
                Touches::Top => vec![node],
            };
            let vg = repository.group().vg();
            let is_used =
                |node: &&Node| vg.lv(&node.lv).is_ok_and(|lv| attached.devices.uses(lv.id) > 0);
            let volumes: Vec<String> = touched.iter().map(|node| node.lv.clone()).collect();
            // If it does not run somebody opens or closes it, or merges it.
            if running.is_some() || (!touched.iter().any(is_used) && !attached.interrupt(&volumes))
            {
                return f(&mut repository, running.as_mut().map(Held::disk));
            }
            attached.interrupt(&volumes);
        }
        std::thread::sleep(LOOK);
    }
    Err(Fault::in_use(&args.key))
}

/// Has a running disk go on in the volume that was put above its one.
fn go_on(
    attached: &Attached,
    repository: &mut Repository<Member>,
    running: Option<&mut Running>,
    stacked: &Stacked,
) -> Result<(), Fault> {
    let (Some(running), Some(above)) = (running, &stacked.above) else { return Ok(()) };
    let group = repository.group();
    let owner = volume_owner(&group.vg().lv(above).map_err(sr::Error::from)?.id);
    let done = attached.devices.volume(group, above, true).and_then(|overlay| {
        let name = format!("{}/{above}", group.vg().name);
        running.snapshot_onto(overlay, &name)
    });
    if done.is_ok() {
        // Before another one is made: the uppermost volume may be none of the journal's then.
        return Ok(running.journal_is_of(owner)?);
    }
    done.map_err(|e| {
        if let Err(again) = repository.take_back(stacked, &author()) {
            // The guest goes on below. Nothing is lost: whoever opens the disk next sees all of it.
            log::error!("{}: {again}: what was made stays, and is no snapshot", stacked.key);
        }
        Fault::from(e)
    })
}

/// The repository may not know of a disk's last size: it failed in the moment after the image had that. What is put
/// above must be as large.
fn note_size(
    repository: &mut Repository<Member>,
    running: Option<&Running>,
    key: &str,
) -> Result<(), Fault> {
    let (disk, node) = repository.disk(key)?;
    let (read_only, known, lv) = (disk.read_only, node.size, node.lv.clone());
    let size = match running {
        _ if read_only => known,
        Some(running) => running.info().size,
        None => {
            let image = ImageMeta::open(&mut repository.storage(&lv)?, &lv, Mode::Read);
            image.map_err(sr::Error::from)?.geometry.size()
        }
    };
    match size > known {
        true => Ok(repository.resized(key, size, &author())?),
        false => Ok(()),
    }
}

/// Makes a disk larger, whether it runs or not.
fn resize(
    attached: &Attached,
    repository: &mut Repository<Member>,
    running: Option<&mut Running>,
    key: &str,
    size: u64,
) -> Result<(), Fault> {
    let size = Repository::<Member>::size_for(size)?;
    let (disk, node) = repository.disk(key)?;
    // More than the repository knows of, if it could not be told the last time.
    let has = running.as_ref().map_or(0, |running| running.info().size).max(node.size);
    if disk.read_only || size < has {
        let why = match disk.read_only {
            true => "a snapshot stays as it is".to_owned(),
            false => format!("a disk of {has} bytes cannot become smaller ({size})"),
        };
        return Err(Fault::cannot_resize(why));
    }
    if size == node.size {
        return Ok(());
    }
    let lv = node.lv.clone();
    // The image first: of what the toolstack is told all is there.
    match running {
        Some(running) => running.resize(size)?,
        None => {
            let storage = attached.devices.volume(repository.group(), &lv, true)?;
            let opened = qcow::open::Opened { storage, path: None, name: lv.clone(), id: None };
            let options = qcow::open::ChainOptions {
                format: Some(qcow::open::Format::Qcow2),
                top_only: true,
                ..Default::default()
            };
            let none = &mut |b: &qcow::open::BackingRef| {
                Err(qcow::Error::refused(&b.named_by, "stays closed"))
            };
            let chain = node::Chain::open(opened, options, none).map_err(node::Error::from)?;
            let mut reader = ChainReader::new(chain);
            qcow::edit::resize(&mut reader, size).map_err(node::Error::from)?;
        }
    }
    Ok(repository.resized(key, size, &author())?)
}

/// What the toolstack, or people, know a disk by.
fn set(attached: &Attached, method: &str, args: &Args) -> Result<Value, Fault> {
    let author = author();
    let mut repository = attached.repository.lock();
    match method {
        "set" => {
            let (k, v) = (wanted(&args.k, "k")?, wanted(&args.v, "v")?);
            repository.set_key(&args.key, k, Some(v), &author)?;
        }
        "enable_cbt" | "disable_cbt" => {
            repository.track(&args.key, method == "enable_cbt", &author)?;
        }
        "unset" => repository.set_key(&args.key, wanted(&args.k, "k")?, None, &author)?,
        "set_name" => {
            let name = wanted(&args.new_name, "new_name")?;
            repository.set_text(&args.key, Text::Name, name, &author)?;
        }
        "set_description" => {
            let text = wanted(&args.new_description, "new_description")?;
            repository.set_text(&args.key, Text::Description, text, &author)?;
        }
        _ => return Err(Fault::unimplemented(&format!("Volume.{method}"))),
    }
    Ok(Value::Null)
}
