//! [`AdminQueue`]: the admin submission and completion queue (§4.1), and the commands on it.
//!
//! Belongs to the controller, on its thread. Few commands, no hurry; but the same rules as for I/O:
//! a completion is followed only if it names a command in flight under exactly this CID.

use std::sync::Arc;

use dma::Region;
use nvme_spec::{CQE_SIZE, IDENTIFY_SIZE, SQE_SIZE, Sqe, Status};
use zerocopy::FromBytes;

use crate::Error;
use crate::bar::Doorbell;
use crate::memory::{DeviceMemory, Mapping};
use crate::ring::{CompletionRing, SubmissionRing};
use crate::shadow::Bell;

/// Entries of each ring: within one page whatever the page size.
pub(crate) const ENTRIES: u32 = 32;

/// How long an admin command may take, in nanoseconds.
pub(crate) const TIMEOUT: u64 = 15_000_000_000;

/// How long Format NVM may take, in nanoseconds: a drive that overwrites all of itself takes hours.
pub(crate) const FORMAT_TIMEOUT: u64 = 12 * 3600 * 1_000_000_000;

/// For whom an admin command is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Job {
    /// The step of bring-up, or the task, that is under way: one at a time, so it knows which.
    Step,
    /// An Asynchronous Event Request: stays out until there is an event.
    Event,
    /// An Abort.
    Abort,
    /// A Format NVM: takes long, and so does all else meanwhile.
    Format,
}

/// The answer to an admin command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    pub(crate) job: Job,
    pub(crate) what: &'static str,
    pub(crate) status: Status,
    pub(crate) result: u32,
}

impl Reply {
    /// The result, if the command succeeded.
    pub(crate) fn ok(&self) -> Result<u32, Error> {
        if self.status.is_success() {
            Ok(self.result)
        } else {
            Err(Error::Command { what: self.what, status: self.status })
        }
    }
}

#[derive(Clone, Copy)]
struct Slot {
    /// CID of this or the next use: the slot below, a generation above.
    cid: u16,
    /// What is in flight here, and since when.
    sent: Option<(Job, &'static str, u64)>,
}

const GENERATION: u16 = ENTRIES as u16;

/// The admin queue, with one page of data for the one command at a time that has any.
pub(crate) struct AdminQueue<D> {
    memory: Arc<Mapping>,
    page: usize,
    sq: SubmissionRing<D>,
    cq: CompletionRing<D>,
    slots: [Slot; ENTRIES as usize - 1],
    /// Completions that named no command in flight.
    pub(crate) stale: u64,
}

impl<D: Doorbell> AdminQueue<D> {
    pub(crate) fn new(
        memory: &Arc<DeviceMemory>,
        sq_doorbell: D,
        cq_doorbell: D,
    ) -> Result<AdminQueue<D>, Error> {
        const { assert!(ENTRIES as usize * SQE_SIZE <= 4096) };
        const { assert!(ENTRIES as usize * CQE_SIZE <= 4096) };
        let failed = |why: String| Error::Memory { what: "the admin queue", why };
        let page = 1usize << memory.page_shift();
        let region = Region::new_best(3 * page).map_err(|e| failed(e.to_string()))?;
        let memory = memory.map(&region).map_err(failed)?;
        let slot = |i: usize| Slot { cid: i as u16, sent: None };
        Ok(AdminQueue {
            memory,
            page,
            sq: SubmissionRing::new(region.clone(), 0, ENTRIES, Bell::plain(sq_doorbell)),
            cq: CompletionRing::new(region, page, ENTRIES, Bell::plain(cq_doorbell)),
            slots: std::array::from_fn(slot),
            stale: 0,
        })
    }

    /// The memory, to be kept if the device cannot be stopped.
    pub(crate) fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Bus addresses of the submission queue, the completion queue and the data page.
    pub(crate) fn bus(&self) -> [u64; 3] {
        [0, self.page, 2 * self.page].map(|at| self.memory.bus(at as u64))
    }

    /// Back to empty rings; whatever was in flight is no more. The device must be disabled.
    pub(crate) fn reset(&mut self) {
        self.memory.region().zero(0, 2 * self.page);
        self.sq.reset();
        self.cq.reset();
        for slot in &mut self.slots {
            if slot.sent.take().is_some() {
                slot.cid = slot.cid.wrapping_add(GENERATION);
            }
        }
    }

    /// Sends a command, at once. `false` if too many are out.
    pub(crate) fn send(
        &mut self,
        now: u64,
        job: Job,
        what: &'static str,
        make: impl FnOnce(u16) -> Sqe,
    ) -> bool {
        let Some(slot) = self.slots.iter_mut().find(|s| s.sent.is_none()) else { return false };
        slot.sent = Some((job, what, now));
        self.sq.push(make(slot.cid));
        self.sq.ring();
        true
    }

    /// The next answer, if there is one.
    pub(crate) fn reap(&mut self) -> Option<Reply> {
        // As many as the ring holds: a device that floods it does not hold us here.
        for _ in 0..ENTRIES {
            let entry = self.cq.peek()?;
            let result = self.cq.result();
            self.cq.advance();
            self.cq.tell();
            let slot = self.slots.get_mut(usize::from(entry.cid() % GENERATION));
            if let Some(slot) = slot.filter(|s| s.cid == entry.cid())
                && let Some((job, what, _)) = slot.sent.take()
            {
                slot.cid = slot.cid.wrapping_add(GENERATION);
                return Some(Reply { job, what, status: Status::from_raw(entry.status()), result });
            }
            self.stale += 1;
        }
        None
    }

