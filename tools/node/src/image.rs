//! [`Image`]: every image format that a reactor serves, dispatched by a match.

use std::sync::Arc;

use block::{
    Completion, Completions, DeviceInfo, Frontend, Full, HasWork, Layer, Limit, RawImage, Request,
    Status,
};
use dma::Region;

use crate::Leaf;

/// An image on a reactor.
pub enum Image {
    /// QCOW2, on its home reactor.
    Qcow(Box<qcow::run::Image>),
    /// QCOW2, on a further reactor.
    Satellite(Box<qcow::run::Satellite>),
    /// Bytes as they are.
    Raw(Box<RawImage>),
    /// VHD, for reading.
    Vhd(Box<vhd::run::Image>),
}

macro_rules! each {
    ($self:expr, $i:ident => $e:expr) => {
        match $self {
            Image::Qcow($i) => $e,
            Image::Satellite($i) => $e,
            Image::Raw($i) => $e,
            Image::Vhd($i) => $e,
        }
    };
}

impl Layer<Leaf> for Image {
    #[inline]
    fn info(&self) -> &DeviceInfo {
        each!(self, i => Layer::<Leaf>::info(&**i))
    }

    fn register(&mut self, region: &Arc<Region>) {
        each!(self, i => Layer::<Leaf>::register(&mut **i, region));
    }

    fn room(&self, leaves: &[Leaf]) -> usize {
        each!(self, i => i.room(leaves))
    }

    fn submit(&mut self, leaves: &mut [Leaf], request: &Request<'_>) -> Result<(), Full> {
        each!(self, i => i.submit(leaves, request))
    }

    #[inline(always)]
    fn serve<F: Frontend>(&mut self, leaves: &mut [Leaf], frontend: &mut F, now: u64) -> bool {
        each!(self, i => i.serve(leaves, frontend, now))
    }

    fn serve_within<F: Frontend>(
        &mut self,
        limit: &Limit,
        leaves: &mut [Leaf],
        frontend: &mut F,
        now: u64,
    ) -> bool {
        each!(self, i => i.serve_within(limit, leaves, frontend, now))
    }

    fn complete(&mut self, leaves: &mut [Leaf], done: &mut Completion) -> bool {
        each!(self, i => i.complete(leaves, done))
    }

    #[inline]
    fn ended(&mut self, marked: bool, count: usize) {
        match self {
            Image::Qcow(i) => Layer::<Leaf>::ended(&mut **i, marked, count),
            Image::Satellite(i) => Layer::<Leaf>::ended(&mut **i, marked, count),
            // What else there is does not ask.
            Image::Raw(_) | Image::Vhd(_) => {}
        }
    }

    fn lost_device(&mut self) {
        each!(self, i => Layer::<Leaf>::lost_device(&mut **i));
    }

    #[inline(always)]
    fn poll(&mut self, leaves: &mut [Leaf], out: &mut Completions) -> bool {
        each!(self, i => i.poll(leaves, out))
    }

    fn arm(&mut self) -> HasWork {
        each!(self, i => Layer::<Leaf>::arm(&mut **i))
    }

    fn close(&mut self) {
        each!(self, i => Layer::<Leaf>::close(&mut **i));
    }

    fn closed(&self) -> Option<Status> {
        each!(self, i => Layer::<Leaf>::closed(&**i))
    }
}
