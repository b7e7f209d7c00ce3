//! Opening the devices of a group, and the group on them. What is wrong is said with the device's
//! name, before anything is written.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use node::{NodeSpec, OpenOptions, Source, open_source};
use qcow::open::Format;
use volume::{Author, Error, Found, Group, HostIds, Id, Label, Vg};

use super::{Devices, VolumeName, kernel, signature};
use crate::output::usage;

/// How devices are opened.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Access {
    /// To change what is on them, with nobody else beside.
    Write,
    /// To read; nobody may write meanwhile.
    Read,
    /// To read, whoever writes.
    Share,
}

/// Reading as the option `-U` has it.
pub(super) fn reading(force_share: bool) -> Access {
    if force_share { Access::Share } else { Access::Read }
}

/// An opened device.
pub(super) struct Device {
    /// Its node.
    pub(super) node: String,
    pub(super) source: Source,
}

/// A group with the names of its devices.
pub(super) struct Open {
    pub(super) group: Group<Source>,
    /// In the order of [`Vg::pvs`].
    pub(super) nodes: Vec<String>,
}

impl Open {
    /// The state in force.
    pub(super) fn vg(&self) -> &Vg {
        self.group.vg()
    }

    /// Changes the group; returns what no volume has any more.
    ///
    /// # Errors
    /// As [`Group::change`], with what to do.
    pub(super) fn change(
        &mut self,
        what: &impl std::fmt::Display,
        why: &str,
        edit: impl FnOnce(&mut Vg, &Author) -> volume::Result<()>,
    ) -> anyhow::Result<Vec<volume::Run>> {
        let author = author();
        let done = self.group.change(&author, why, |vg| edit(vg, &author));
        done.map_err(|e| advise(what, self.vg(), e))
    }

    /// Ends the use of all devices, in order.
    pub(super) fn close(self) -> anyhow::Result<()> {
        close(self.group.into_devices())
    }
}

/// Ends the use of devices; if one fails the others are closed all the same.
pub(super) fn close(sources: Vec<Source>) -> anyhow::Result<()> {
    let results: Vec<_> = sources.into_iter().map(Source::close).collect();
    Ok(results.into_iter().collect::<Result<(), _>>()?)
}

/// Who makes changes: this host, now.
pub(crate) fn author() -> Author {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Author { host: host.trim().to_owned(), time }
}

/// Opens devices. None may be named twice.
///
/// # Errors
/// If one is not there, in use, or named twice.
pub(super) fn open_devices(nodes: &[NodeSpec], access: Access) -> anyhow::Result<Vec<Device>> {
    let mut seen: HashMap<(u64, u64), &NodeSpec> = HashMap::new();
    for (at, spec) in nodes.iter().enumerate() {
        crate::image::refuse_special(spec)?;
        let other = match kernel::identity(spec) {
            Some(id) => seen.insert(id, spec),
            None => nodes[..at].iter().find(|n| *n == spec),
        };
        if let Some(other) = other {
            return usage(format!("{spec}: is named twice (as {other} too)"));
        }
    }
    let options = match access {
        Access::Write => OpenOptions::write(Format::Raw),
        Access::Read => OpenOptions::read(Format::Raw),
        Access::Share => OpenOptions { force_share: true, ..OpenOptions::read(Format::Raw) },
    };
    let mut devices = Vec::with_capacity(nodes.len());
    for spec in nodes {
        let source = open_source(spec, &options).map_err(|e| match e {
            node::Error::InUse { .. } => anyhow!(
                "{e}. Another program has this device of the group open; try again when it has \
                 ended (`fuser -v` names it; for what a server has open: `polldisk ctl list`)"
            ),
            e => e.into(),
        })?;
        devices.push(Device { node: spec.to_string(), source });
    }
    Ok(devices)
}

/// What is on devices, before a group is opened on them.
pub(super) struct Look {
    pub(super) devices: Vec<(Device, Label)>,
    /// The newest state that is to be had.
    pub(super) vg: Vg,
}

