//! The admin command set (§5): dispatch, queues, Abort, and moving small data.

use nvme_spec::{AdminOpcode, Sqe, StatusCode};

use crate::controller::{Answer, Controller, deny};
use crate::memory::HostMemory;
use crate::prp::{self, Pieces, PrpError};
use crate::queues::{Cq, Sq};

impl<M: HostMemory> Controller<M> {
    /// Carries out an admin command. `None`: it completes later.
    pub(crate) fn admin(&mut self, sqe: &Sqe) -> Option<Answer> {
        if sqe.fuse() != 0 || sqe.psdt() != 0 {
            return Some(Err(deny(StatusCode::INVALID_FIELD)));
        }
        Some(match AdminOpcode::from_code(sqe.opcode()) {
            Some(AdminOpcode::Identify) => self.identify(sqe),
            Some(AdminOpcode::SetFeatures) => self.set_features(sqe),
            Some(AdminOpcode::GetFeatures) => self.get_features(sqe),
            Some(AdminOpcode::CreateIoCq) => self.create_cq(sqe),
            Some(AdminOpcode::CreateIoSq) => self.create_sq(sqe),
            Some(AdminOpcode::DeleteIoCq) => self.delete_cq(sqe),
            Some(AdminOpcode::DeleteIoSq) => self.delete_sq(sqe),
            Some(AdminOpcode::GetLogPage) => self.get_log_page(sqe),
            Some(AdminOpcode::Abort) => self.abort(sqe),
            Some(AdminOpcode::DoorbellBufferConfig) => self.doorbell_buffer(sqe),
            Some(AdminOpcode::FormatNvm) => self.format_nvm(sqe),
            Some(AdminOpcode::AsyncEventRequest) => match self.events.request(sqe.cid()) {
                Ok(()) => return None,
                Err(status) => Err(status),
            },
            _ => Err(deny(StatusCode::INVALID_OPCODE)),
        })
    }

    /// What the creation of both kinds of queue checks (§5.3, §5.4): identifier, size, memory.
    fn check_queue(&self, sqe: &Sqe, granted: u16, exists: bool) -> Result<(), StatusCode> {
        let qid = sqe.queue_id();
        if qid == 0 || qid > granted || exists {
            return Err(StatusCode::INVALID_QUEUE_ID);
        }
        if sqe.queue_entries() < 2 || sqe.queue_entries() > self.options.entries {
            return Err(StatusCode::INVALID_QUEUE_SIZE);
        }
        if sqe.dword(1) & Sqe::QUEUE_CONTIGUOUS == 0 {
            // CAP.CQR.
            return Err(StatusCode::INVALID_FIELD);
        }
        if !sqe.prp1.get().is_multiple_of(self.page) {
            return Err(StatusCode::INVALID_PRP_OFFSET);
        }
        Ok(())
    }

    fn create_cq(&mut self, sqe: &Sqe) -> Answer {
        let qid = sqe.queue_id();
        let exists = self.queues.cq(qid).is_some();
        let granted = self.features.queues().cq;
        self.check_queue(sqe, granted, exists).map_err(deny)?;
        let vector = sqe.dword(1) >> 16;
        if vector > u32::from(self.options.queues) {
            return Err(deny(StatusCode::INVALID_INTERRUPT_VECTOR));
        }
        if self.cc.iocqes() != 4 {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        let interrupts = sqe.dword(1) & Sqe::CQ_INTERRUPTS != 0;
        let vector = interrupts.then_some(vector as u16);
        let cq = Cq::new(sqe.prp1.get(), sqe.queue_entries(), vector);
        self.queues.add_cq(&self.regs, qid, cq);
        Ok(0)
    }

    fn create_sq(&mut self, sqe: &Sqe) -> Answer {
        let qid = sqe.queue_id();
        let exists = self.queues.sq(qid).is_some();
        let granted = self.features.queues();
        self.check_queue(sqe, granted.sq, exists).map_err(deny)?;
        let cqid = (sqe.dword(1) >> 16) as u16;
        if cqid == 0 || cqid > granted.cq {
            return Err(deny(StatusCode::INVALID_QUEUE_ID));
        }
        if self.queues.cq(cqid).is_none() {
            return Err(deny(StatusCode::CQ_INVALID));
        }
        if self.cc.iosqes() != 6 {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        let sq = Sq::new(sqe.prp1.get(), sqe.queue_entries(), cqid);
        self.queues.add_sq(&self.regs, qid, sq);
        Ok(0)
    }

    fn delete_cq(&mut self, sqe: &Sqe) -> Answer {
        let qid = sqe.queue_id();
        match self.queues.cq(qid) {
            Some(_) if qid == 0 => Err(deny(StatusCode::INVALID_QUEUE_ID)),
            None => Err(deny(StatusCode::INVALID_QUEUE_ID)),
            Some(cq) if cq.users > 0 => Err(deny(StatusCode::INVALID_QUEUE_DELETION)),
            Some(_) => {
                self.queues.remove_cq(&self.regs, qid);
                Ok(0)
            }
        }
    }

    fn delete_sq(&mut self, sqe: &Sqe) -> Answer {
        let qid = sqe.queue_id();
        if qid == 0 || self.queues.sq(qid).is_none() {
            return Err(deny(StatusCode::INVALID_QUEUE_ID));
        }
        self.abort_queue(qid);
        self.queues.remove_sq(&self.regs, qid);
        Ok(0)
    }

    /// Abort (§5.1): bit 0 of the result is 0 if the command was aborted.
    fn abort(&mut self, sqe: &Sqe) -> Answer {
        let (sqid, cid) = (sqe.queue_id(), (sqe.dword(0) >> 16) as u16);
        let found = self.abort_in_flight(sqid, cid) || (sqid == 0 && self.abort_event_request(cid));
        Ok(u32::from(!found))
    }

    /// Moves `bytes` into the data buffer of a command.
    pub(crate) fn put(&mut self, sqe: &Sqe, bytes: &[u8]) -> Answer {
        self.map(sqe, bytes.len() as u64)?;
        let mut pieces = Pieces::new(&self.spans);
        let mut done = 0;
        while let Some((addr, n)) = pieces.next(bytes.len() - done) {
            if let Err(fault) = self.mem.write(addr, &bytes[done..done + n]) {
                self.note_fault(fault);
                return Err(deny(StatusCode::DATA_TRANSFER_ERROR));
            }
            done += n;
        }
        Ok(0)
    }

    /// Moves the data buffer of a command into `bytes`.
    pub(crate) fn fetch(&mut self, sqe: &Sqe, bytes: &mut [u8]) -> Answer {
        self.map(sqe, bytes.len() as u64)?;
        let mut pieces = Pieces::new(&self.spans);
        let mut done = 0;
        while let Some((addr, n)) = pieces.next(bytes.len() - done) {
            if let Err(fault) = self.mem.read(addr, &mut bytes[done..done + n]) {
                self.note_fault(fault);
                return Err(deny(StatusCode::DATA_TRANSFER_ERROR));
            }
            done += n;
        }
        Ok(0)
    }

    /// Finds the spans of a command's data buffer.
    #[inline]
    pub(crate) fn map(&mut self, sqe: &Sqe, len: u64) -> Answer {
        let (prp1, prp2) = (sqe.prp1.get(), sqe.prp2.get());
        match prp::walk(&mut self.mem, self.page, prp1, prp2, len, &mut self.spans) {
            Ok(()) => Ok(0),
            Err(error) => {
                if let PrpError::Fault(fault) = error {
                    self.note_fault(fault);
                }
                Err(deny(error.status()))
            }
        }
    }
}
