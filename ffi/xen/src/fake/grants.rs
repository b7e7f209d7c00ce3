//! The stand-in's grant device and a guest's table of grants.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use reactor::sync::Mutex;

use super::{Grants, Machine, State, memory};
use crate::abi::{
    CopySegment, DEST_GREF, GNTST_GENERAL_ERROR, GNTST_OKAY, GrantRef, PAGE, SOURCE_GREF,
};
use crate::gntdev::{Kernel, Memory, Segments};

const GNTST_BAD_DOMAIN: i16 = -2;
const GNTST_BAD_GNTREF: i16 = -3;
const GNTST_EAGAIN: i16 = -12;

/// Most pages of one mapping.
const MOST_PAGES: usize = 65_536;

#[derive(Clone, Copy, Debug)]
struct Grant {
    page: u32,
    read_only: bool,
    mappings: u32,
}

/// A guest's table of grants.
#[derive(Default, Debug)]
pub struct Table(Mutex<BTreeMap<u32, Grant>>);

impl Table {
    /// Grants a page.
    ///
    /// # Panics
    /// If the reference is in use.
    pub fn grant(&self, gref: u32, page: u32, read_only: bool) {
        let old = self.0.lock().insert(gref, Grant { page, read_only, mappings: 0 });
        assert!(old.is_none(), "grant reference {gref} is in use");
    }

    /// Takes a grant back; false if it is mapped.
    pub fn end_access(&self, gref: u32) -> bool {
        let mut grants = self.0.lock();
        let mapped = grants.get(&gref).is_some_and(|g| g.mappings > 0);
        if !mapped {
            grants.remove(&gref);
        }
        !mapped
    }

    /// How often a reference is mapped.
    pub fn mappings(&self, gref: u32) -> u32 {
        self.0.lock().get(&gref).map_or(0, |g| g.mappings)
    }
}

impl Grants for Table {
    fn find(&self, gref: u32) -> Option<(u32, bool)> {
        self.0.lock().get(&gref).map(|g| (g.page, g.read_only))
    }

    fn map(&self, gref: u32) -> Option<u32> {
        let mut grants = self.0.lock();
        let grant = grants.get_mut(&gref).filter(|g| !g.read_only)?;
        grant.mappings += 1;
        Some(grant.page)
    }

    fn unmap(&self, gref: u32) {
        let mut grants = self.0.lock();
        let grant = grants.get_mut(&gref).expect("a mapped grant stays");
        grant.mappings -= 1;
    }
}

/// An entry of a device's table.
#[derive(Debug)]
struct Entry {
    refs: Vec<GrantRef>,
    /// A range was asked for; no other can be.
    used: bool,
    mapped: Option<(Arc<dyn Grants>, Weak<()>)>,
}

#[derive(Debug)]
pub(super) struct Device {
    machine: Arc<Machine>,
    entries: Mutex<BTreeMap<u64, Entry>>,
}

impl Device {
    pub(super) fn new(machine: Arc<Machine>) -> Device {
        Device { machine, entries: Mutex::default() }
    }

    /// Counts the mappings of an entry, all or none.
    fn take(&self, state: &mut State, refs: &[GrantRef]) -> Result<(Vec<u32>, u16), Errno> {
        let domid = u16::try_from(refs[0].domid).map_err(|_| Errno::EINVAL)?;
        assert!(refs.iter().all(|r| r.domid == domid.into()), "not asked for by this crate");
        if state.handles + refs.len() > state.most_handles {
            return Err(Errno::EINVAL);
        }
        let domain = state.domains.get_mut(&domid).ok_or(Errno::EINVAL)?;
        for r in refs {
            if look(&mut domain.paged_out, r.reference) {
                return Err(Errno::EAGAIN);
            }
        }
        let last = domain.memory.len() / PAGE;
        let mut pages = Vec::new();
        for r in refs {
            match domain.grants.map(r.reference) {
                Some(page) if (page as usize) < last => pages.push(page),
                other => {
                    let back = pages.len() + usize::from(other.is_some());
                    refs[..back].iter().for_each(|r| domain.grants.unmap(r.reference));
                    return Err(Errno::EINVAL);
                }
            }
        }
        state.handles += refs.len();
        Ok((pages, domid))
    }

    fn end(&self, entry: &Entry) {
        if let Some((grants, alive)) = &entry.mapped {
            assert_eq!(alive.strong_count(), 0, "the range has to be unmapped first");
            let mut state = self.machine.state.lock();
            entry.refs.iter().for_each(|r| grants.unmap(r.reference));
            state.handles -= entry.refs.len();
            state.calls.unmaps += 1;
        }
    }
}

