//! [`VacantQueue`]: what stands where a reactor had a leaf queue, or may get one. Takes no requests.

use std::sync::Arc;

use dma::Region;

use crate::{
    BlockQueue, Completions, DeviceInfo, Full, HasWork, LeafAccess, Request, Status, Submit,
};

/// A leaf queue without a unit.
#[derive(Clone, Copy, Debug, Default)]
pub struct VacantQueue;

impl Submit for VacantQueue {
    fn info(&self, _unit: u16) -> Option<&DeviceInfo> {
        None
    }

    fn room(&self) -> usize {
        0
    }

    fn submit(&mut self, _request: &Request<'_>) -> Result<(), Full> {
        Err(Full)
    }
}

impl BlockQueue for VacantQueue {
    fn register(&mut self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn poll(&mut self, _out: &mut Completions) -> usize {
        0
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn arm(&mut self) -> HasWork {
        HasWork::No
    }
}

impl LeafAccess for VacantQueue {
    fn unit_len(&self, _unit: u16) -> u64 {
        0
    }

    fn set_unit_len(&mut self, _unit: u16, _len: u64) -> Result<(), Status> {
        Err(Status::Gone)
    }
}
