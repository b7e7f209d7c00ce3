//! [`Controller`]: the state machine and its life from enable to reset.
//!
//! Owned by whoever steps it: a thread ([`crate::ThreadDriver`]), a simulation, or the thread of
//! the host itself, turn by turn. Never blocks but for the files behind its namespaces.

use std::io;
use std::sync::Arc;

use dma::Region;
use nvme_spec::{Cc, Csts, IoOpcode, ShutdownStatus, Status, StatusCode, Version};

use crate::commands::{Extra, InFlight};
use crate::config::{ConfigError, Options};
use crate::events::Events;
use crate::features::Features;
use crate::logs::ErrorLog;
use crate::memory::{DmaFault, HostMemory};
use crate::namespace::{Namespace, NamespaceConfig};
use crate::prp::Span;
use crate::queues::{Cq, Queues, Sq};
use crate::registers::Registers;
use crate::rng::Rng;
use crate::shadow::Shadow;
use crate::stats::Stats;
use crate::store::Store;

/// Result dword of a command, or the status it fails with.
pub(crate) type Answer = Result<u32, Status>;

/// The status for a command that will fail again.
pub(crate) fn deny(code: StatusCode) -> Status {
    Status::fatal(code)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// CC.EN is 0.
    Disabled,
    /// CC.EN is 1, but CSTS.RDY never comes (fault `stuck`).
    Stuck,
    Ready,
    /// CSTS.CFS.
    Failed,
    ShutDown,
    /// Surprise removal.
    Gone,
}

/// What SMART tells of the life of the device.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) power_cycles: u64,
    pub(crate) unsafe_shutdowns: u64,
    pub(crate) media_errors: u64,
    pub(crate) critical_warning: u8,
}

/// An NVMe controller over host memory `M`.
#[derive(Debug)]
pub struct Controller<M> {
    pub(crate) regs: Arc<Registers>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) mem: M,
    pub(crate) options: Options,
    pub(crate) namespaces: Vec<Namespace>,
    pub(crate) queues: Queues,
    pub(crate) features: Features,
    pub(crate) events: Events,
    pub(crate) errors: ErrorLog,
    pub(crate) life: Life,
    /// Doorbells in host memory, if the host offered them since the last reset.
    pub(crate) shadow: Option<Shadow>,
    pub(crate) cc: Cc,
    /// Memory page size in bytes, as CC.MPS said when the controller was enabled.
    pub(crate) page: u64,
    /// Spans of the command at hand; kept to save the allocation.
    pub(crate) spans: Vec<Span>,
    pub(crate) last_fault: Option<DmaFault>,
    pub(crate) state: State,
    /// There may be work that no register tells of: the next step must look.
    pub(crate) unsettled: bool,
    cc_cell: u64,
    pub(crate) stray_seen: u32,
    pub(crate) in_flight: Vec<InFlight>,
    pub(crate) extras: Vec<Extra>,
    pub(crate) shuffle: Option<Rng>,
    pub(crate) steps: u64,
    pub(crate) now_ns: u64,
}

impl<M: HostMemory> Controller<M> {
    /// A controller that has just got power. The first of `namespaces` has identifier 1.
    ///
    /// # Errors
    /// If an option is out of its range.
    pub fn new(
        options: Options,
        namespaces: Vec<NamespaceConfig>,
        mem: M,
    ) -> Result<Controller<M>, ConfigError> {
        Controller::make(options, namespaces, mem, None)
    }

    /// The same with doorbells in memory that another process may write: `bar` is laid out as BAR0,
    /// of which only the doorbells (from 4096 on) are used. Writes to doorbells of queues that do not
    /// exist are not noticed then.
    ///
    /// # Errors
    /// If an option is out of its range, or `bar` shorter than [`Options::bar_len`].
    pub fn with_shared_doorbells(
        options: Options,
        namespaces: Vec<NamespaceConfig>,
        mem: M,
        bar: Arc<Region>,
    ) -> Result<Controller<M>, ConfigError> {
        Controller::make(options, namespaces, mem, Some(bar))
    }

    fn make(
        options: Options,
        namespaces: Vec<NamespaceConfig>,
        mem: M,
        bar: Option<Arc<Region>>,
    ) -> Result<Controller<M>, ConfigError> {
        options.check(&namespaces)?;
        if let Some(bar) = &bar
            && (bar.len() as u64) < options.bar_len()
        {
            let (name, value) = ("bar", bar.len() as u64);
            return Err(ConfigError::Range { name, value, allowed: "the length of BAR0" });
        }
        let regs = Registers::new(options.cap(), Version::V1_4, options.queues, bar);
        let namespaces = namespaces
            .into_iter()
            .map(|n| Namespace::new(n, options.cache_bytes, options.vwc))
            .collect();
        Ok(Controller {
            regs: Arc::new(regs),
            stats: Arc::default(),
            mem,
            namespaces,
            queues: Queues::new(options.queues),
            features: Features::new(&options),
            events: Events::new(options.aerl),
            errors: ErrorLog::default(),
            life: Life { power_cycles: 1, ..Life::default() },
            shadow: None,
            cc: Cc(0),
            page: 4096,
            spans: Vec::new(),
            last_fault: None,
            state: State::Disabled,
            unsettled: false,
            cc_cell: 0,
            stray_seen: 0,
            in_flight: Vec::new(),
            extras: Vec::new(),
            shuffle: options.shuffle.map(Rng::new),
            steps: 0,
            now_ns: 0,
            options,
        })
    }

