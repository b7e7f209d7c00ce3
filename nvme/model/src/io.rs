//! The NVM command set (§6): Flush, Read, Write, Write Zeroes, Dataset Management.

use std::io;

use nix::errno::Errno;
use nvme_spec::{DsmRange, IoOpcode, MAX_DSM_RANGES, NSID_ALL, Sqe, Status, StatusCode};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::{Answer, Controller, deny};
use crate::memory::HostMemory;
use crate::namespace::Namespace;
use crate::store::MoveError;

impl<M: HostMemory> Controller<M> {
    /// Carries out an I/O command.
    #[inline]
    pub(crate) fn io(&mut self, sqe: &Sqe) -> Answer {
        if sqe.fuse() != 0 || sqe.psdt() != 0 {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        match IoOpcode::from_code(sqe.opcode()) {
            Some(IoOpcode::Read) => self.read(sqe),
            Some(IoOpcode::Write) => self.write(sqe),
            Some(IoOpcode::Flush) => self.flush(sqe),
            Some(IoOpcode::WriteZeroes) if self.options.write_zeroes => self.write_zeroes(sqe),
            Some(IoOpcode::DatasetManagement) if self.options.dsm => self.dataset(sqe),
            _ => Err(deny(StatusCode::INVALID_OPCODE)),
        }
    }

    /// Index of the active namespace of a command (§6.1.4).
    #[inline]
    fn target(&self, sqe: &Sqe) -> Result<usize, Status> {
        let index = sqe.nsid.get().wrapping_sub(1) as usize;
        match self.namespaces.get(index) {
            Some(ns) if ns.active => Ok(index),
            Some(_) => Err(deny(StatusCode::INVALID_FIELD)),
            None => Err(deny(StatusCode::INVALID_NAMESPACE)),
        }
    }

    /// Checks namespace, transfer size and LBA range of a Read or Write, and finds its data.
    #[inline]
    fn prepare(&mut self, sqe: &Sqe) -> Result<usize, Status> {
        let index = self.target(sqe)?;
        let ns = &self.namespaces[index];
        let bytes = u64::from(sqe.block_count()) << ns.shift;
        if bytes > self.options.max_transfer() {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        if !ns.holds(sqe.slba(), sqe.block_count().into()) {
            return Err(deny(StatusCode::LBA_OUT_OF_RANGE));
        }
        self.map(sqe, bytes)?;
        Ok(index)
    }

    #[inline]
    fn read(&mut self, sqe: &Sqe) -> Answer {
        let index = self.prepare(sqe)?;
        let ns = &mut self.namespaces[index];
        let shift = ns.shift;
        match ns.read(sqe.slba(), sqe.block_count(), &self.spans, &mut self.mem) {
            Ok(()) => {
                self.stats.reads.add(1);
                self.stats.read_bytes.add(u64::from(sqe.block_count()) << shift);
                Ok(0)
            }
            Err(error) => Err(self.moving_failed(error, StatusCode::UNRECOVERED_READ)),
        }
    }

    #[inline]
    fn write(&mut self, sqe: &Sqe) -> Answer {
        let index = self.prepare(sqe)?;
        let ns = &mut self.namespaces[index];
        if ns.read_only {
            return Err(deny(StatusCode::WRITE_PROTECTED));
        }
        let shift = ns.shift;
        match ns.write(sqe.slba(), sqe.block_count(), &self.spans, sqe.fua(), &mut self.mem) {
            Ok(()) => {
                self.stats.writes.add(1);
                self.stats.write_bytes.add(u64::from(sqe.block_count()) << shift);
                self.stats.fua_writes.add(sqe.fua().into());
                Ok(0)
            }
            Err(error) => Err(self.moving_failed(error, StatusCode::WRITE_FAULT)),
        }
    }

    fn flush(&mut self, sqe: &Sqe) -> Answer {
        let done = if sqe.nsid.get() == NSID_ALL {
            self.flush_all()
        } else {
            let index = self.target(sqe)?;
            self.namespaces[index].flush()
        };
        done.map_err(|e| io_status(&e, StatusCode::WRITE_FAULT))?;
        self.stats.flushes.add(1);
        Ok(0)
    }

    fn write_zeroes(&mut self, sqe: &Sqe) -> Answer {
        let index = self.target(sqe)?;
        let ns = &mut self.namespaces[index];
        let (lba, blocks) = (sqe.slba(), sqe.block_count());
        check_change(ns, lba, blocks.into())?;
        let deallocate = sqe.dword(2) & Sqe::DEAC != 0;
        let done = ns.zero(lba, blocks, deallocate, sqe.fua());
        done.map_err(|e| io_status(&e, StatusCode::WRITE_FAULT))?;
        self.stats.write_zeroes.add(1);
        self.stats.zeroed_bytes.add(u64::from(blocks) << ns.shift);
        self.stats.fua_writes.add(sqe.fua().into());
        Ok(0)
    }

    fn dataset(&mut self, sqe: &Sqe) -> Answer {
        let index = self.target(sqe)?;
        let mut ranges = [DsmRange::new_zeroed(); MAX_DSM_RANGES];
        let ranges = &mut ranges[..(sqe.dword(0) & 0xff) as usize + 1];
        self.fetch(sqe, ranges.as_mut_bytes())?;
        if sqe.dword(1) & Sqe::DSM_DEALLOCATE == 0 {
            // Hints only.
            return Ok(0);
        }
        let ns = &mut self.namespaces[index];
        for range in ranges.iter() {
            check_change(ns, range.slba.get(), range.blocks.get().into())?;
        }
        for range in ranges.iter() {
            let blocks = range.blocks.get();
            let done = ns.zero(range.slba.get(), blocks, true, false);
            done.map_err(|e| io_status(&e, StatusCode::WRITE_FAULT))?;
            self.stats.deallocations.add(1);
            self.stats.deallocated_bytes.add(u64::from(blocks) << ns.shift);
        }
        Ok(0)
    }

    fn moving_failed(&mut self, error: MoveError, medium: StatusCode) -> Status {
        match error {
            MoveError::Dma(fault) => {
                self.note_fault(fault);
                deny(StatusCode::DATA_TRANSFER_ERROR)
            }
            MoveError::Io(error) => io_status(&error, medium),
        }
    }

    /// A write that had been taken when the power went (see [`Controller::power_cut`]).
    pub(crate) fn cut_write(&mut self, sqe: &Sqe, seed: u64, seq: u64) -> io::Result<()> {
        let Ok(index) = self.prepare(sqe) else { return Ok(()) };
        let ns = &mut self.namespaces[index];
        if ns.read_only {
            return Ok(());
        }
        let (lba, blocks) = (sqe.slba(), sqe.block_count());
        match ns.cut_write(lba, blocks, &self.spans, seed, seq, &mut self.mem) {
            Ok(()) | Err(MoveError::Dma(_)) => Ok(()),
            Err(MoveError::Io(error)) => Err(error),
        }
    }
}

/// Checks a change without data.
fn check_change(ns: &Namespace, lba: u64, blocks: u64) -> Result<(), Status> {
    if !ns.holds(lba, blocks) {
        Err(deny(StatusCode::LBA_OUT_OF_RANGE))
    } else if ns.read_only {
        Err(deny(StatusCode::WRITE_PROTECTED))
    } else {
        Ok(())
    }
}

/// The status for an error of the file behind a namespace.
fn io_status(error: &io::Error, medium: StatusCode) -> Status {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => {
            Status::retryable(StatusCode::CAPACITY_EXCEEDED)
        }
        _ => Status::retryable(medium),
    }
}
