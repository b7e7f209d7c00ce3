//! Format NVM (§5.23), and looking at the LBA formats that a namespace may be given.
//!
//! A task of the admin queue like others, but one that may take hours: Identify for the formats,
//! then the command; while it runs, Identify for its progress where the device tells; in the end
//! the namespaces are searched for anew. Nothing else is asked meanwhile.

use nvme_spec::{Cns, IdentifyNamespace, SecureErase, Sqe};

use super::serve::Task;
use super::{Controller, MS, Phase, State};
use crate::Error;
use crate::admin::{Job, Reply};
use crate::bar::Bar;
use crate::clock::Clock;

/// How often progress is asked for.
const LOOK_PERIOD: u64 = 1_000 * MS;

/// An LBA format that a namespace may be given (§5.15.2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockFormat {
    /// Its number, 0 to 15.
    pub index: u8,
    /// Bytes of data in a block.
    pub block_size: u64,
    /// Bytes of metadata beside each block; this driver uses formats without any.
    pub metadata: u16,
    /// Relative performance: 0 best, 3 degraded.
    pub performance: u8,
    /// The namespace has it now.
    pub in_use: bool,
}

/// What to format, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    /// The namespace.
    pub nsid: u32,
    /// Bytes of a block afterwards; as it is now if `None`.
    pub block_size: Option<u32>,
    /// What becomes of the old data.
    pub erase: SecureErase,
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Wanted,
    /// Identify was sent.
    Identify,
    /// The command was sent.
    Runs {
        /// When to ask for progress next; `None` if the device does not tell.
        look: Option<u64>,
        /// It was asked for.
        looking: bool,
    },
    /// The search for namespaces runs.
    Scan,
    Done,
}

/// A format, or a look at formats, that is under way.
pub(super) struct Formatting {
    nsid: u32,
    /// `None`: only the formats are looked at.
    format: Option<Format>,
    stage: Stage,
    formats: Vec<BlockFormat>,
    /// Percent that remain.
    remains: Option<u8>,
    /// How the command ended.
    result: Option<Result<(), Error>>,
}

impl<B: Bar> Controller<B> {
    /// The LBA formats that a namespace may be given, also one that cannot be used as it is.
    ///
    /// # Errors
    /// If there is no such namespace, or the controller does not say.
    pub fn block_formats(
        &mut self,
        nsid: u32,
        clock: &mut impl Clock,
    ) -> Result<Vec<BlockFormat>, Error> {
        self.work_on(nsid, None, clock, &mut |_| ()).map(|f| f.formats)
    }

    /// The namespaces that a format touches: the one, or all that are seen if the controller
    /// formats or erases them together (FNA, §5.15.2.2). It means those of the whole NVM subsystem
    /// then, also such as are attached to other controllers only.
    pub fn format_touches(&self, nsid: u32, erase: SecureErase) -> Vec<u32> {
        let fna = self.info.as_ref().map(|i| i.fna).unwrap_or_default();
        let all = fna.format_all() == 1 || (erase != SecureErase::None && fna.erase_all() == 1);
        if !all {
            return vec![nsid];
        }
        let used = self.namespaces.iter().map(|n| n.nsid);
        let mut ids: Vec<u32> = used.chain(self.refused.iter().map(|r| r.nsid)).collect();
        ids.sort_unstable();
        ids
    }

    /// Formats a namespace: all data of it is lost. Waits for the end, which may take hours, and
    /// calls `progress` now and then with the percentage that remains, if the device tells it.
    /// Afterwards [`Controller::namespaces`] is what was found then.
    ///
    /// # Errors
    /// If queue pairs are there (nothing was done then), if the controller cannot do it or refuses
    /// it, or if it was lost meanwhile; the data may be lost nevertheless.
    pub fn format(
        &mut self,
        what: &Format,
        clock: &mut impl Clock,
        mut progress: impl FnMut(Option<u8>),
    ) -> Result<(), Error> {
        let (Phase::Ready, Some(info)) = (&self.phase, &self.info) else {
            return Err(Error::NotOpen);
        };
        let impossible = |why: &str| Err(Error::NotPossible(why.to_owned()));
        if info.oacs.format() == 0 {
            return impossible("the controller has no Format NVM");
        }
        if what.erase == SecureErase::Crypto && info.fna.crypto() == 0 {
            return impossible("the controller has no cryptographic erase");
        }
        if let Some(q) = self.queues.iter().find(|q| !q.link.is_dropped()) {
            return Err(Error::Busy { qid: q.qid });
        }
        let done = self.work_on(what.nsid, Some(*what), clock, &mut progress)?;
        done.result.unwrap_or(Err(Error::NotOpen))
    }