    /// The registers, for the host.
    pub fn registers(&self) -> &Arc<Registers> {
        &self.regs
    }

    /// The counters, for anybody.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// The last access to a bus address that nothing was mapped at.
    pub fn last_fault(&self) -> Option<DmaFault> {
        self.last_fault
    }

    /// Whether commands were taken that wait to be carried out (delayed or shuffled).
    pub fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether a fault needs the time that [`Controller::step`] is given.
    pub fn wants_time(&self) -> bool {
        self.options.faults.wants_time()
    }

    /// One turn: takes note of what the host wrote to the registers, takes up to 16 commands
    /// of each submission queue whose completions have room, carries them out, posts completions
    /// and events. Returns whether there was anything to do. `now_ns` is a time in nanoseconds
    /// that does not go backwards; it matters only if [`Controller::wants_time`].
    #[inline]
    pub fn step(&mut self, now_ns: u64) -> bool {
        self.steps += 1;
        if !self.unsettled
            && self.regs.cc_cell() == self.cc_cell
            && self.regs.stray_doorbells() == self.stray_seen
            && self.queues.quiet(&self.regs)
        {
            return false;
        }
        self.work(now_ns)
    }

    #[inline(never)]
    fn work(&mut self, now_ns: u64) -> bool {
        self.now_ns = now_ns;
        let mut busy = false;
        if self.regs.cc_cell() != self.cc_cell {
            self.control();
            busy = true;
        }
        self.unsettled = false;
        if self.regs.stray_doorbells() != self.stray_seen {
            self.note_stray_doorbells();
        }
        if self.state != State::Ready {
            return busy;
        }
        let mut at = 0;
        while at < self.queues.watch.len() {
            busy |= self.run_queue(at);
            at += 1;
        }
        if !self.in_flight.is_empty() {
            busy |= self.run_in_flight();
            self.unsettled = true;
        }
        if !self.extras.is_empty() {
            self.post_extras();
            self.unsettled = true;
        }
        if self.events.due() {
            self.post_events();
            self.unsettled |= self.events.due();
        }
        busy
    }

    // Life.

    #[cold]
    fn control(&mut self) {
        let (look, cell) = self.regs.take_cc();
        self.cc_cell = cell;
        if self.state == State::Gone {
            return;
        }
        if self.state != State::Disabled && (look.en_cleared || look.cc.en() == 0) {
            if self.options.faults.ignores_reset() {
                self.stats.injected.add(1);
            } else {
                self.reset();
            }
        }
        if self.state == State::Disabled && look.cc.en() == 1 {
            self.enable(look.cc);
        }
        self.cc = look.cc;
        let idle = self.regs.csts().shst() == ShutdownStatus::Normal.code();
        if look.cc.shn() != 0 && idle {
            self.shut_down();
        }
    }

    /// CC.EN went to 1 (§3.1.5, §7.6.1).
    fn enable(&mut self, cc: Cc) {
        self.regs.set_csts(Csts(0));
        if self.options.faults.never_ready() {
            self.stats.injected.add(1);
            self.state = State::Stuck;
            return;
        }
        let aqa = self.regs.aqa();
        let fine = cc.css() == 0
            && cc.ams() == 0
            && cc.mps() <= u32::from(self.options.mpsmax)
            && aqa.asqs() > 0
            && aqa.acqs() > 0;
        if !fine {
            self.fail();
            return;
        }
        self.page = 4096 << cc.mps();
        // The admin queue always has interrupts, and the first vector (§5.3).
        let acq = Cq::new(self.regs.acq(), aqa.acqs() + 1, Some(0));
        self.queues.add_cq(&self.regs, 0, acq);
        let asq = Sq::new(self.regs.asq(), aqa.asqs() + 1, 0);
        self.queues.add_sq(&self.regs, 0, asq);
        self.stray_seen = self.regs.stray_doorbells();
        self.state = State::Ready;
        self.regs.set_csts(Csts(0).with_rdy(1));
    }

    /// Fatal error: CSTS.CFS is set and nothing goes on until a reset (§9.5).
    pub(crate) fn fail(&mut self) {
        self.state = State::Failed;
        self.regs.set_csts(self.regs.csts().with_cfs(1));
    }

    /// CC.EN went to 0: all that is in flight is dropped (§7.3.2). What was written to the cache
    /// stays there.
    fn reset(&mut self) {
        self.forget();
        self.regs.set_csts(Csts(0));
        self.stats.resets.add(1);
    }

