//! Shadow doorbells (Doorbell Buffer Config, §5.7): the device takes doorbell values from pages of
//! host memory and says in event indexes which value it wants the register written for.
//!
//! The device looks at a queue's shadow only when the register was written or while it has work of
//! that queue: a host that leaves out a register write which it owes waits for ever here, as it
//! would on a device that sleeps.

use nvme_spec::{Sqe, StatusCode, cq_head_doorbell, offset, sq_tail_doorbell};

use crate::controller::{Answer, Controller, deny};
use crate::memory::{DmaFault, HostMemory};
use crate::queues::Watch;
use crate::registers::Doorbell;

/// Bus addresses of the two pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shadow {
    values: u64,
    events: u64,
}

impl<M: HostMemory> Controller<M> {
    /// Doorbell Buffer Config.
    pub(crate) fn doorbell_buffer(&mut self, sqe: &Sqe) -> Answer {
        if !self.options.doorbell_buffer {
            return Err(deny(StatusCode::INVALID_OPCODE));
        }
        let (values, events) = (sqe.prp1.get(), sqe.prp2.get());
        if !(values | events).is_multiple_of(self.page) || values == 0 || events == 0 {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        self.shadow = Some(Shadow { values, events });
        Ok(0)
    }

    /// Takes over what stands in memory for a queue pair that has something to do.
    pub(crate) fn look_at_shadow(&mut self, watch: Watch) {
        for (qid, which) in [(watch.sqid, Doorbell::SqTail), (watch.cqid, Doorbell::CqHead)] {
            let Some((value_at, _)) = self.shadow_at(qid, which) else { continue };
            let rung = self.regs.doorbell(qid, which);
            match self.mem.read_u32(value_at) {
                // If the register was written meanwhile, it holds what is newer.
                Ok(value) => self.regs.take_doorbell(qid, which, rung, value),
                Err(fault) => self.note_fault(fault),
            }
        }
    }

    /// The queue pair has nothing more to do: asks for the next value by register, and says
    /// whether one came meanwhile.
    pub(crate) fn ask_for_doorbells(&mut self, watch: Watch) -> bool {
        let mut more = false;
        for (qid, which) in [(watch.sqid, Doorbell::SqTail), (watch.cqid, Doorbell::CqHead)] {
            let Some((value_at, event_at)) = self.shadow_at(qid, which) else { continue };
            let seen = self.regs.doorbell(qid, which);
            let asked: Result<u32, DmaFault> = (|| {
                self.mem.write_u32(event_at, seen)?;
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                self.mem.read_u32(value_at)
            })();
            match asked {
                Ok(value) => more |= value != seen,
                Err(fault) => self.note_fault(fault),
            }
        }
        more
    }

    /// Where value and event index of a doorbell are, if it has a shadow.
    fn shadow_at(&self, qid: u16, which: Doorbell) -> Option<(u64, u64)> {
        let shadow = self.shadow.filter(|_| qid > 0)?;
        let register = match which {
            Doorbell::SqTail => sq_tail_doorbell(qid, self.options.dstrd),
            Doorbell::CqHead => cq_head_doorbell(qid, self.options.dstrd),
        };
        let at = register - offset::DOORBELLS;
        (at + 4 <= self.page)
            .then(|| (shadow.values.wrapping_add(at), shadow.events.wrapping_add(at)))
    }
}
