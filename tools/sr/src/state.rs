//! [`State`]: what a group's tags say of a repository, checked.

use std::collections::{BTreeMap, BTreeSet};

use volume::{Lv, Vg};

use crate::error::{Error, Result, corrupt};
use crate::fields::Fields;

/// Bytes of a disk at most.
pub(crate) const LARGEST: u64 = 1 << 50;

/// Images on top of each other at most: what has to be opened for the uppermost.
pub(crate) const DEPTH: usize = 200;

// Names of fields. Of the group:
pub(crate) const SR: &str = "sr";
pub(crate) const STRIPES: &str = "stripes";
// Of both:
pub(crate) const NAME: &str = "name";
pub(crate) const DESCRIPTION: &str = "description";
// Of a volume:
pub(crate) const KEY: &str = "key";
pub(crate) const PARENT: &str = "parent";
pub(crate) const SIZE: &str = "size";
pub(crate) const READ_ONLY: &str = "ro";
pub(crate) const SHARABLE: &str = "sharable";
pub(crate) const IOPS: &str = "iops";
pub(crate) const BANDWIDTH: &str = "bandwidth";
pub(crate) const CBT: &str = "cbt";
pub(crate) const AT: &str = "at";
pub(crate) const ONTO: &str = "onto";
/// What the names of the toolstack's own keys begin with.
pub(crate) const THEIRS: &str = "k.";

/// An image in a logical volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Name of the logical volume; never changes.
    pub lv: String,
    /// The node that its backing file is.
    pub parent: Option<String>,
    /// Bytes of the disk in it.
    pub size: u64,
    /// Bytes of the logical volume.
    pub used: u64,
    /// The node that its backing file is going to be instead: [`Repository::finish`](crate::Repository::finish).
    pub onto: Option<String>,
    /// The disk whose it is; `None`: several have it in common.
    pub disk: Option<Disk>,
    /// If it holds no data, but says what is known of a snapshot whose data was destroyed.
    pub record: Option<Record>,
}

/// What was a snapshot ([`crate::changed`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// The node that shows what the snapshot showed, but for the blocks whose bits are set in the record's bitmap.
    /// `None`, or one that is not there: nothing shows that any more.
    pub at: Option<String>,
}

/// A disk or snapshot, as the toolstack knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// A UUID.
    pub key: String,
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// Not to be written to: a snapshot.
    pub read_only: bool,
    /// Several guests may have it at once.
    pub sharable: bool,
    /// What changes in it is told of ([`crate::changed`]).
    pub cbt: bool,
    /// Requests that it takes in a second; 0: as many as come.
    pub iops: u64,
    /// Bytes that it reads and writes in a second; 0: as many as come.
    pub bandwidth: u64,
    /// The toolstack's own, kept as they are.
    pub keys: BTreeMap<String, String>,
}

/// All of a repository.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct State {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) stripes: u32,
    /// By name of their volume.
    pub(crate) nodes: BTreeMap<String, Node>,
    /// The node of each disk.
    pub(crate) disks: BTreeMap<String, String>,
}

fn number(fields: &Fields, name: &str, of: &str) -> Result<u64> {
    match fields.get(name).and_then(|text| text.parse().ok()) {
        Some(number) => Ok(number),
        None => corrupt(format!("{of} has no tag pd:{name} with a number")),
    }
}