    /// A function level reset: all registers are back at their values after power-on, and what is in
    /// flight is dropped. What was written stays.
    pub fn function_reset(&mut self) {
        if self.state == State::Gone {
            return;
        }
        self.forget();
        self.regs.clear_control();
        self.cc_cell = self.regs.cc_cell();
        self.cc = Cc(0);
        self.stats.resets.add(1);
    }

    /// Host memory, as the controller reaches it.
    pub fn memory(&mut self) -> &mut M {
        &mut self.mem
    }

    /// Drops all state but the medium and the cache.
    fn forget(&mut self) {
        self.queues.clear(&self.regs);
        self.in_flight.clear();
        self.extras.clear();
        self.events = Events::new(self.options.aerl);
        self.features = Features::new(&self.options);
        self.shadow = None;
        for ns in &mut self.namespaces {
            ns.cached = self.options.vwc;
        }
        self.state = State::Disabled;
    }

    fn shut_down(&mut self) {
        if self.flush_all().is_err() {
            self.fail();
        } else if self.state == State::Ready {
            self.state = State::ShutDown;
        }
        self.regs.set_csts(self.regs.csts().with_shst(ShutdownStatus::Complete.code()));
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// What the files behind the namespaces say.
    pub fn flush_all(&mut self) -> io::Result<()> {
        self.namespaces.iter_mut().try_for_each(Namespace::flush)
    }

    /// The power goes and comes back. What was in the volatile cache survives, is lost or is torn
    /// at 512 bytes, write by write, as `seed` decides; so do writes that were taken but not
    /// completed. All registers are back at their values after power-on.
    ///
    /// # Errors
    /// What the files behind the namespaces say.
    pub fn power_cut(&mut self, seed: u64) -> io::Result<()> {
        for (i, ns) in self.namespaces.iter_mut().enumerate() {
            ns.power_cut(seed.wrapping_add(i as u64))?;
        }
        if self.state == State::Ready {
            for (i, flight) in std::mem::take(&mut self.in_flight).into_iter().enumerate() {
                if flight.sqid != 0 && flight.sqe.opcode() == IoOpcode::Write.code() {
                    self.cut_write(&flight.sqe, !seed, i as u64)?;
                }
            }
        }
        if self.state != State::ShutDown {
            self.life.unsafe_shutdowns += 1;
        }
        self.life.power_cycles += 1;
        if self.state != State::Gone {
            self.forget();
        }
        self.regs.clear_control();
        self.cc_cell = self.regs.cc_cell();
        self.cc = Cc(0);
        Ok(())
    }

    /// Surprise removal: from now on the registers read as ones and nothing is done any more.
    pub fn remove(&mut self) {
        self.regs.set_gone();
        self.forget();
        self.state = State::Gone;
    }

    /// Ends the model: makes everything durable and gives the stores back, in the order of the
    /// namespaces.
    ///
    /// # Errors
    /// What the files say; the stores are lost then.
    pub fn into_stores(mut self) -> io::Result<Vec<Store>> {
        self.flush_all()?;
        self.remove();
        Ok(self.namespaces.into_iter().map(Namespace::into_store).collect())
    }

    /// Reads bytes of a namespace as a Read command would see them. `None` if there is no such
    /// namespace or the range is not inside.
    ///
    /// # Errors
    /// What the file behind it says.
    pub fn peek(&mut self, nsid: u32, offset: u64, into: &mut [u8]) -> io::Result<Option<()>> {
        let Some(ns) = nsid.checked_sub(1).and_then(|i| self.namespaces.get_mut(i as usize)) else {
            return Ok(None);
        };
        match offset.checked_add(into.len() as u64) {
            Some(end) if end <= ns.blocks << ns.shift => ns.peek(offset, into).map(Some),
            _ => Ok(None),
        }
    }

    // Namespaces.

    /// Changes the size of a namespace, at least 1 block, and reports it to the host. Whether
    /// there is such a namespace and the size is possible.
    pub fn resize_namespace(&mut self, nsid: u32, blocks: u64) -> bool {
        let Some(ns) = self.active(nsid) else { return false };
        if blocks == 0 || blocks > crate::config::MAX_BYTES >> ns.shift {
            return false;
        }
        ns.blocks = blocks;
        self.report_namespace(nsid);
        true
    }

    /// Makes a namespace inactive and reports it to the host. Whether there was one.
    pub fn remove_namespace(&mut self, nsid: u32) -> bool {
        let Some(ns) = self.active(nsid) else { return false };
        ns.active = false;
        self.report_namespace(nsid);
        true
    }

    /// An active namespace by its identifier.
    #[inline]
    pub(crate) fn active(&mut self, nsid: u32) -> Option<&mut Namespace> {
        let index = nsid.checked_sub(1)? as usize;
        self.namespaces.get_mut(index).filter(|ns| ns.active)
    }
}