    fn work_on(
        &mut self,
        nsid: u32,
        format: Option<Format>,
        clock: &mut impl Clock,
        progress: &mut dyn FnMut(Option<u8>),
    ) -> Result<Formatting, Error> {
        if !matches!(self.phase, Phase::Ready) {
            return Err(Error::NotOpen);
        }
        let (stage, formats) = (Stage::Wanted, Vec::new());
        let fresh = Formatting { nsid, format, stage, formats, remains: None, result: None };
        self.service.format = Some(fresh);
        loop {
            let state = self.step(clock.now());
            // After trouble the controller begins service anew and knows nothing of this.
            let work = self.service.format.take_if(|w| w.stage == Stage::Done);
            match (work, &self.service.format) {
                (Some(work), _) if work.result.is_some() || format.is_none() => {
                    return match &work.result {
                        Some(Err(e)) => Err(e.clone()),
                        _ => Ok(work),
                    };
                }
                (None, Some(work)) if state == State::Ready => {
                    if let Stage::Runs { .. } = work.stage {
                        progress(work.remains);
                    }
                    clock.pause();
                }
                _ => {
                    self.service.format = None;
                    return Err(self.error.clone().unwrap_or(Error::NotOpen));
                }
            }
        }
    }

    /// Begins what is wanted, if it is time. Called when no task is under way.
    pub(super) fn format_begin(&mut self, now: u64) -> bool {
        let queues = !self.queues.is_empty();
        let Some(work) = &mut self.service.format else { return false };
        // Queues of queue pairs that were dropped are being deleted first.
        if work.stage != Stage::Wanted || (work.format.is_some() && queues) {
            return false;
        }
        work.stage = Stage::Identify;
        let nsid = work.nsid;
        self.service.task = Some(Task::Format);
        self.send_identify(now, "Identify (namespace)", Cns::Namespace, nsid);
        true
    }

    /// The answer to an Identify of this task.
    pub(super) fn format_identified(&mut self, now: u64, reply: &Reply) {
        let data = self.admin.data::<IdentifyNamespace>();
        let Some(work) = &mut self.service.format else { return };
        let looked = match (reply.ok(), data) {
            (Ok(_), Some(id)) if id.nsze.get() > 0 => Ok(id),
            (Ok(_), _) => Err(Error::NotPossible(format!("there is no namespace {}", work.nsid))),
            (Err(e), _) => Err(e),
        };
        self.service.task = Some(Task::Format);
        match (work.stage, looked) {
            (Stage::Runs { .. }, looked) => {
                let look = Some(now.saturating_add(LOOK_PERIOD));
                work.stage = Stage::Runs { look, looking: false };
                if let Ok(id) = looked {
                    work.remains = Some((id.fpi & 0x7f).min(100));
                }
                self.format_ended(now);
            }
            (_, Err(e)) => {
                work.result = Some(Err(e));
                self.format_done();
            }
            (_, Ok(id)) => {
                work.formats = list(&id);
                match work.format.map(|f| choose(&f, &work.formats)) {
                    None => self.format_done(),
                    Some(Err(e)) => {
                        work.result = Some(Err(e));
                        self.format_done();
                    }
                    Some(Ok((format, index))) => {
                        let told = id.fpi & IdentifyNamespace::FPI_SUPPORTED != 0;
                        let look = told.then(|| now.saturating_add(LOOK_PERIOD));
                        work.stage = Stage::Runs { look, looking: false };
                        // Whatever comes of it: the namespaces are to be found anew.
                        self.changing = None;
                        let sent = self.admin.send(now, Job::Format, "Format NVM", |cid| {
                            Sqe::format_nvm(cid, format.nsid, index, format.erase)
                        });
                        debug_assert!(sent, "the admin queue is full");
                    }
                }
            }
        }
    }

    /// The answer to the command itself.
    pub(super) fn format_reply(&mut self, now: u64, reply: &Reply) {
        self.admin.give_time(now);
        if let Some(work) = &mut self.service.format {
            work.result = Some(reply.ok().map(drop));
            self.format_ended(now);
        }
    }

    /// Searches for the namespaces, when the command and the last look are answered.
    fn format_ended(&mut self, now: u64) {
        let Some(work) = &mut self.service.format else { return };
        if work.result.is_none() || matches!(work.stage, Stage::Runs { looking: true, .. }) {
            return;
        }
        work.stage = Stage::Scan;
        self.service.rescan = false;
        self.service.task = Some(Task::Scan);
        self.scan_begin(now);
    }

    /// The search has ended.
    pub(super) fn format_scanned(&mut self) {
        if self.service.format.as_ref().is_some_and(|w| w.stage == Stage::Scan) {
            self.format_done();
        }
    }

