//! What queues must be like to be members of a [`super::SplitQueue`].

use super::{Layout, MAX_MEMBERS};
use crate::{DeviceInfo, LeafAccess};

/// What the members are like; there are as many as there may be, with blocks of one size.
pub(super) fn infos<Q: LeafAccess>(members: &[(Q, u16)]) -> Result<Vec<&DeviceInfo>, String> {
    if !(1..=MAX_MEMBERS).contains(&members.len()) {
        return Err(format!("{} members; 1 to {MAX_MEMBERS} are possible", members.len()));
    }
    let infos = members.iter().enumerate().map(|(i, (queue, unit))| {
        queue.info(*unit).ok_or_else(|| format!("member {i} has no unit {unit}"))
    });
    let infos: Vec<&DeviceInfo> = infos.collect::<Result<_, _>>()?;
    let block_size = infos[0].block_size;
    if let Some(i) = infos.iter().position(|i| i.block_size != block_size) {
        let other = infos[i].block_size;
        return Err(format!("member 0 has blocks of {block_size} bytes, member {i} of {other}"));
    }
    Ok(infos)
}

/// Every member has what the layout says.
pub(super) fn fits<Q: LeafAccess>(
    members: &[(Q, u16)],
    layout: &impl Layout,
) -> Result<(), String> {
    if layout.members() > members.len() {
        return Err(format!("{} members; {} are needed", members.len(), layout.members()));
    }
    for (i, (queue, unit)) in members.iter().enumerate() {
        let (has, needs) = (usable(queue, *unit), layout.end_on(i));
        if needs > has {
            return Err(format!("member {i} has {has} bytes; {needs} are needed"));
        }
    }
    Ok(())
}

/// Bytes of a member. Files could grow, but as members they do not: one that grew less than the
/// others would make a stripe smaller the next time.
pub(super) fn usable<Q: LeafAccess>(queue: &Q, unit: u16) -> u64 {
    queue.info(unit).map_or(0, |i| i.size.min(queue.unit_len(unit)))
}
