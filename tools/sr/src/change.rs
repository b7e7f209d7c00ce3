//! The operations on disks: each is one commit of the group.

use block::Storage;
use qcow::create::CreateOptions;
use qcow::open::Format;
use uuid::Uuid;
use volume::{Author, Id, Lv, Shape, Vg};

use crate::error::{Error, Result, refused};
use crate::fields::Fields;
use crate::images::backing;
use crate::repository::{NewImage, Repository};
use crate::state::{
    AT, BANDWIDTH, CBT, DEPTH, DESCRIPTION, Disk, IOPS, KEY, LARGEST, NAME, Node, ONTO, PARENT,
    READ_ONLY, SHARABLE, SIZE, State, THEIRS,
};

/// Bytes of a new volume at most: it grows with what is written.
const FIRST: u64 = 64 << 20;
/// Bytes of a stripe.
const STRIPE: u64 = 64 << 10;
/// Disks are a multiple of this: backup programs read changed blocks of 64 KiB by 32 at a time.
const ROUND: u64 = 2 << 20;

/// What a new disk shall be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NewDisk {
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// Bytes; rounded up to 2 MiB.
    pub size: u64,
    /// Several guests may have it at once.
    pub sharable: bool,
}

/// A change that put new volumes above a disk's: which it goes on in, and how to take it back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stacked {
    /// The key of what was made.
    pub key: String,
    /// The volume that the disk goes on in, if it is another one now.
    pub above: Option<String>,
    /// The disk's node as it was.
    before: Node,
    /// The volumes that were made.
    made: Vec<String>,
}

/// Which text of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Text {
    /// Its name.
    Name,
    /// Its description.
    Description,
}

/// How many bytes a disk of this size and its image's tables need at most, as long as there are no snapshots
/// inside the image.
pub fn most_bytes(size: u64) -> u64 {
    size.saturating_add(size / 512).saturating_add(4 << 20)
}

fn key() -> String {
    Uuid::new_v4().to_string()
}

/// A name for a logical volume.
pub(crate) fn lv_name() -> String {
    format!("pd-{}", Uuid::new_v4())
}

pub(crate) fn lv<'a>(vg: &'a mut Vg, name: &str) -> Result<&'a mut Lv> {
    let found = vg.lvs.iter_mut().find(|lv| lv.name == name);
    found.ok_or_else(|| Error::Group(volume::Error::NoVolume(name.to_owned())))
}

/// Writes what is known of a node into its volume's tags.
pub(crate) fn put(vg: &mut Vg, node: &Node) -> Result<()> {
    let mut fields = Fields::default();
    fields.set(SIZE, node.size.to_string());
    if let Some(parent) = &node.parent {
        fields.set(PARENT, &**parent);
    }
    if let Some(onto) = &node.onto {
        fields.set(ONTO, &**onto);
    }
    if let Some(record) = &node.record {
        fields.set(AT, record.at.as_deref().unwrap_or_default());
    }
    if let Some(disk) = &node.disk {
        fields.set(KEY, &*disk.key);
        fields.set(NAME, &*disk.name);
        fields.set(DESCRIPTION, &*disk.description);
        for (flag, is_set) in
            [(READ_ONLY, disk.read_only), (SHARABLE, disk.sharable), (CBT, disk.cbt)]
        {
            if is_set {
                fields.set(flag, "1");
            }
        }
        for (field, limit) in [(IOPS, disk.iops), (BANDWIDTH, disk.bandwidth)] {
            if limit > 0 {
                fields.set(field, limit.to_string());
            }
        }
        disk.keys.iter().for_each(|(k, v)| fields.set(&format!("{THEIRS}{k}"), &**v));
    }
    fields.write(&mut lv(vg, &node.lv)?.tags)
}

/// A node that nothing stands on, and those below that nobody needs without it.
fn alone<'s>(state: &'s State, node: &'s Node) -> impl Iterator<Item = &'s Node> {
    std::iter::successors(Some(node), |node| {
        let below = state.nodes.get(node.parent.as_ref()?)?;
        // Else it has a key, or others stand on it, too.
        (below.disk.is_none() && state.children(&below.lv) == 1).then_some(below)
    })
}