    /// How many commands of a kind are out.
    pub(crate) fn count(&self, job: Job) -> usize {
        self.slots.iter().filter(|s| s.sent.is_some_and(|(j, ..)| j == job)).count()
    }

    /// A command that is out for too long, if there is one.
    pub(crate) fn late(&self, now: u64) -> Result<(), Error> {
        // Some controllers answer nothing else while they format.
        let limit = if self.count(Job::Format) > 0 { FORMAT_TIMEOUT } else { TIMEOUT };
        let late = self
            .slots
            .iter()
            .filter_map(|s| s.sent)
            .find(|&(job, _, sent)| job != Job::Event && now.saturating_sub(sent) >= limit);
        match late {
            Some((_, what, _)) => Err(Error::NoAnswer { what, ms: limit / 1_000_000 }),
            None => Ok(()),
        }
    }

    /// Gives the commands that are out their whole time again.
    pub(crate) fn give_time(&mut self, now: u64) {
        for (_, _, sent) in self.slots.iter_mut().filter_map(|s| s.sent.as_mut()) {
            *sent = now;
        }
    }

    /// A copy of what the last command put into the data page.
    pub(crate) fn data<T: FromBytes>(&self) -> Option<T> {
        let mut bytes = [0; IDENTIFY_SIZE];
        self.memory.region().read(2 * self.page, &mut bytes);
        T::read_from_prefix(&bytes).ok().map(|(t, _)| t)
    }

    /// Empties the data page, so that a device that writes too little leaves nothing old there.
    pub(crate) fn clear_data(&self) {
        self.memory.region().zero(2 * self.page, IDENTIFY_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::FakeMapper;
    use crate::memory::{DeviceMemory, IovaMap};
    use nvme_spec::Cqe;
    use zerocopy::IntoBytes;

    struct Deaf;
    impl Doorbell for Deaf {
        fn ring(&self, _: u32) {}
    }

    struct Device {
        region: Arc<Region>,
        at: usize,
        phase: bool,
    }

    impl Device {
        fn post(&mut self, cid: u16, result: u32) {
            let cqe = Cqe::new(result, 0, 0, cid, Status::SUCCESS, self.phase);
            self.region.write(4096 + self.at * 16, cqe.as_bytes());
            self.at = (self.at + 1) % ENTRIES as usize;
            self.phase ^= self.at == 0;
        }
    }

    fn queue() -> (AdminQueue<Deaf>, Device) {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(0x10_0000));
        let memory = DeviceMemory::new(mapper, 12);
        let q = AdminQueue::new(&memory, Deaf, Deaf).unwrap();
        let region = q.memory.region().clone();
        (q, Device { region, at: 0, phase: true })
    }

    #[test]
    fn answers_find_their_commands_in_any_order() {
        let (mut q, mut d) = queue();
        assert_eq!(q.bus(), [0x10_0000, 0x10_1000, 0x10_2000]);
        let mut cids = Vec::new();
        for what in ["a", "b", "c"] {
            assert!(q.send(0, Job::Step, what, |cid| {
                cids.push(cid);
                Sqe::new(0, cid, 0)
            }));
        }
        d.post(cids[2], 5);
        d.post(cids[0], 6);
        let (x, y) = (q.reap().unwrap(), q.reap().unwrap());
        assert_eq!((x.what, x.ok(), y.what, y.ok()), ("c", Ok(5), "a", Ok(6)));
        assert!(q.reap().is_none());
        d.post(cids[0], 6);
        d.post(0xffff, 6);
        d.post(31, 6);
        assert!(q.reap().is_none());
        assert_eq!((q.stale, q.count(Job::Step)), (3, 1));
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let (mut q, mut d) = queue();
        let mut cids = Vec::new();
        while q.send(0, Job::Event, "event", |cid| {
            cids.push(cid);
            Sqe::async_event_request(cid)
        }) {}
        assert_eq!((cids.len(), q.count(Job::Event)), (31, 31));
        d.post(cids[7], 0);
        assert_eq!(q.reap().unwrap().job, Job::Event);
        assert!(q.send(0, Job::Step, "x", |cid| {
            assert!(cid != cids[7] && cid % 32 == cids[7]);
            Sqe::new(0, cid, 0)
        }));
        q.reset();
        assert_eq!((q.count(Job::Event), q.count(Job::Step)), (0, 0));
    }

    #[test]
    fn only_events_may_take_for_ever() {
        let (mut q, _) = queue();
        q.send(10, Job::Event, "event", Sqe::async_event_request);
        assert_eq!(q.late(u64::MAX), Ok(()));
        q.send(10, Job::Step, "Identify", |cid| Sqe::new(0, cid, 0));
        assert_eq!(q.late(TIMEOUT + 9), Ok(()));
        assert!(matches!(q.late(TIMEOUT + 10), Err(Error::NoAnswer { what: "Identify", .. })));
        // While a format runs all may take as long; afterwards the usual time begins.
        q.send(20, Job::Format, "Format NVM", |cid| Sqe::new(0, cid, 0));
        assert_eq!(q.late(FORMAT_TIMEOUT), Ok(()));
        assert!(q.late(FORMAT_TIMEOUT + 20).is_err());
        q.give_time(FORMAT_TIMEOUT);
        assert_eq!(q.late(FORMAT_TIMEOUT + TIMEOUT), Ok(()));
    }
}