/// Whether a page is paged out, as seen by this look.
fn look(paged_out: &mut BTreeMap<u32, u32>, gref: u32) -> bool {
    match paged_out.get_mut(&gref) {
        Some(looks) if *looks > 0 => {
            *looks -= 1;
            true
        }
        _ => false,
    }
}

impl Kernel for Device {
    fn map(&self, refs: &[GrantRef]) -> Result<u64, Errno> {
        if refs.is_empty() || refs.len() > MOST_PAGES {
            return Err(Errno::EINVAL);
        }
        let mut entries = self.entries.lock();
        // The first gap that is large enough, as in the kernel: numbers come again.
        let mut at = 0;
        for (&index, entry) in entries.iter() {
            if at + refs.len() as u64 * PAGE as u64 <= index {
                break;
            }
            at = index + (entry.refs.len() * PAGE) as u64;
        }
        entries.insert(at, Entry { refs: refs.to_vec(), used: false, mapped: None });
        Ok(at)
    }

    fn mmap(&self, index: u64, pages: usize) -> Result<Memory, Errno> {
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(&index).filter(|e| e.refs.len() == pages && !e.used);
        let entry = entry.ok_or(Errno::EINVAL)?;
        entry.used = true;
        let mut state = self.machine.state.lock();
        state.calls.maps += 1;
        let (numbers, domid) = self.take(&mut state, &entry.refs)?;
        let domain = &state.domains[&domid];
        let memory = Memory::of_pages(&domain.memory, &numbers).expect("a test has memory left");
        entry.mapped = Some((domain.grants.clone(), memory.witness()));
        Ok(memory)
    }

    fn unmap(&self, index: u64, pages: usize) -> Result<(), Errno> {
        let mut entries = self.entries.lock();
        if entries.get(&index).is_none_or(|e| e.refs.len() != pages) {
            return Err(Errno::ENOENT);
        }
        if let Some(entry) = entries.remove(&index) {
            self.end(&entry);
        }
        Ok(())
    }

    fn copy(&self, segments: &mut Segments<'_>) -> Result<(), Errno> {
        let mut state = self.machine.state.lock();
        state.calls.copies += 1;
        state.calls.segments += segments.raw_mut().len() as u64;
        if state.failing_copies > 0 {
            state.failing_copies -= 1;
            return Err(Errno::EFAULT);
        }
        for i in 0..segments.raw_mut().len() {
            let status = copy_one(&mut state, segments, i)?;
            segments.raw_mut()[i].status = status;
        }
        Ok(())
    }
}

/// Does one copy: its status. An error fails all of the call, as in the kernel.
fn copy_one(state: &mut State, segments: &mut Segments<'_>, index: usize) -> Result<i16, Errno> {
    let CopySegment { source, dest, len, flags, .. } = segments.raw_mut()[index];
    let theirs = match flags {
        SOURCE_GREF => source,
        DEST_GREF => dest,
        // From one granted page to another the kernel can; nobody here asks for it.
        _ => return Err(Errno::EINVAL),
    };
    let (gref, offset, domid) = (theirs as u32, (theirs >> 32) as u16, (theirs >> 48) as u16);
    if usize::from(offset) + usize::from(len) > PAGE {
        return Err(Errno::EINVAL);
    }
    if len == 0 {
        return Ok(GNTST_OKAY);
    }
    let Some(domain) = state.domains.get_mut(&domid) else { return Ok(GNTST_BAD_DOMAIN) };
    if look(&mut domain.paged_out, gref) {
        return Ok(GNTST_EAGAIN);
    }
    Ok(match domain.grants.find(gref) {
        None => GNTST_BAD_GNTREF,
        // Not "permission denied", as one would think.
        Some((_, true)) if flags == DEST_GREF => GNTST_GENERAL_ERROR,
        Some((page, _)) if page as usize >= domain.memory.len() / PAGE => GNTST_GENERAL_ERROR,
        Some((page, _)) => {
            let at = page as usize * PAGE + usize::from(offset);
            memory::copy(segments, index, &domain.memory, at);
            GNTST_OKAY
        }
    })
}

impl Drop for Device {
    fn drop(&mut self) {
        for (_, entry) in std::mem::take(&mut *self.entries.lock()) {
            self.end(&entry);
        }
    }
}
