//! [`Vg`] as text.

use super::read::{CONTENTS, FORMAT, VERSION};
use super::{Author, Lv, Pv, Segment, Vg};
use crate::text::{Node, Value, print};

impl Vg {
    /// The text for a metadata area, without the zero byte at its end. `why` is what has changed.
    pub fn write(&self, author: &Author, why: &str) -> String {
        // The group comes first: tools read its name at the text's begin.
        print(&[
            Node::section(&self.name, self.nodes()),
            Node::text("contents", CONTENTS),
            Node::int("version", VERSION),
            Node::text("description", why),
            Node::text("creation_host", &author.host),
            Node::int("creation_time", author.time),
        ])
    }

    fn nodes(&self) -> Vec<Node> {
        let mut nodes = vec![
            Node::text("id", &self.id.to_string()),
            Node::int("seqno", u64::from(self.seqno)),
            Node::text("format", FORMAT),
            Node::texts("status", &self.status),
            Node::texts("flags", &self.flags),
        ];
        push_tags(&mut nodes, &self.tags);
        if let Some(id) = &self.system_id {
            nodes.push(Node::text("system_id", id));
        }
        nodes.push(Node::int("extent_size", self.extent_size));
        nodes.extend(self.extra.iter().cloned());
        let pvs = self.pvs.iter().map(|pv| Node::section(&pv.key, device(pv)));
        nodes.push(Node::section("physical_volumes", pvs.collect()));
        // LVM's tools leave an empty section out.
        if !self.lvs.is_empty() {
            let lvs = self.lvs.iter().map(|lv| Node::section(&lv.name, self.volume(lv)));
            nodes.push(Node::section("logical_volumes", lvs.collect()));
        }
        nodes
    }

    fn volume(&self, lv: &Lv) -> Vec<Node> {
        let mut nodes = vec![
            Node::text("id", &lv.id.to_string()),
            Node::texts("status", &lv.status),
            Node::texts("flags", &lv.flags),
        ];
        push_tags(&mut nodes, &lv.tags);
        nodes.extend(lv.extra.iter().cloned());
        nodes.push(Node::int("segment_count", lv.segments.len() as u64));
        for (number, segment) in lv.segments.iter().enumerate() {
            let key = format!("segment{}", number + 1);
            nodes.push(Node::section(&key, self.segment(segment)));
        }
        nodes
    }

    fn segment(&self, segment: &Segment) -> Vec<Node> {
        let mut nodes = vec![
            Node::int("start_extent", segment.start),
            Node::int("extent_count", segment.count),
        ];
        push_tags(&mut nodes, &segment.tags);
        nodes.extend(segment.extra.iter().cloned());
        nodes.push(Node::text("type", "striped"));
        nodes.push(Node::int("stripe_count", segment.areas.len() as u64));
        if segment.areas.len() > 1 {
            nodes.push(Node::int("stripe_size", segment.stripe_size));
        }
        let mut stripes = Vec::with_capacity(segment.areas.len() * 2);
        for area in &segment.areas {
            stripes.push(Value::Text(self.pvs[area.pv].key.clone()));
            stripes.push(Value::Int(area.extent as i64));
        }
        nodes.push(Node::value("stripes", Value::List(stripes)));
        nodes
    }
}

fn device(pv: &Pv) -> Vec<Node> {
    let mut nodes = vec![Node::text("id", &pv.id.to_string())];
    nodes.extend(pv.extra.iter().cloned());
    nodes.push(Node::texts("status", &pv.status));
    nodes.push(Node::texts("flags", &pv.flags));
    push_tags(&mut nodes, &pv.tags);
    nodes.push(Node::int("pe_start", pv.pe_start));
    nodes.push(Node::int("pe_count", pv.pe_count));
    nodes
}

/// An empty list of tags is left out, as LVM's tools do.
fn push_tags(nodes: &mut Vec<Node>, tags: &[String]) {
    if !tags.is_empty() {
        nodes.push(Node::texts("tags", tags));
    }
}
