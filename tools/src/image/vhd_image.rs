//! `polldisk image info` and `image check` of VHD images.

use std::io::Write;

use anyhow::Context;
use node::{NodeSpec, OpenOptions, Source, open_source, open_vhd};
use qcow::open::Format;
use serde::Serialize;
use vhd::check::Report;
use vhd::format::DiskType;
use vhd::{Kind, Layer};

use super::print::{self, STDOUT, bytes};

/// What is printed about a layer; names of qemu-img's fields where it has them.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    dirty_flag: bool,
}

#[derive(Serialize)]
struct Specific {
    #[serde(rename = "type")]
    kind: &'static str,
    data: Data,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Data {
    /// "fixed", "dynamic" or "differencing".
    subformat: &'static str,
    creator: String,
    uuid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_uuid: Option<String>,
    /// tapdisk's mark on files that are only there for their children.
    hidden: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated_blocks: Option<u64>,
}

/// Prints what a VHD image is; with `chain` what its parents are, too.
pub(super) fn info(
    spec: &NodeSpec,
    options: &OpenOptions,
    chain: bool,
    json: bool,
) -> anyhow::Result<()> {
    let opened = open_vhd(spec, options)?;
    let names: Vec<String> = opened.layers.iter().skip(1).map(|l| l.name.clone()).collect();
    let below = |i: usize| names.get(i).cloned();
    let all: Vec<Info> =
        opened.layers.iter().enumerate().map(|(i, l)| describe(l, below(i))).collect();
    if json {
        return if chain { print::json(&all) } else { print::json(&all[0]) };
    }
    let mut out = print::out();
    for (i, info) in all.iter().enumerate() {
        if i > 0 {
            writeln!(out).context(STDOUT)?;
        }
        human(&mut out, info).context(STDOUT)?;
    }
    out.flush().context(STDOUT)
}

fn describe(layer: &Layer<Source>, below: Option<String>) -> Info {
    let meta = layer.path.as_deref().and_then(|p| p.metadata().ok());
    let mut info = Info {
        virtual_size: 0,
        filename: layer.name.clone(),
        cluster_size: None,
        format: "raw",
        actual_size: meta.map(|m| std::os::unix::fs::MetadataExt::blocks(&m) * 512),
        format_specific: None,
        backing_filename: None,
        full_backing_filename: below,
        dirty_flag: false,
    };
    let image = match &layer.kind {
        Kind::Raw(size) => {
            info.virtual_size = size.next_multiple_of(512);
            return info;
        }
        Kind::Vhd(image) => image,
    };
    let block = Some(image.block_size()).filter(|&b| b > 0);
    let child = image.footer.disk_type == DiskType::Differencing;
    let parent = image.header.as_ref().filter(|_| child).map(|h| uuid_text(&h.parent_uuid));
    let data = Data {
        subformat: image.footer.disk_type.name(),
        creator: image.footer.creator.name(),
        uuid: uuid_text(&image.footer.uuid),
        parent_uuid: parent,
        hidden: image.footer.hidden,
        allocated_blocks: block.map(|_| image.allocated()),
    };
    Info {
        virtual_size: image.size(),
        cluster_size: block,
        format: "vhd",
        format_specific: Some(Specific { kind: "vhd", data }),
        backing_filename: image.parents.first().cloned(),
        ..info
    }
}

/// An identity as it is usually written.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = |part: &[u8]| part.iter().map(|b| format!("{b:02x}")).collect::<String>();
    [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex).join("-")
}

fn human(out: &mut impl Write, info: &Info) -> std::io::Result<()> {
    writeln!(out, "image: {}", info.filename)?;
    writeln!(out, "file format: {}", info.format)?;
    writeln!(out, "virtual size: {} ({} bytes)", bytes(info.virtual_size), info.virtual_size)?;
    if let Some(actual) = info.actual_size {
        writeln!(out, "disk size: {}", bytes(actual))?;
    }
    if let Some(size) = info.cluster_size {
        writeln!(out, "cluster_size: {size}")?;
    }
    if let Some(name) = &info.backing_filename {
        write!(out, "backing file: {name}")?;
        match &info.full_backing_filename {
            Some(full) if full != name => writeln!(out, " (actual path: {full})")?,
            _ => writeln!(out)?,
        }
    }
    let Some(Specific { data, .. }) = &info.format_specific else { return Ok(()) };
    writeln!(out, "Format specific information:")?;
    writeln!(out, "    subformat: {}", data.subformat)?;
    writeln!(out, "    creator: {}", data.creator)?;
    writeln!(out, "    uuid: {}", data.uuid)?;
    if let Some(parent) = &data.parent_uuid {
        writeln!(out, "    parent uuid: {parent}")?;
    }
    writeln!(out, "    hidden: {}", data.hidden)?;
    if let Some(blocks) = data.allocated_blocks {
        writeln!(out, "    allocated blocks: {blocks}")?;
    }
    Ok(())
}

/// What is printed about a check.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Checked {
    filename: String,
    format: &'static str,
    check_errors: u64,
    image_end_offset: u64,
    corruptions: u64,
    total_clusters: u64,
    allocated_clusters: u64,
}

/// Checks one file; `found` is told what is wrong. Prints the result; how much is wrong.
pub(super) fn check(
    spec: &NodeSpec,
    force_share: bool,
    json: bool,
    quiet: bool,
    found: &mut dyn FnMut(&str),
) -> anyhow::Result<u64> {
    let options = OpenOptions { force_share, ..OpenOptions::read(Format::Raw) };
    let mut source = open_source(spec, &options)?;
    let name = spec.to_string();
    let Report { corruptions, total_blocks, allocated_blocks, end } =
        vhd::check::run(&mut source, &name, found)?;
    source.close()?;
    if json {
        print::json(&Checked {
            filename: name,
            format: "vhd",
            check_errors: 0,
            image_end_offset: end,
            corruptions,
            total_clusters: total_blocks,
            allocated_clusters: allocated_blocks,
        })?;
    } else if !quiet {
        let mut text = match corruptions {
            0 => "No errors were found on the image.\n".to_owned(),
            n => format!("\n{n} errors were found on the image.\n"),
        };
        if total_blocks > 0 {
            text += &format!("{allocated_blocks}/{total_blocks} blocks allocated\n");
        }
        text += &format!("Image end offset: {end}");
        print::line(&text)?;
    }
    Ok(corruptions)
}