/// Takes a node away, and those below that nobody needs without it.
pub(crate) fn remove(vg: &mut Vg, state: &State, node: &Node) -> Result<()> {
    Ok(alone(state, node).try_for_each(|node| vg.remove_lv(&node.lv).map(drop))?)
}

impl<S: Storage> Repository<S> {
    /// Makes a disk. Returns its key.
    ///
    /// # Errors
    /// If there is no space, the size is 0 or too large, or a text is too long.
    pub fn create_disk(&mut self, new: &NewDisk, author: &Author) -> Result<String> {
        let size = Self::size_for(new.size)?;
        let disk = Disk {
            key: key(),
            name: new.name.clone(),
            description: new.description.clone(),
            read_only: false,
            sharable: new.sharable,
            cbt: false,
            iops: 0,
            bandwidth: 0,
            keys: std::collections::BTreeMap::new(),
        };
        let of = Some(disk.clone());
        let node =
            Node { lv: lv_name(), parent: None, onto: None, size, used: 0, disk: of, record: None };
        self.make(&format!("create {}", disk.key), &[node], author, |_| Ok(()))?;
        Ok(disk.key)
    }

    /// Makes new nodes with their images, and changes others in the same commit.
    fn make(
        &mut self,
        why: &str,
        nodes: &[Node],
        author: &Author,
        more: impl FnOnce(&mut Vg) -> Result<()>,
    ) -> Result<()> {
        let group = self.group().vg().name.clone();
        let images: Vec<NewImage> = nodes
            .iter()
            .map(|node| {
                let backing = node.parent.as_ref().map(|lv| backing(&group, lv));
                let backing = backing.map(|path| (path, Format::Qcow2));
                let options = CreateOptions { backing, ..CreateOptions::new(node.size) };
                NewImage { lv: node.lv.clone(), options, bitmap: None }
            })
            .collect();
        let deepest = nodes.iter().filter_map(|node| node.parent.as_ref());
        let deepest = deepest.map(|lv| self.state().chain(lv).count()).max().unwrap_or(0);
        if deepest >= DEPTH {
            return refused(format!(
                "{deepest} images would stand on each other, {DEPTH} are possible: delete snapshots"
            ));
        }
        let stripes = self.state().stripes;
        let stripe_size = if stripes > 1 { STRIPE / 512 } else { 0 };
        self.commit(author, why, &images, |vg| {
            for node in nodes {
                let extents = vg.extents_for(most_bytes(node.size).min(FIRST));
                let shape = Shape { stripes, stripe_size };
                let id =
                    Id::random().map_err(|e| Error::Refused(format!("random numbers: {e}")))?;
                vg.create_lv(id, &node.lv, extents, shape, author)?;
                put(vg, node)?;
            }
            // After the new ones, which must not have extents that are given back by this.
            more(vg)
        })
    }

    /// Makes a snapshot of a disk: what it is now, for reading. The disk goes on in a new volume on top.
    /// Of a snapshot another one is made.
    ///
    /// An image that a guest uses has to be told, or this be taken back ([`Repository::take_back`]).
    ///
    /// # Errors
    /// If there is no such disk, no space, or too many images would stand on each other.
    pub fn snapshot(&mut self, of: &str, author: &Author) -> Result<Stacked> {
        let (disk, node) = self.with_data(of)?;
        let copy = Disk { key: key(), read_only: true, keys: Default::default(), ..disk.clone() };
        let why = format!("snapshot {of}");
        let key = copy.key.clone();
        let above = Node { lv: lv_name(), parent: Some(node.lv.clone()), ..node.clone() };
        let (before, made) = (node.clone(), vec![above.lv.clone()]);
        let mut stacked = Stacked { key, above: None, before, made };
        if disk.read_only {
            self.make(&why, &[Node { disk: Some(copy), ..above }], author, |_| Ok(()))?;
        } else {
            stacked.above = Some(above.lv.clone());
            let frozen = Node { disk: Some(copy), ..node };
            self.make(&why, &[above], author, |vg| put(vg, &frozen))?;
        }
        Ok(stacked)
    }

