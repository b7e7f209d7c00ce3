//! [`Copies`]: the grant copies of all rings of one reactor, by one system call for each of its turns.
//! A ring hands over what it has when its turn ends; the first one that asks for the end of its own,
//! in the next turn, has all of them carried out.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use blkif::grants::{CopyOp, Direction, GrantError};
use dma::Region;
use xen::gntdev::{Copier, Copy, Gntdev};

/// Of one reactor.
#[derive(Debug)]
pub(crate) struct Copies {
    copier: Copier,
    rings: Vec<Option<OfRing>>,
    /// Rings whose copies were started and not carried out.
    started: Vec<usize>,
}

#[derive(Debug)]
struct OfRing {
    domid: u16,
    local: Option<Arc<Region>>,
    ops: Vec<CopyOp>,
    /// They are to be carried out.
    waits: bool,
    whole: Result<(), GrantError>,
}

impl Copies {
    /// Without rings.
    pub(crate) fn new(device: Gntdev) -> Rc<RefCell<Copies>> {
        let (rings, started) = (Vec::new(), Vec::new());
        Rc::new(RefCell::new(Copies { copier: Copier::new(device), rings, started }))
    }

    fn run(&mut self) {
        let Copies { copier, rings, started } = self;
        let each = started.iter().filter_map(|&n| rings[n].as_ref());
        let whole = copier.copy(each.flat_map(OfRing::copies));
        let whole = whole.map_err(|e| GrantError(e as i32));
        let mut statuses = copier.statuses();
        for n in started.drain(..) {
            let Some(ring) = &mut rings[n] else { continue };
            (ring.whole, ring.waits) = (whole, false);
            // After a call that failed there are none.
            for (op, status) in ring.ops.iter_mut().zip(&mut statuses) {
                op.status = status;
            }
        }
    }
}

impl OfRing {
    fn copies(&self) -> impl Iterator<Item = Copy<'_>> {
        self.ops.iter().filter_map(|op| {
            Some(Copy {
                domid: self.domid,
                gref: op.gref,
                offset: op.offset,
                len: op.len,
                region: self.local.as_deref()?,
                local: op.local as usize,
                direction: match op.direction {
                    Direction::FromGuest => xen::gntdev::Direction::FromGuest,
                    Direction::ToGuest => xen::gntdev::Direction::ToGuest,
                },
            })
        })
    }
}

/// A ring's part in the copies of its reactor.
#[derive(Debug)]
pub(crate) struct Share {
    copies: Rc<RefCell<Copies>>,
    /// Of the ring among them.
    number: usize,
}

impl Share {
    /// For a ring of this domain with at most so many copies in a turn.
    pub(crate) fn new(copies: Rc<RefCell<Copies>>, domid: u16, most: usize) -> Share {
        let number = {
            let Copies { copier, rings, started } = &mut *copies.borrow_mut();
            let free = rings.iter().position(Option::is_none);
            let number = free.unwrap_or_else(|| {
                rings.push(None);
                rings.len() - 1
            });
            let ops = Vec::with_capacity(most);
            rings[number] = Some(OfRing { domid, local: None, ops, waits: false, whole: Ok(()) });
            // For all of them in one turn.
            copier.reserve(rings.iter().flatten().map(|r| r.ops.capacity()).sum());
            started.reserve(rings.len());
            number
        };
        Share { copies, number }
    }

    /// See [`blkif::Grants::attach`].
    pub(crate) fn attach(&self, local: &Arc<Region>) {
        if let Some(ring) = &mut self.copies.borrow_mut().rings[self.number] {
            ring.local = Some(local.clone());
        }
    }

    /// See [`blkif::Grants::start_copies`].
    pub(crate) fn start(&self, ops: &mut Vec<CopyOp>) {
        let Copies { rings, started, .. } = &mut *self.copies.borrow_mut();
        if let Some(ring) = &mut rings[self.number] {
            std::mem::swap(&mut ring.ops, ops);
            ring.waits = true;
            started.push(self.number);
        }
    }

    /// See [`blkif::Grants::end_copies`].
    pub(crate) fn end(&self, ops: &mut Vec<CopyOp>) -> Result<(), GrantError> {
        let mut copies = self.copies.borrow_mut();
        if copies.rings[self.number].as_ref().is_some_and(|ring| ring.waits) {
            copies.run();
        }
        let ring = copies.rings[self.number].as_mut().expect("it goes with its share");
        std::mem::swap(&mut ring.ops, ops);
        ring.whole
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut copies = self.copies.borrow_mut();
        copies.started.retain(|&n| n != self.number);
        copies.rings[self.number] = None;
    }
}

