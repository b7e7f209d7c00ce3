//! `polldisk volume create-group`.

use anyhow::{Context, bail};
use block::Storage;
use clap::Args;
use volume::{Group, HostIds, Label, NewGroup};

use super::open::{Access, Device, Open, author, open_devices, own};
use super::{Devices, kernel, list, signature};
use crate::image::print::{self, Output, bytes};
use crate::output::usage;

/// Make a volume group of devices, for this host alone. Devices that hold something are refused.
#[derive(Args)]
pub(crate) struct CreateGroup {
    /// Bytes of an extent, in which space is given out: a power of two.
    #[arg(long, value_name = "SIZE", default_value = "4M", value_parser = super::size)]
    extent_size: u64,
    /// Bytes of the metadata area on each device; 16M suffice for a thousand volumes.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = super::size)]
    metadata_size: u64,
    /// Give the group a tag (may be given several times).
    #[arg(long, value_parser = super::tag)]
    tag: Vec<String>,
    /// Take devices that hold something: all of that is lost.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
    /// The group's name.
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    devices: Devices,
}

/// Bytes of a metadata area: the description of all devices fits; more would never be used.
const METADATA: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;

/// Makes it.
pub(crate) fn run(args: &CreateGroup) -> anyhow::Result<()> {
    let CreateGroup { extent_size, metadata_size, name, .. } = args;
    if let Err(e) = volume::check_name("", name) {
        return usage(format!("{e}: letters, digits and _ . - + are possible, not - at the begin"));
    }
    if !extent_size.is_power_of_two() || !(4096..=1 << 39).contains(extent_size) {
        return usage(format!("--extent-size {extent_size}: a power of two from 4k to 512G"));
    }
    if !METADATA.contains(metadata_size) {
        return usage(format!("--metadata-size {metadata_size}: from 1M to 1G"));
    }
    let ids = HostIds::of_this_host().context("the system ID of this host")?;
    let id = own(&args.devices, &ids)?;
    // Until the end: what the kernel must keep off.
    let _claims = kernel::claim(&args.devices.nodes)?;
    let mut devices = open_devices(&args.devices.nodes, Access::Write)?;
    let least = metadata_size.saturating_add(2 << 20).saturating_add(*extent_size);
    for device in &mut devices {
        check_size(device, least, *extent_size)?;
    }
    look(&mut devices, args.force)?;
    let new = NewGroup {
        name: name.clone(),
        system_id: Some(id.clone()),
        tags: args.tag.clone(),
        extent: *extent_size,
        metadata: *metadata_size,
    };
    if args.force {
        // A device that looks like a group's is not taken otherwise.
        for Device { node, source } in &mut devices {
            Label::wipe(source)
                .and_then(|()| {
                    let failed = |source| volume::Error::Io { what: "flush", source };
                    source.flush().map_err(failed)
                })
                .with_context(|| node.clone())?;
        }
    }
    let (nodes, sources) = devices.into_iter().map(|d| (d.node, d.source)).unzip();
    let group =
        Group::create(sources, &new, &author()).with_context(|| format!("volume group {name}"))?;
    let open = Open { group, nodes };
    if args.output.is_json() {
        print::json(&list::Printed::of(&open, Some(&id)))?;
    } else {
        let vg = open.vg();
        print::line(&format!(
            "Volume group {name} created: {} free on {} device{}.",
            bytes(vg.free_extents().saturating_mul(vg.extent_bytes())),
            vg.pvs.len(),
            if vg.pvs.len() == 1 { "" } else { "s" },
        ))?;
    }
    if let Some(setting) = setting(&ids, &id) {
        tell!(
            "polldisk: {name}: belongs to the system `{id}`, by which this host's LVM does not know \
             itself; for its tools say {setting}"
        );
    }
    open.close()
}

/// What has LVM's tools on this host use a group with this system ID; `None`: nothing need be said.
fn setting(ids: &HostIds, id: &str) -> Option<String> {
    if ids.unknown.is_some() {
        // It was stated, so it is known what the tools go by.
        return None;
    }
    match &ids.lvm {
        Some(lvm) if lvm == id || ids.extra.iter().any(|extra| extra == id) => None,
        Some(_) => Some(format!(
            "extra_system_ids = [ \"{id}\" ] in the section local of /etc/lvm/lvmlocal.conf"
        )),
        // Further ones do not count for tools that have none.
        None if ids.machine.as_deref() == Some(id) => Some(
            "system_id_source = \"machineid\" in the section global of /etc/lvm/lvm.conf"
                .to_owned(),
        ),
        None => Some(format!(
            "system_id_source = \"lvmlocal\" in the section global of /etc/lvm/lvm.conf and \
             system_id = \"{id}\" in local of lvmlocal.conf"
        )),
    }
}

/// There is room for the metadata and an extent, and there are not more extents than LVM counts.
fn check_size(device: &Device, least: u64, extent: u64) -> anyhow::Result<()> {
    let len = device.source.len();
    if len / extent > u64::from(u32::MAX) {
        bail!(
            "{}: has {}, more than 4294967295 extents of {}; say a larger --extent-size",
            device.node,
            bytes(len),
            bytes(extent)
        );
    }
    match len >= least {
        true => Ok(()),
        false => bail!(
            "{}: has {}, too few for a metadata area and an extent: {} are needed{}",
            device.node,
            bytes(len),
            bytes(least),
            if len == 0 { " (`truncate -s SIZE` gives a file a size)" } else { "" }
        ),
    }
}

/// What a device holds that would be lost, for people.
pub(crate) fn contents(node: &str, source: &mut node::Source) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for found in signature::detect(source).with_context(|| node.to_owned())? {
        let more = match found.what == signature::LVM {
            true => of_group(source),
            false => String::new(),
        };
        all.push(format!("{node}: holds {}{more}, at byte {}", found.what, found.offset));
    }
    Ok(all)
}

/// Refuses devices that hold something, or says what will be lost.
fn look(devices: &mut [Device], force: bool) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for Device { node, source } in devices {
        all.append(&mut contents(node, source)?);
    }
    if all.is_empty() {
        return Ok(());
    }
    if !force {
        bail!("{}. Nothing was changed; if what is there may be lost, say --force", all.join("; "));
    }
    for text in all {
        tell!("polldisk: {text}; it is overwritten");
    }
    Ok(())
}

/// Which group a physical volume is in, for people.
fn of_group(source: &mut node::Source) -> String {
    match volume::probe(source) {
        Ok(Some(volume::Found { group: Some(vg), .. })) => {
            let owner = vg.system_id.unwrap_or_default();
            let owner = match owner.is_empty() {
                true => String::new(),
                false => format!(" of the system `{}`", owner.escape_default()),
            };
            format!(" of volume group {}{owner} with {} volumes", vg.name, vg.lvs.len())
        }
        Ok(Some(volume::Found { label, .. })) if label.used => " of a volume group".to_owned(),
        Ok(_) => String::new(),
        Err(e) => format!(" ({e})"),
    }
}
