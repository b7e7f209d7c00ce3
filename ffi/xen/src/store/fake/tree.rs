//! The nodes of the stand-in: values, permissions, transactions that meet. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use nix::errno::Errno;

use crate::store::Perm;

/// Quotas of domains that are not privileged.
const MOST_NODES: usize = 1000;
const LARGEST_NODE: usize = 2048;
const MOST_PERMS: usize = 5;

/// Longest answer.
pub(super) const MOST: usize = 4096;

#[derive(Clone, Debug)]
struct Node {
    value: Vec<u8>,
    perms: Vec<Perm>,
    /// Shared with copies of the node: a directory may have many.
    children: Arc<BTreeSet<Vec<u8>>>,
    /// Changes with each change of the node or of the set of its children.
    generation: u64,
}

impl Node {
    fn list(&self) -> Vec<u8> {
        self.children.iter().flat_map(|c| [&c[..], b"\0"].concat()).collect()
    }

    fn size(&self) -> usize {
        let list: usize = self.children.iter().map(|c| c.len() + 1).sum();
        self.value.len() + list + 4 * self.perms.len()
    }

    fn owner(&self) -> u16 {
        self.perms[0].domid
    }
}

/// What a change fires: watches of the path and above, or with `exact` those of the path alone.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) path: Vec<u8>,
    pub(super) exact: bool,
    /// Who may see it.
    pub(super) perms: Vec<Perm>,
}

/// All nodes.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    /// How many of them each domain owns.
    owned: HashMap<u16, usize>,
    generation: u64,
}

/// A transaction that is open: what it saw, and what it changes.
#[derive(Default, Debug)]
pub(super) struct Tx {
    seen: BTreeMap<Vec<u8>, Option<u64>>,
    changed: BTreeMap<Vec<u8>, Option<Node>>,
    fired: Vec<Change>,
}

/// The tree as a domain sees it, in a transaction or outside.
pub(super) struct View<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) tx: Option<&'a mut Tx>,
    pub(super) domid: u16,
    pub(super) fired: Vec<Change>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Read,
    Write,
    Own,
}

/// Whether a domain may read a node of these permissions.
pub(super) fn may_read(perms: &[Perm], domid: u16) -> bool {
    allows(perms, domid, Want::Read)
}

fn allows(perms: &[Perm], domid: u16, want: Want) -> bool {
    let Some(first) = perms.first() else { return domid == 0 };
    if domid == 0 || first.domid == domid {
        return true;
    }
    let entry = perms[1..].iter().find(|p| p.domid == domid).unwrap_or(first);
    match want {
        Want::Read => entry.read,
        Want::Write => entry.write,
        Want::Own => false,
    }
}

/// What lies above; nothing lies above the root.
fn parent(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|&b| b == b'/')?;
    match slash {
        0 if path.len() == 1 => None,
        0 => Some(b"/"),
        n => Some(&path[..n]),
    }
}

