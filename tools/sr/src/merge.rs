//! Nodes that nobody needs apart any more: what is left of snapshots that were taken away.

use block::Storage;
use volume::Author;

use crate::change::{lv, most_bytes, put};
use crate::error::{Result, refused};
use crate::repository::Repository;
use crate::state::Node;

/// A node, and the hidden one below it on which nothing else stands: the images in them can become one,
/// which lies in the lower one's volume and is what the upper one is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    /// The volume of the upper one, which goes.
    pub upper: String,
    /// The volume of the lower one.
    pub lower: String,
    /// Bytes of the upper volume.
    pub used: u64,
}

impl<S: Storage> Repository<S> {
    /// All that can be merged.
    pub fn merges(&self) -> Vec<Merge> {
        let nodes = &self.state().nodes;
        let hidden = |lv: &String| nodes.get(lv).filter(|node| node.disk.is_none());
        let merges = nodes.values().filter_map(|upper| {
            let lower = hidden(upper.parent.as_ref()?)?;
            (self.state().children(&lower.lv) == 1).then(|| Merge {
                upper: upper.lv.clone(),
                lower: lower.lv.clone(),
                used: upper.used,
            })
        });
        merges.collect()
    }

    /// The nodes that stand on one.
    pub fn above(&self, lv: &str) -> impl Iterator<Item = &Node> {
        self.state().nodes.values().filter(move |node| node.parent.as_deref() == Some(lv))
    }

    /// The disks and snapshots whose images include a node's.
    pub fn over(&self, lv: &str) -> Vec<&str> {
        let includes = |of: &Node| self.state().chain(&of.lv).any(|node| node.lv == lv);
        let over = self.list().filter(|(_, node)| includes(node));
        over.map(|(disk, _)| disk.key.as_str()).collect()
    }

    /// Makes a node's volume larger, up to so many bytes or as far as its image can need it.
    ///
    /// # Errors
    /// If there is no such node, or no space.
    pub fn grow_to(&mut self, of: &str, bytes: u64, author: &Author) -> Result<()> {
        let Some(node) = self.state().nodes.get(of) else { return refused(format!("no {of}")) };
        // What is above may be of a time when the disk was larger.
        let size = self.above(of).map(|above| above.size).fold(node.size, u64::max);
        let more = bytes.min(most_bytes(size)).saturating_sub(node.used);
        match more {
            0 => Ok(()),
            more => self.grow(of, more, author),
        }
    }

    /// Notes that two nodes are one: the lower image holds all that the upper one does, and what stood
    /// on the upper one names the lower one. The upper volume goes.
    ///
    /// # Errors
    /// If they are not what they were, or a device fails.
    pub fn merged(&mut self, merge: &Merge, author: &Author) -> Result<()> {
        let now = self
            .merges()
            .into_iter()
            .find(|m| (&m.upper, &m.lower) == (&merge.upper, &merge.lower));
        let nodes = &self.state().nodes;
        let both = nodes.get(&merge.upper).zip(nodes.get(&merge.lower));
        let (Some(_), Some((upper, lower))) = (now, both) else {
            return refused(format!(
                "{} cannot become one with {} any more",
                merge.upper, merge.lower
            ));
        };
        let one = Node {
            lv: lower.lv.clone(),
            parent: lower.parent.clone(),
            used: lower.used,
            ..upper.clone()
        };
        let above: Vec<Node> = self.above(&merge.upper).cloned().collect();
        self.commit(author, &format!("merge {}", merge.upper), &[], |vg| {
            lv(vg, &merge.upper)?;
            vg.remove_lv(&merge.upper)?;
            put(vg, &one)?;
            above
                .into_iter()
                .try_for_each(|node| put(vg, &Node { parent: Some(one.lv.clone()), ..node }))
        })
    }
}