    /// Makes a disk that begins as another one, or a snapshot, is now.
    ///
    /// # Errors
    /// As [`Repository::snapshot`].
    pub fn clone_disk(&mut self, of: &str, author: &Author) -> Result<Stacked> {
        let (disk, node) = self.with_data(of)?;
        let keys = Default::default();
        let copy = Disk { key: key(), read_only: false, cbt: false, keys, ..disk.clone() };
        let why = format!("clone {of}");
        let key = copy.key.clone();
        let above =
            |disk| Node { lv: lv_name(), parent: Some(node.lv.clone()), disk, ..node.clone() };
        let mut stacked = Stacked { key, above: None, before: node.clone(), made: Vec::new() };
        if disk.read_only {
            let new = above(Some(copy));
            stacked.made.push(new.lv.clone());
            self.make(&why, &[new], author, |_| Ok(()))?;
        } else {
            let nodes = [above(Some(disk)), above(Some(copy))];
            stacked.made.extend(nodes.iter().map(|node| node.lv.clone()));
            stacked.above = Some(nodes[0].lv.clone());
            let hidden = Node { disk: None, ..node.clone() };
            self.make(&why, &nodes, author, |vg| put(vg, &hidden))?;
        }
        Ok(stacked)
    }

    /// Takes a snapshot or clone back that was made last of all, as if it had not been.
    ///
    /// # Errors
    /// If a device fails.
    pub fn take_back(&mut self, stacked: &Stacked, author: &Author) -> Result<()> {
        self.commit(author, &format!("take back {}", stacked.key), &[], |vg| {
            stacked.made.iter().try_for_each(|lv| vg.remove_lv(lv).map(drop))?;
            put(vg, &stacked.before)
        })
    }

    /// Notes that a disk has another size: its image has it already.
    ///
    /// # Errors
    /// If there is no such disk, or a device fails.
    pub fn resized(&mut self, of: &str, size: u64, author: &Author) -> Result<()> {
        let (_, node) = self.known(of)?;
        let node = Node { size, ..node };
        self.commit(author, &format!("size of {of}"), &[], |vg| put(vg, &node))
    }

    /// The size that a disk gets if it shall have so many bytes.
    ///
    /// # Errors
    /// If no disk can have it.
    pub fn size_for(size: u64) -> Result<u64> {
        let rounded =
            size.checked_next_multiple_of(ROUND).filter(|size| (1..=LARGEST).contains(size));
        match rounded {
            Some(size) => Ok(size),
            None => refused(format!("a disk of {size} bytes: 1 byte to 1 PiB are possible")),
        }
    }

    /// Makes a disk again what a snapshot is; what was written since is lost.
    ///
    /// # Errors
    /// As [`Repository::snapshot`]; if the one is no snapshot or the other one.
    pub fn revert(&mut self, snapshot: &str, to: &str, author: &Author) -> Result<()> {
        let (taken, below) = self.with_data(snapshot)?;
        let (disk, node) = self.known(to)?;
        if !taken.read_only || disk.read_only {
            return refused(format!(
                "{to} cannot become what {snapshot} is: a snapshot is for reading"
            ));
        }
        let (parent, disk) = (Some(below.lv.clone()), Some(disk));
        let new = Node {
            lv: lv_name(),
            parent,
            onto: None,
            size: below.size,
            used: 0,
            disk,
            record: None,
        };
        let state = self.state().clone();
        self.make(&format!("revert {to} to {snapshot}"), &[new], author, |vg| {
            if state.children(&node.lv) > 0 {
                return put(vg, &Node { disk: None, ..node });
            }
            remove(vg, &state, &node)
        })
    }