fn name(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

fn below(path: &[u8], name: &[u8]) -> Vec<u8> {
    let slash: &[u8] = if path == b"/" { b"" } else { b"/" };
    [path, slash, name].concat()
}

impl Tree {
    pub(super) fn new() -> Tree {
        let root = Node {
            value: Vec::new(),
            perms: vec![Perm::none(0)],
            children: Arc::default(),
            generation: 1,
        };
        let nodes = BTreeMap::from([(b"/".to_vec(), root)]);
        Tree { nodes, owned: HashMap::from([(0, 1)]), generation: 1 }
    }

    fn set(&mut self, path: Vec<u8>, node: Option<Node>) {
        self.generation += 1;
        let old = match node {
            Some(node) => {
                *self.owned.entry(node.owner()).or_default() += 1;
                self.nodes.insert(path, Node { generation: self.generation, ..node })
            }
            None => self.nodes.remove(&path),
        };
        if let Some(old) = old {
            *self.owned.entry(old.owner()).or_default() -= 1;
        }
    }

    /// Ends a transaction, if nobody changed what it saw; what it fires.
    pub(super) fn commit(&mut self, tx: Tx) -> Result<Vec<Change>, Errno> {
        for (path, seen) in &tx.seen {
            if self.nodes.get(path).map(|n| n.generation) != *seen {
                return Err(Errno::EAGAIN);
            }
        }
        for (path, node) in tx.changed {
            self.set(path, node);
        }
        Ok(tx.fired)
    }
}

impl View<'_> {
    fn get(&mut self, path: &[u8]) -> Option<Node> {
        let node = self.tree.nodes.get(path);
        if let Some(tx) = &mut self.tx {
            if let Some(node) = tx.changed.get(path) {
                return node.clone();
            }
            tx.seen.entry(path.to_vec()).or_insert(node.map(|n| n.generation));
        }
        node.cloned()
    }

    fn set(&mut self, path: &[u8], node: Option<Node>) {
        match &mut self.tx {
            Some(tx) => drop(tx.changed.insert(path.to_vec(), node)),
            None => self.tree.set(path.to_vec(), node),
        }
    }

    fn fire(&mut self, path: &[u8], exact: bool, perms: Vec<Perm>) {
        let change = Change { path: path.to_vec(), exact, perms };
        match &mut self.tx {
            Some(tx) => tx.fired.push(change),
            None => self.fired.push(change),
        }
    }

    /// A node that the caller may do this with. That one is missing is told only to those who may
    /// do it with what is there above.
    fn node(&mut self, path: &[u8], want: Want) -> Result<Node, Errno> {
        if let Some(node) = self.get(path) {
            return if allows(&node.perms, self.domid, want) {
                Ok(node)
            } else {
                Err(Errno::EACCES)
            };
        }
        let mut above = path;
        while let Some(up) = parent(above) {
            if let Some(node) = self.get(up) {
                let may = allows(&node.perms, self.domid, want);
                return Err(if may { Errno::ENOENT } else { Errno::EACCES });
            }
            above = up;
        }
        Err(Errno::ENOENT)
    }

    pub(super) fn read(&mut self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        self.node(path, Want::Read).map(|n| n.value)
    }

    pub(super) fn list(&mut self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let list = self.node(path, Want::Read)?.list();
        if list.len() > MOST { Err(Errno::E2BIG) } else { Ok(list) }
    }

    pub(super) fn list_part(&mut self, path: &[u8], offset: usize) -> Result<Vec<u8>, Errno> {
        let node = self.node(path, Want::Read)?;
        let list = node.list();
        let mut answer = format!("{}\0", node.generation).into_bytes();
        let room = MOST - answer.len() - 1;
        let rest = list.get(offset..).unwrap_or(&[]);
        let mut taken = 0;
        for name in rest.split_inclusive(|&b| b == 0) {
            if taken + name.len() > room {
                break;
            }
            taken += name.len();
        }
        answer.extend(&rest[..taken]);
        if taken == rest.len() {
            answer.push(0);
        }
        Ok(answer)
    }

    pub(super) fn write(&mut self, path: &[u8], value: &[u8]) -> Result<(), Errno> {
        match self.node(path, Want::Write) {
            Ok(mut node) => {
                node.value = value.to_vec();
                self.check_size(&node)?;
                self.fire(path, false, node.perms.clone());
                self.set(path, Some(node));
                Ok(())
            }
            Err(Errno::ENOENT) => self.create(path, value),
            Err(e) => Err(e),
        }
    }

    pub(super) fn mkdir(&mut self, path: &[u8]) -> Result<(), Errno> {
        match self.node(path, Want::Write) {
            Ok(_) => Ok(()),
            Err(Errno::ENOENT) => self.create(path, b""),
            Err(e) => Err(e),
        }
    }

    fn check_size(&self, node: &Node) -> Result<(), Errno> {
        if self.domid != 0 && node.size() > LARGEST_NODE { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    /// Makes a node and what is missing above it: with the permissions of what is there, but owned
    /// by the domain that makes it, unless that is privileged.
    fn create(&mut self, path: &[u8], value: &[u8]) -> Result<(), Errno> {
        let mut missing = vec![path.to_vec()];
        let (mut above, mut node) = loop {
            let up = parent(missing.last().map_or(path, |p| p)).ok_or(Errno::EINVAL)?.to_vec();
            match self.get(&up) {
                Some(node) => break (up, node),
                None => missing.push(up),
            }
        };
        let mut perms = node.perms.clone();
        if self.domid != 0 {
            perms[0].domid = self.domid;
            let own = self.tree.owned.get(&self.domid).copied().unwrap_or(0);
            if own + missing.len() > MOST_NODES {
                return Err(Errno::ENOSPC);
            }
        }
        while let Some(path) = missing.pop() {
            Arc::make_mut(&mut node.children).insert(name(&path).to_vec());
            self.set(&above, Some(node));
            let value = if missing.is_empty() { value.to_vec() } else { Vec::new() };
            node = Node { value, perms: perms.clone(), children: Arc::default(), generation: 0 };
            above = path;
        }
        self.check_size(&node)?;
        self.set(path, Some(node));
        self.fire(path, false, perms);
        Ok(())
    }

    pub(super) fn rm(&mut self, path: &[u8]) -> Result<(), Errno> {
        let up = parent(path).ok_or(Errno::EINVAL)?.to_vec();
        let node = match self.node(path, Want::Write) {
            Ok(node) => node,
            Err(Errno::ENOENT) if self.get(&up).is_some() => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut whole = vec![(path.to_vec(), node.clone())];
        while let Some((path_of, of)) = whole.pop() {
            for child in of.children.iter() {
                let child = below(&path_of, child);
                if let Some(node) = self.get(&child) {
                    self.fire(&child, true, node.perms.clone());
                    whole.push((child, node));
                }
            }
            self.set(&path_of, None);
        }
        if let Some(mut above) = self.get(&up) {
            Arc::make_mut(&mut above.children).remove(name(path));
            self.set(&up, Some(above));
        }
        self.fire(path, false, node.perms);
        Ok(())
    }

    pub(super) fn perms(&mut self, path: &[u8]) -> Result<Vec<Perm>, Errno> {
        self.node(path, Want::Read).map(|n| n.perms)
    }

    pub(super) fn set_perms(&mut self, path: &[u8], perms: Vec<Perm>) -> Result<(), Errno> {
        let mut node = self.node(path, Want::Own)?;
        let owner = perms.first().ok_or(Errno::EINVAL)?.domid;
        if self.domid != 0 && owner != node.perms[0].domid {
            return Err(Errno::EPERM);
        }
        if self.domid != 0 && perms.len() > MOST_PERMS {
            return Err(Errno::ENOSPC);
        }
        node.perms = perms.clone();
        self.set(path, Some(node));
        self.fire(path, false, perms);
        Ok(())
    }
}
