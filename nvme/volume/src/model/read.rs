//! [`Vg`] from text. What is not known is kept where it stands beside what is known and has no
//! meaning for space, and refused otherwise.

use super::{Lv, Place, Pv, Segment, Vg};
use crate::error::{Result, corrupt, unsupported};
use crate::id::Id;
use crate::text::{Body, Fields, Node, Value, parse};

/// What the text says that it is.
pub(super) const CONTENTS: &str = "Text Format Volume Group";
/// Its version.
pub(super) const VERSION: u64 = 1;
/// The format that the group says it has.
pub(super) const FORMAT: &str = "lvm2";
const U32: u64 = u32::MAX as u64;
/// Largest number of a sector: what bytes can be counted in 63 bits of.
const SECTORS: u64 = i64::MAX as u64 / 512;

impl Vg {
    /// Reads a text that lay in a metadata area, or a backup of LVM's tools.
    ///
    /// # Errors
    /// If it is damaged or contradicts itself; if it holds what is not done here.
    pub fn read(text: &[u8]) -> Result<Vg> {
        let mut top = Fields::new("the text".to_owned(), parse(text)?);
        let (contents, version) = (top.text("contents")?, top.int("version", U32)?);
        if contents != CONTENTS || version != VERSION {
            return unsupported(format!("metadata `{contents}` of version {version} is"));
        }
        let mut sections = top.sections();
        let (Some((name, nodes)), true) = (sections.pop(), sections.is_empty()) else {
            return corrupt("metadata: not one volume group");
        };
        let vg = group(name, nodes)?;
        vg.check()?;
        Ok(vg)
    }
}

fn group(name: String, nodes: Vec<Node>) -> Result<Vg> {
    let mut f = Fields::new(format!("volume group {name}"), nodes);
    let format = f.text_or_none("format")?.unwrap_or_else(|| FORMAT.to_owned());
    if format != FORMAT {
        return unsupported(format!("the format `{format}` is"));
    }
    // A group that several hosts share has a lock manager to be asked.
    match f.text_or_none("lock_type")? {
        None => {}
        Some(kind) if kind == "none" => {}
        Some(kind) => return unsupported(format!("a group with locks of type `{kind}` is")),
    }
    let id = Id::parse(&f.text("id")?)?;
    let seqno = f.int("seqno", U32)? as u32;
    let extent_size = f.int("extent_size", U32)?;
    let system_id = f.text_or_none("system_id")?.filter(|id| !id.is_empty());
    let (status, flags, tags) = (f.texts("status")?, f.texts("flags")?, f.texts("tags")?);
    let mut pvs = Vec::new();
    for (key, nodes) in sections(f.section("physical_volumes")?, "physical_volumes")? {
        pvs.push(device(key, nodes)?);
    }
    let keys = pvs.iter().enumerate().map(|(at, pv): (usize, &Pv)| (pv.key.clone(), at)).collect();
    let mut lvs = Vec::new();
    for (name, nodes) in sections(f.section("logical_volumes")?, "logical_volumes")? {
        lvs.push(volume(name, nodes, &keys)?);
    }
    let extra = f.rest()?;
    Ok(Vg { name, id, seqno, system_id, status, flags, tags, extent_size, pvs, lvs, extra })
}

/// The sections of a section that holds nothing else.
fn sections(nodes: Option<Vec<Node>>, of: &str) -> Result<Vec<(String, Vec<Node>)>> {
    let mut sections = Vec::new();
    for node in nodes.into_iter().flatten() {
        match node.body {
            Body::Section(nodes) => sections.push((node.key, nodes)),
            Body::Value(_) => return corrupt(format!("metadata: `{}` in `{of}`", node.key)),
        }
    }
    Ok(sections)
}

fn device(key: String, nodes: Vec<Node>) -> Result<Pv> {
    let mut f = Fields::new(format!("device {key}"), nodes);
    Ok(Pv {
        id: Id::parse(&f.text("id")?)?,
        status: f.texts("status")?,
        flags: f.texts("flags")?,
        tags: f.texts("tags")?,
        pe_start: f.int("pe_start", SECTORS)?,
        pe_count: f.int("pe_count", U32)?,
        extra: f.rest()?,
        key,
    })
}

type Keys = std::collections::HashMap<String, usize>;

fn volume(name: String, nodes: Vec<Node>, keys: &Keys) -> Result<Lv> {
    let mut f = Fields::new(format!("volume {name}"), nodes);
    let id = Id::parse(&f.text("id")?)?;
    let (status, flags, tags) = (f.texts("status")?, f.texts("flags")?, f.texts("tags")?);
    let count = f.int("segment_count", U32)?;
    let mut segments = Vec::new();
    for (key, nodes) in f.sections() {
        segments.push(segment(&name, &key, nodes, keys)?);
    }
    if segments.len() as u64 != count {
        return corrupt(format!(
            "metadata: volume {name} has {} segments, not {count}",
            segments.len()
        ));
    }
    segments.sort_by_key(|segment| segment.start);
    Ok(Lv { name, id, status, flags, tags, segments, extra: f.rest()? })
}

fn segment(lv: &str, key: &str, nodes: Vec<Node>, keys: &Keys) -> Result<Segment> {
    let mut f = Fields::new(format!("{key} of volume {lv}"), nodes);
    let kind = f.text("type")?;
    if kind != "striped" {
        return unsupported(format!("volume {lv} of type `{kind}` is"));
    }
    let (start, count) = (f.int("start_extent", U32)?, f.int("extent_count", U32)?);
    let stripes = f.int("stripe_count", U32)?;
    let stripe_size = match stripes {
        1 => f.int_or_none("stripe_size", U32)?.map_or(0, |_| 0),
        _ => f.int("stripe_size", U32)?,
    };
    let list = f.list("stripes")?;
    let mut areas = Vec::with_capacity(list.len() / 2);
    for pair in list.chunks(2) {
        let [Value::Text(name), Value::Int(extent)] = pair else {
            return corrupt(format!("metadata: `stripes` of {} is no list of extents", f.of));
        };
        let (Some(&pv), Ok(extent)) = (keys.get(name), u64::try_from(*extent)) else {
            return unsupported(format!("{} on `{name}`, extent {extent}, is", f.of));
        };
        areas.push(Place { pv, extent });
    }
    if areas.len() as u64 != stripes || areas.is_empty() {
        return corrupt(format!("metadata: {} has {} places for its stripes", f.of, areas.len()));
    }
    Ok(Segment { start, count, stripe_size, areas, tags: f.texts("tags")?, extra: f.rest()? })
}