    /// The volumes that go if this disk is taken away or becomes another.
    ///
    /// # Errors
    /// If there is none.
    pub fn goes_with(&self, key: &str) -> Result<Vec<&Node>> {
        let (_, node) = self.disk(key)?;
        match self.state().children(&node.lv) {
            0 => Ok(alone(self.state(), node).collect()),
            _ => Ok(Vec::new()),
        }
    }

    /// Takes a disk or snapshot away. What others stand on stays, hidden.
    ///
    /// # Errors
    /// If there is none.
    pub fn destroy(&mut self, key: &str, author: &Author) -> Result<()> {
        let node = self.disk(key)?.1.clone();
        let state = self.state().clone();
        self.commit(author, &format!("destroy {key}"), &[], |vg| {
            if state.children(&node.lv) > 0 {
                return put(vg, &Node { disk: None, ..node });
            }
            remove(vg, &state, &node)
        })
    }

    /// Sets one of the toolstack's keys of a disk, or takes it away.
    ///
    /// # Errors
    /// If there is no such disk, or there is no room for it.
    pub fn set_key(&mut self, of: &str, k: &str, v: Option<&str>, author: &Author) -> Result<()> {
        self.change(of, "a key", author, |disk| {
            match v {
                Some(v) => drop(disk.keys.insert(k.to_owned(), v.to_owned())),
                None => drop(disk.keys.remove(k)),
            };
        })
    }

    /// Notes how much a disk takes in a second; 0: as much as comes.
    ///
    /// # Errors
    /// If there is no such disk, or no room for it.
    pub fn set_limits(
        &mut self,
        of: &str,
        iops: u64,
        bandwidth: u64,
        author: &Author,
    ) -> Result<()> {
        self.change(of, "limits", author, |disk| {
            (disk.iops, disk.bandwidth) = (iops, bandwidth);
        })
    }

    /// Changes a text of a disk.
    ///
    /// # Errors
    /// If there is no such disk, or the text is too long.
    pub fn set_text(&mut self, of: &str, which: Text, text: &str, author: &Author) -> Result<()> {
        self.change(of, "a text", author, |disk| match which {
            Text::Name => text.clone_into(&mut disk.name),
            Text::Description => text.clone_into(&mut disk.description),
        })
    }

    pub(crate) fn change(
        &mut self,
        of: &str,
        what: &str,
        author: &Author,
        edit: impl FnOnce(&mut Disk),
    ) -> Result<()> {
        let (mut disk, node) = self.known(of)?;
        let before = disk.clone();
        edit(&mut disk);
        if disk == before {
            return Ok(());
        }
        let node = Node { disk: Some(disk), ..node };
        self.commit(author, &format!("{what} of {of}"), &[], |vg| put(vg, &node))
    }

    /// Makes a node's volume larger, by at least so many bytes and in steps that grow with it.
    ///
    /// # Errors
    /// If there is no such node, or no space.
    pub fn grow(&mut self, of: &str, more: u64, author: &Author) -> Result<()> {
        if !self.state().nodes.contains_key(of) {
            return refused(format!("no image is in {of}"));
        }
        self.commit(author, &format!("grow {of}"), &[], |vg| {
            let extents = vg.extents_for(more);
            vg.grow_lv(of, extents)?;
            Ok(())
        })
    }

    /// A disk and its node, to be changed.
    pub(crate) fn known(&self, key: &str) -> Result<(Disk, Node)> {
        let (disk, node) = self.disk(key)?;
        if self.is_pending(key)? {
            return refused(format!(
                "{key} was being put on another disk, which failed: detach and attach the repository"
            ));
        }
        Ok((disk.clone(), node.clone()))
    }

    /// The same of one that is more than a record.
    pub(crate) fn with_data(&self, key: &str) -> Result<(Disk, Node)> {
        let (disk, node) = self.known(key)?;
        match node.record {
            None => Ok((disk, node)),
            Some(_) => refused(format!("the data of {key} was destroyed")),
        }
    }
}