#[cfg(test)]
mod tests {
    use blkif::grants::{GNTST_BAD_GNTREF, GNTST_GENERAL_ERROR, GNTST_OKAY};
    use dma::PageSize;
    use xen::fake::Host;

    use super::*;

    fn op(gref: u32, direction: Direction) -> CopyOp {
        let (local, status) = (0, GNTST_GENERAL_ERROR);
        CopyOp { gref, local, offset: 0, len: 512, direction, status }
    }

    fn bytes(region: &Region) -> [u8; 512] {
        let mut bytes = [0; 512];
        region.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn copies_of_all_rings_are_one_call_in_whatever_order_they_end() {
        let host = Host::new();
        let copies = Copies::new(host.gntdev());
        let rings: Vec<_> = (0..3u8)
            .map(|n| {
                let guest = host.guest(1 + u16::from(n), 1);
                guest.grants().grant(8, 0, false);
                guest.memory().write(0, &[10 + n; 512]);
                let local = Region::new(4096, PageSize::Small).unwrap();
                local.write(0, &[20 + n; 512]);
                let share = Share::new(copies.clone(), guest.domid(), 2);
                share.attach(&local);
                (guest, local, share)
            })
            .collect();
        // Out of the first, into the second, and the third has one that is not granted.
        let mut ops = [
            vec![op(8, Direction::FromGuest)],
            vec![op(8, Direction::ToGuest)],
            vec![op(9, Direction::ToGuest), op(8, Direction::FromGuest)],
        ];
        for ((_, _, share), ops) in rings.iter().zip(&mut ops) {
            share.start(ops);
        }
        assert_eq!(host.calls().copies, 0);
        for n in [1, 2, 0] {
            rings[n].2.end(&mut ops[n]).unwrap();
            // What a ring starts before another has heard of its end is not mixed up with that.
            if n == 1 {
                assert_eq!(ops[1][0].status, GNTST_OKAY);
                ops[1].clear();
                ops[1].push(op(7, Direction::ToGuest));
                rings[1].2.start(&mut ops[1]);
            }
        }
        assert_eq!((host.calls().copies, host.calls().segments), (1, 4));
        let statuses = |ops: &[CopyOp]| ops.iter().map(|o| o.status).collect::<Vec<_>>();
        assert_eq!(statuses(&ops[0]), [GNTST_OKAY]);
        assert_eq!(statuses(&ops[2]), [GNTST_BAD_GNTREF, GNTST_OKAY]);
        assert_eq!(bytes(&rings[0].1), [10; 512]);
        assert_eq!(bytes(&rings[1].0.memory()), [21; 512]);
        assert_eq!(bytes(&rings[2].1), [12; 512]);
        rings[1].2.end(&mut ops[1]).unwrap();
        assert_eq!((statuses(&ops[1]), host.calls().copies), (vec![GNTST_BAD_GNTREF], 2));
    }

    #[test]
    fn a_call_that_fails_is_told_to_all_and_a_ring_that_goes_takes_its_copies_along() {
        let host = Host::new();
        let copies = Copies::new(host.gntdev());
        let guest = host.guest(1, 1);
        guest.grants().grant(8, 0, false);
        let local = Region::new(4096, PageSize::Small).unwrap();
        let ring = || {
            let share = Share::new(copies.clone(), 1, 1);
            share.attach(&local);
            share
        };
        let (one, two) = (ring(), ring());
        let mut ops = [vec![op(8, Direction::FromGuest)], vec![op(8, Direction::FromGuest)]];
        one.start(&mut ops[0]);
        two.start(&mut ops[1]);
        host.fail_copies(1);
        assert!(two.end(&mut ops[1]).is_err() && one.end(&mut ops[0]).is_err());
        one.start(&mut ops[0]);
        two.start(&mut ops[1]);
        drop(one);
        // Its place is another's, which has started nothing.
        let three = ring();
        two.end(&mut ops[1]).unwrap();
        assert_eq!((host.calls().copies, host.calls().segments), (2, 2 + 1));
        let mut ops = vec![op(8, Direction::FromGuest)];
        three.start(&mut ops);
        three.end(&mut ops).unwrap();
        assert_eq!(ops[0].status, GNTST_OKAY);
    }
}