    fn format_done(&mut self) {
        self.service.task = None;
        if let Some(work) = &mut self.service.format {
            work.stage = Stage::Done;
        }
    }

    /// Asks for progress, when it is time.
    pub(super) fn format_look(&mut self, now: u64) {
        let Some(work) = &mut self.service.format else { return };
        if let Stage::Runs { look: Some(at), looking: false } = work.stage
            && now >= at
        {
            work.stage = Stage::Runs { look: Some(at), looking: true };
            let nsid = work.nsid;
            self.send_identify(now, "Identify (format progress)", Cns::Namespace, nsid);
        }
    }
}

fn list(id: &IdentifyNamespace) -> Vec<BlockFormat> {
    let current = (id.flbas & 0xf) | (id.flbas >> 5 & 3) << 4;
    (0..)
        .zip(&id.lbaf)
        .take(usize::from(id.nlbaf) + 1)
        .filter_map(|(index, f)| {
            // 0 marks a format that is not available; the least is 9.
            let block_size = 1u64.checked_shl(f.lbads.into()).filter(|_| f.lbads >= 9)?;
            let (metadata, performance) = (f.metadata.get(), f.rp & 3);
            Some(BlockFormat { index, block_size, metadata, performance, in_use: index == current })
        })
        .collect()
}

/// The format to give: without metadata, the fastest of those with the block size.
fn choose(format: &Format, list: &[BlockFormat]) -> Result<(Format, u8), Error> {
    let now = list.iter().find(|f| f.in_use).map(|f| f.block_size);
    let wanted = format.block_size.map(u64::from).or(now);
    let fits = |f: &&BlockFormat| Some(f.block_size) == wanted && f.metadata == 0;
    let best = list.iter().filter(fits).min_by_key(|f| (f.performance, !f.in_use));
    match (best, wanted) {
        (Some(best), _) => Ok((*format, best.index)),
        (None, _) => {
            let name = |f: &BlockFormat| match f.metadata {
                0 => f.block_size.to_string(),
                m => format!("{} with {m} of metadata", f.block_size),
            };
            let wanted = wanted.map_or("its present number of".to_owned(), |w| w.to_string());
            Err(Error::NotPossible(format!(
                "namespace {} cannot have blocks of {wanted} bytes without metadata; it can have: {}",
                format.nsid,
                list.iter().map(name).collect::<Vec<_>>().join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::IDENTIFY_SIZE;
    use zerocopy::FromBytes;

    fn identify(flbas: u8, formats: &[(u16, u8, u8)]) -> Vec<BlockFormat> {
        let mut bytes = [0u8; IDENTIFY_SIZE];
        bytes[25] = (formats.len() as u8).wrapping_sub(1);
        bytes[26] = flbas;
        for (at, &(metadata, lbads, rp)) in (128..).step_by(4).zip(formats) {
            bytes[at..at + 2].copy_from_slice(&metadata.to_le_bytes());
            bytes[at + 2] = lbads;
            bytes[at + 3] = rp;
        }
        list(&IdentifyNamespace::read_from_bytes(&bytes).unwrap())
    }

    #[test]
    fn the_fastest_format_without_metadata_is_taken() {
        let formats = identify(1, &[(0, 9, 2), (8, 9, 0), (0, 9, 1), (0, 12, 0), (0, 0, 0)]);
        assert_eq!(formats.len(), 4, "one is not available");
        let take = |block_size| {
            let format = Format { nsid: 1, block_size, erase: SecureErase::None };
            choose(&format, &formats).map(|c| c.1)
        };
        assert_eq!((take(Some(512)), take(Some(4096))), (Ok(2), Ok(3)));
        assert_eq!(take(None), Ok(2), "from metadata to none of the same block size");
        let text = take(Some(8192)).unwrap_err().to_string();
        assert!(text.contains("8192 bytes") && text.contains("512 with 8 of metadata"), "{text}");
    }

    #[test]
    fn nonsense_is_no_format() {
        assert!(identify(0, &[(0, 64, 0), (0, 255, 0), (0, 8, 0)]).is_empty());
        let many: Vec<_> = (0..16).map(|_| (0, 9, 3)).collect();
        let formats = identify(0x2f, &many);
        assert!(formats.len() == 16 && !formats.iter().any(|f| f.in_use), "index 31 is in use");
        let mut bytes = [0xff; IDENTIFY_SIZE];
        bytes[25] = 255;
        assert!(list(&IdentifyNamespace::read_from_bytes(&bytes).unwrap()).is_empty());
        let format = Format { nsid: 1, block_size: None, erase: SecureErase::None };
        assert!(choose(&format, &[]).is_err());
    }
}