fn node(vg: &Vg, lv: &Lv) -> Result<Option<Node>> {
    let fields = Fields::read(&lv.tags)?;
    if fields.is_empty() {
        // Somebody else's volume in the same group.
        return Ok(None);
    }
    let size = number(&fields, SIZE, &lv.name)?;
    if !size.is_multiple_of(512) || !(512..=LARGEST).contains(&size) {
        return corrupt(format!("{} has the tag pd:size={size}, which no disk has", lv.name));
    }
    let text = |name| fields.get(name).unwrap_or_default().to_owned();
    let limit = |name| fields.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    let disk = fields.get(KEY).map(|key| Disk {
        key: key.to_owned(),
        name: text(NAME),
        description: text(DESCRIPTION),
        read_only: fields.get(READ_ONLY).is_some(),
        sharable: fields.get(SHARABLE).is_some(),
        cbt: fields.get(CBT).is_some(),
        iops: limit(IOPS),
        bandwidth: limit(BANDWIDTH),
        keys: fields.beginning(THEIRS).map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
    });
    let at = |at: &str| Record { at: Some(at.to_owned()).filter(|at| !at.is_empty()) };
    let record = fields.get(AT).map(at);
    let parent = fields.get(PARENT).map(str::to_owned);
    let is_snapshot = disk.as_ref().is_some_and(|disk| disk.read_only && disk.cbt);
    if record.is_some() && (parent.is_some() || !is_snapshot) {
        return corrupt(format!("{} has the tag pd:at, but was no snapshot", lv.name));
    }
    Ok(Some(Node {
        lv: lv.name.clone(),
        parent,
        onto: fields.get(ONTO).map(str::to_owned),
        size,
        used: lv.extents() * vg.extent_bytes(),
        disk,
        record,
    }))
}

impl State {
    /// What a group says.
    ///
    /// # Errors
    /// If it is no repository, or contradicts itself.
    pub(crate) fn read(vg: &Vg) -> Result<State> {
        let fields = Fields::read(&vg.tags)?;
        let Some(id) = fields.get(SR) else { return Err(Error::NoRepository(vg.name.clone())) };
        let text = |name| fields.get(name).unwrap_or_default().to_owned();
        let stripes = number(&fields, STRIPES, &vg.name)?;
        let mut state = State {
            id: id.to_owned(),
            name: text(NAME),
            description: text(DESCRIPTION),
            stripes: u32::try_from(stripes).unwrap_or(u32::MAX),
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
        };
        for lv in &vg.lvs {
            let Some(node) = node(vg, lv)? else { continue };
            if let Some(disk) = &node.disk
                && let Some(other) = state.disks.insert(disk.key.clone(), node.lv.clone())
            {
                return corrupt(format!("{other} and {} are both {}", node.lv, disk.key));
            }
            state.nodes.insert(node.lv.clone(), node);
        }
        // By walking down once from each: known good ones end a walk.
        let mut good: BTreeSet<&str> = BTreeSet::new();
        for lv in state.nodes.keys() {
            let mut path = Vec::new();
            let mut next = Some(lv.as_str());
            while let Some(at) = next.filter(|at| !good.contains(at)) {
                let Some(node) = state.nodes.get(at) else {
                    return corrupt(format!("{at}, on which {lv} stands, is missing"));
                };
                if path.len() > state.nodes.len() {
                    return corrupt(format!("{lv} stands on itself"));
                }
                path.push(at);
                next = node.parent.as_deref();
            }
            good.extend(path);
        }
        let stands_on_record = |node: &Node| {
            let below = node.parent.as_ref().and_then(|lv| state.nodes.get(lv));
            below.is_some_and(|below| below.record.is_some())
        };
        if let Some(node) = state.nodes.values().find(|node| stands_on_record(node)) {
            return corrupt(format!("{} stands on one that has no data", node.lv));
        }
        Ok(state)
    }

    /// The node of a disk.
    pub(crate) fn of(&self, key: &str) -> Result<&Node> {
        let node = self.disks.get(key).and_then(|lv| self.nodes.get(lv));
        node.ok_or_else(|| Error::NoDisk(key.to_owned()))
    }

    /// A node and those below it, the uppermost first.
    pub(crate) fn chain<'a>(&'a self, lv: &'a str) -> impl Iterator<Item = &'a Node> {
        let first = self.nodes.get(lv);
        std::iter::successors(first, |node| self.nodes.get(node.parent.as_ref()?))
    }

    /// How many nodes stand on this one, or are going to.
    pub(crate) fn children(&self, lv: &str) -> usize {
        let stands =
            |node: &&Node| [&node.parent, &node.onto].iter().any(|on| on.as_deref() == Some(lv));
        self.nodes.values().filter(stands).count()
    }
}