/// Looks for the group that devices have. Damaged copies of its metadata are passed over where
/// there is another one.
///
/// # Errors
/// If a device has no group or another one than the others; if they are not all.
pub(super) fn look(devices: Vec<Device>) -> anyhow::Result<Look> {
    let mut labelled = Vec::with_capacity(devices.len());
    let mut best: Option<(Vg, String)> = None;
    let mut damaged = None;
    for mut device in devices {
        let node = device.node.clone();
        let Some(label) = Label::read(&mut device.source).with_context(|| node.clone())? else {
            let found = signature::detect(&mut device.source)?;
            let has = found.first().map_or("nothing that is known".to_owned(), |f| f.what.clone());
            bail!(
                "{node}: is in no volume group: there is no LVM2 label in its first four sectors, \
                 but {has}. `polldisk volume create-group` makes groups"
            );
        };
        match volume::probe(&mut device.source) {
            Ok(Some(Found { group: Some(vg), .. })) => match &best {
                Some((have, other)) if have.id != vg.id => bail!(
                    "{node}: is in volume group {}, but {other} in {}; name the devices of one \
                     group",
                    vg.name,
                    have.name
                ),
                Some((have, _)) if have.seqno >= vg.seqno => {}
                _ => best = Some((vg, node)),
            },
            Ok(_) => {}
            Err(Error::Corrupt(why)) => damaged = Some(format!("{node}: {why}")),
            Err(e) => return Err(anyhow::Error::new(e).context(node)),
        }
        labelled.push((device, label));
    }
    let Some((vg, _)) = best else {
        match damaged {
            Some(why) => bail!(
                "{why}. No device has a valid copy of the group's metadata; `pvck --dump \
                 metadata_search` looks for old ones, `vgcfgrestore` brings back what was saved"
            ),
            None => bail!(
                "the devices are LVM2 physical volumes, but no device that is named has a volume \
                 group; `polldisk volume create-group` makes one"
            ),
        }
    };
    complete(&vg, &labelled)?;
    Ok(Look { devices: labelled, vg })
}

/// All devices of the group are there, and no others.
fn complete(vg: &Vg, devices: &[(Device, Label)]) -> anyhow::Result<()> {
    let missing = vg.pvs.iter().filter(|pv| devices.iter().all(|(_, label)| label.id != pv.id));
    let missing: Vec<String> = missing.map(|pv| format!("{} ({})", pv.key, pv.id)).collect();
    if !missing.is_empty() {
        bail!(
            "volume group {} has {} devices, and {} not among those that are named: {}. Name all \
             of them",
            vg.name,
            vg.pvs.len(),
            if missing.len() == 1 { "one is" } else { "some are" },
            missing.join(", ")
        );
    }
    match devices.iter().find(|(_, label)| vg.pvs.iter().all(|pv| pv.id != label.id)) {
        None => Ok(()),
        Some((device, _)) => bail!("{}: is not in volume group {}", device.node, vg.name),
    }
}

/// Opens a group for reading, whosever it is: nothing is written.
///
/// # Errors
/// If the devices are not those of one sound group.
pub(super) fn open_to_read(args: &Devices, access: Access) -> anyhow::Result<Open> {
    let Look { devices, vg } = look(open_devices(&args.nodes, access)?)?;
    let owner = vg.system_id.clone();
    finish(devices, &vg, owner.as_deref())
}

/// Opens a group to change it, after `check` has said nothing against that. Nothing is written
/// before.
///
/// # Errors
/// If the devices are not those of one sound group of that name; if it is another host's; what
/// `check` says.
pub(super) fn open_to_change(
    name: &str,
    args: &Devices,
    check: impl FnOnce(&Vg) -> anyhow::Result<()>,
) -> anyhow::Result<Open> {
    let Look { devices, vg } = look(open_devices(&args.nodes, Access::Write)?)?;
    expect_name(&vg, name)?;
    let ours = ours(args, &vg)?;
    if let Some(owner) = vg.system_id.as_ref().filter(|owner| Some(*owner) != ours.as_ref()) {
        let owner = owner.escape_default();
        let name = &vg.name;
        bail!(
            "volume group {name} belongs to the system `{owner}`, and this host is `{}`: that one may \
             be writing to it now. If it is gone for good: `polldisk volume take-over {name} NODE…`; \
             if it is this host by another name: `--system-id {owner}`",
            ours.as_deref().unwrap_or_default()
        );
    }
    check(&vg)?;
    finish(devices, &vg, ours.as_deref())
}

