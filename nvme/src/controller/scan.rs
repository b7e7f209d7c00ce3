//! Finding the namespaces: the active list (§5.15.2.3), then Identify for each. Used when the
//! controller is brought up, and again when it says that something changed.

use nvme_spec::{
    Cns, IdentifyNamespace, MAX_ACTIVE_NAMESPACES, NamespaceList, Sqe, StatusCode, Version,
};

use super::Controller;
use crate::Error;
use crate::admin::{Job, Reply};
use crate::bar::Bar;
use crate::identify::{Namespace, Refused};

/// Most namespaces that are looked at; there is no drive with more.
const MAX_NAMESPACES: usize = MAX_ACTIVE_NAMESPACES;

/// How far the search has come.
#[derive(Default)]
pub(super) struct Scan {
    /// The list is complete, and the namespaces are being identified.
    listed: bool,
    ids: Vec<u32>,
    at: usize,
    found: Vec<Namespace>,
    refused: Vec<Refused>,
}

impl<B: Bar> Controller<B> {
    /// Begins the search with its first command.
    pub(super) fn scan_begin(&mut self, now: u64) {
        self.scan = Scan::default();
        // Revision 1.0 has no list (§5.15: CNS 02h came with 1.1).
        if self.info_ref().version.0 < Version(0x0001_0100).0 {
            self.scan_every_id();
            self.scan_next(now);
        } else {
            self.send_identify(now, "Identify (active namespaces)", Cns::ActiveNamespaces, 0);
        }
    }

    /// Without a list: every identifier up to NN may be a namespace. One is asked about even if
    /// NN is 0: a search without a single command would get no answer to end with.
    fn scan_every_id(&mut self) {
        let last = self.info_ref().namespaces.clamp(1, MAX_NAMESPACES as u32);
        self.scan.ids = (1..=last).collect();
        self.scan.listed = true;
    }

    /// Takes an answer; `true` when the search is over and its result was taken over.
    pub(super) fn scan_reply(&mut self, now: u64, reply: Reply) -> Result<bool, Error> {
        if self.scan.listed {
            self.scan_namespace(&reply);
        } else {
            self.scan_list(&reply)?;
        }
        if self.scan_next(now) {
            return Ok(false);
        }
        self.scan_settle();
        Ok(true)
    }

    fn scan_list(&mut self, reply: &Reply) -> Result<(), Error> {
        if let Err(e) = reply.ok() {
            return match reply.status.code() {
                StatusCode::INVALID_FIELD | StatusCode::INVALID_OPCODE => {
                    self.scan_every_id();
                    Ok(())
                }
                _ => Err(e),
            };
        }
        // One page of them is more than any drive has; what is beyond is not looked at.
        let list: Option<NamespaceList> = self.admin.data();
        for id in list.iter().flat_map(NamespaceList::iter) {
            // Ascending, or the list is nonsense.
            if self.scan.ids.last().is_some_and(|&last| id <= last) {
                break;
            }
            self.scan.ids.push(id);
        }
        self.scan.listed = true;
        Ok(())
    }

    /// Asks about the next namespace; `false` if there is none.
    fn scan_next(&mut self, now: u64) -> bool {
        let Some(&nsid) = self.scan.ids.get(self.scan.at) else { return false };
        self.send_identify(now, "Identify (namespace)", Cns::Namespace, nsid);
        true
    }

    fn scan_namespace(&mut self, reply: &Reply) {
        let Some(&nsid) = self.scan.ids.get(self.scan.at) else { return };
        self.scan.at += 1;
        let looked = match (reply.ok(), self.admin.data::<IdentifyNamespace>()) {
            (Err(e), _) => Err(e.to_string()),
            (_, None) => Err("no data".to_owned()),
            // Inactive (§5.15.2.1): all zero.
            (Ok(_), Some(id)) if id.nsze.get() == 0 => return,
            (Ok(_), Some(id)) => Namespace::new(nsid, &id, self.info_ref()),
        };
        match looked {
            Ok(ns) => self.scan.found.push(ns),
            Err(why) => self.scan.refused.push(Refused { nsid, why }),
        }
    }

    /// Takes the result over: all of it the first time; afterwards what changed about the
    /// namespaces that are open.
    fn scan_settle(&mut self) {
        let Scan { found, refused, .. } = std::mem::take(&mut self.scan);
        self.refused = refused;
        let Some(changing) = self.changing.clone() else {
            self.changing =
                Some(found.iter().map(|n| crate::units::Changing::new(&n.info)).collect());
            self.namespaces = found;
            return;
        };
        let mut changed = false;
        let name = self.name().to_owned();
        for (old, state) in self.namespaces.iter_mut().zip(changing.iter()) {
            let same = found.iter().find(|n| {
                n.nsid == old.nsid
                    && n.block_shift == old.block_shift
                    && (n.nguid, n.eui64) == (old.nguid, old.eui64)
            });
            let (size, read_only) = match same {
                Some(new) => (new.info.size, new.info.read_only || self.media_read_only),
                None => (0, old.info.read_only),
            };
            if state.set(size, read_only, same.is_none()) {
                log::warn!(
                    "nvme {name}: namespace {} is now {}",
                    old.nsid,
                    if same.is_some() { format!("{size} bytes") } else { "gone".to_owned() }
                );
                changed = true;
            }
            old.info.size = size;
            old.info.read_only = read_only;
        }
        for new in &found {
            if !self.namespaces.iter().any(|n| n.nsid == new.nsid) {
                log::info!("nvme {name}: namespace {} is new; open again to use it", new.nsid);
            }
        }
        if changed {
            self.publish();
        }
    }

    /// Sends an Identify whose data comes into the data page.
    pub(super) fn send_identify(&mut self, now: u64, what: &'static str, cns: Cns, nsid: u32) {
        self.admin.clear_data();
        let data = self.admin.bus()[2];
        self.send_step(now, what, |cid| Sqe::identify(cid, cns, nsid).with_prps(data, 0));
    }

    /// Sends the command of the step or task under way.
    pub(super) fn send_step(
        &mut self,
        now: u64,
        what: &'static str,
        make: impl FnOnce(u16) -> Sqe,
    ) {
        // One step at a time, one abort, and at most `MAX_EVENTS`: there is always a slot.
        let sent = self.admin.send(now, Job::Step, what, make);
        debug_assert!(sent, "the admin queue is full");
    }
}