/// The group is the one that is meant.
///
/// # Errors
/// If it has another name.
pub(super) fn expect_name(vg: &Vg, name: &str) -> anyhow::Result<()> {
    match vg.name == name {
        true => Ok(()),
        false => bail!("the devices are in volume group {}, not in {name}", vg.name),
    }
}

/// Opens what [`look`] has found.
pub(super) fn finish(
    devices: Vec<(Device, Label)>,
    vg: &Vg,
    ours: Option<&str>,
) -> anyhow::Result<Open> {
    let names: HashMap<Id, String> =
        devices.iter().map(|(device, label)| (label.id, device.node.clone())).collect();
    let sources = devices.into_iter().map(|(device, _)| device.source).collect();
    let group = Group::open(sources, ours).with_context(|| format!("volume group {}", vg.name))?;
    let node = |pv: &volume::Pv| names.get(&pv.id).cloned().unwrap_or_default();
    let nodes = group.vg().pvs.iter().map(node).collect();
    Ok(Open { group, nodes })
}

/// The system ID by which this host may use a group, if any.
pub(super) fn ours(args: &Devices, vg: &Vg) -> anyhow::Result<Option<String>> {
    if let Some(id) = &args.system_id {
        return Ok(Some(id.clone()));
    }
    let ids = HostIds::of_this_host().context("the system ID of this host")?;
    match (ids.matching(vg), &vg.system_id) {
        (None, Some(_)) => Ok(Some(own(args, &ids)?)),
        (id, _) => Ok(id.map(str::to_owned)),
    }
}

/// The system ID that a group of this host gets.
///
/// # Errors
/// If there is none.
pub(super) fn own(args: &Devices, ids: &HostIds) -> anyhow::Result<String> {
    match (&args.system_id, ids.own(), &ids.unknown) {
        (Some(id), _, _) => Ok(id.clone()),
        (None, Some(id), _) => Ok(id.to_owned()),
        (None, None, Some(kind)) => bail!(
            "the LVM of this host takes its system ID from `{kind}`, which is not done here: say \
             --system-id with what `lvm systemid` prints"
        ),
        (None, None, None) => bail!(
            "this host has no system ID: neither does its LVM have one (lvmsystemid(7)), nor is \
             there an /etc/machine-id; `systemd-machine-id-setup` makes one, or say --system-id"
        ),
    }
}

/// The volume is there, is one that may be touched, and the kernel does not have it active.
///
/// # Errors
/// If not.
pub(super) fn check_idle(args: &Devices, vg: &Vg, what: &VolumeName) -> anyhow::Result<()> {
    let lv = vg.lv(&what.name).map_err(|e| advise(what, vg, e))?;
    kernel::refuse_active(&args.nodes, vg, lv)
}

/// An error about a volume or group, with what to do.
pub(super) fn advise(what: &impl std::fmt::Display, vg: &Vg, error: Error) -> anyhow::Error {
    use crate::image::print::bytes;
    let group = &vg.name;
    match &error {
        Error::NoVolume(_) => {
            let mut names: Vec<&str> = vg.lvs.iter().map(|lv| lv.name.as_str()).collect();
            names.sort_unstable();
            let more = if names.len() > 8 { ", …" } else { "" };
            names.truncate(8);
            let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") + more };
            anyhow!("{error}; volume group {group} has {has}")
        }
        Error::NoSpace { wanted, free, .. } => {
            let unit = vg.extent_bytes();
            let wanted_bytes = wanted.saturating_mul(unit);
            let free_bytes = free.saturating_mul(unit);
            let shape = match free >= wanted {
                true => {
                    " That would suffice, but not on as many devices at once as it has stripes."
                }
                false => "",
            };
            anyhow!(
                "{what}: {error} ({} wanted, {} free).{shape} Remove a volume, or ask for less: `polldisk \
                 volume list` shows what is free on which device",
                bytes(wanted_bytes),
                bytes(free_bytes)
            )
        }
        Error::MetadataFull { .. } => anyhow!(
            "{what}: {error}: volume group {group} has too many volumes or segments for its \
             metadata areas. Remove volumes"
        ),
        _ => anyhow::Error::new(error).context(what.to_string()),
    }
}
