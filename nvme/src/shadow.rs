//! Shadow doorbells (Doorbell Buffer Config, §5.7 and §7.13): a device that is emulated takes
//! doorbell values from memory, and says in event indexes which value it wants the register
//! written for. Each register write that is left out saves the host of the emulation an exit.
//!
//! [`ShadowBuffers`] is the memory, shared by controller and queue pairs; [`Bell`] is one doorbell
//! as a ring writes it, shadowed or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use dma::Region;

use crate::Error;
use crate::bar::Doorbell;
use crate::memory::{DeviceMemory, Mapping};

/// The two pages that a controller with shadow doorbells reads and writes.
pub(crate) struct ShadowBuffers {
    mapping: Arc<Mapping>,
    /// Size of each in bytes: the controller's memory page.
    page: usize,
    /// Bytes between doorbells.
    stride: usize,
    /// The device was told of them since it was last reset. Written by the controller while the
    /// queue pairs wait; published to them with the order to run.
    on: AtomicBool,
}

impl ShadowBuffers {
    /// Buffers for doorbells `4 << dstrd` bytes apart.
    pub(crate) fn new(device: &Arc<DeviceMemory>, dstrd: u8) -> Result<ShadowBuffers, Error> {
        let what = "shadow doorbells";
        let failed = |why: String| Error::Memory { what, why };
        let page = 1usize << device.page_shift();
        let region = Region::new_best(2 * page).map_err(|e| failed(e.to_string()))?;
        let mapping = device.map(&region).map_err(failed)?;
        let (stride, on) = (4 << dstrd, AtomicBool::new(false));
        Ok(ShadowBuffers { mapping, page, stride, on })
    }

    /// Bus addresses of the doorbells' page and of the event indexes'.
    pub(crate) fn bus(&self) -> [u64; 2] {
        [self.mapping.bus(0), self.mapping.bus(self.page as u64)]
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Controller: the device uses them, or does not (any more).
    pub(crate) fn set(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Controller: all as in a device that was just reset.
    pub(crate) fn clear(&self) {
        self.mapping.region().zero(0, 2 * self.page);
    }

    /// Controller: the two doorbells of a queue that is about to be created.
    pub(crate) fn clear_queue(&self, qid: u16) {
        for at in [self.at(qid, false), self.at(qid, true)].into_iter().flatten() {
            self.mapping.region().store32(at, 0, Ordering::Relaxed);
            self.mapping.region().store32(self.page + at, 0, Ordering::Relaxed);
        }
    }

    /// Where a doorbell lies in its page, if that is long enough.
    fn at(&self, qid: u16, head: bool) -> Option<usize> {
        let at = (2 * usize::from(qid) + usize::from(head)) * self.stride;
        (at + 4 <= self.page).then_some(at)
    }
}

/// A doorbell of a queue pair. `D` is the register.
pub(crate) struct Bell<D> {
    register: D,
    /// Boxed: most devices have none, and a queue pair's cache lines are precious.
    shadow: Option<Box<Shadow>>,
}

struct Shadow {
    region: Arc<Region>,
    value_at: usize,
    event_at: usize,
    on: bool,
    /// The value that was told last.
    last: u32,
    buffers: Arc<ShadowBuffers>,
}

impl<D: Doorbell> Bell<D> {
    /// The tail doorbell of submission queue `qid`, or with `head` the head doorbell of its
    /// completion queue.
    pub(crate) fn new(
        register: D,
        shadow: Option<&Arc<ShadowBuffers>>,
        qid: u16,
        head: bool,
    ) -> Self {
        let shadow = shadow.and_then(|buffers| {
            let value_at = buffers.at(qid, head)?;
            Some(Box::new(Shadow {
                region: buffers.mapping.region().clone(),
                value_at,
                event_at: buffers.page + value_at,
                on: false,
                last: 0,
                buffers: buffers.clone(),
            }))
        });
        Bell { register, shadow }
    }

    /// The admin queue's: never shadowed.
    pub(crate) fn plain(register: D) -> Self {
        Bell { register, shadow: None }
    }

    /// Tells the device. What was written to the ring before is visible to it first. Returns
    /// whether the register was written.
    #[inline]
    pub(crate) fn ring(&mut self, value: u32) -> bool {
        fence(Ordering::Release);
        if let Some(shadow) = &mut self.shadow
            && shadow.on
            && !shadow.tell(value)
        {
            return false;
        }
        self.register.ring(value);
        true
    }

    /// The queue was created anew, with 0 told.
    pub(crate) fn reset(&mut self) {
        if let Some(shadow) = &mut self.shadow {
            shadow.on = shadow.buffers.is_on();
            shadow.last = 0;
        }
    }
}

impl Shadow {
    /// Tells the device in memory. Returns whether it wants the register written too.
    fn tell(&mut self, value: u32) -> bool {
        self.region.store32(self.value_at, value, Ordering::Release);
        // The device writes its event index and then looks at the value again; here it is the
        // other way round. Without a fence both could see what was before.
        fence(Ordering::SeqCst);
        let event = self.region.load32(self.event_at, Ordering::Acquire);
        let last = std::mem::replace(&mut self.last, value);
        wants_event(event, value, last)
    }
}

/// Whether the step from `last` to `value` passes `event`. Indexes wrap at the size of the queue
/// and not at 2^16: a step over the wrap says yes more often than it must, never less.
fn wants_event(event: u32, value: u32, last: u32) -> bool {
    (value.wrapping_sub(event).wrapping_sub(1) as u16) < (value.wrapping_sub(last) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::IovaMap;
    use crate::memory::tests::FakeMapper;
    use std::cell::RefCell;
    use std::rc::Rc;

    struct Register(Rc<RefCell<Vec<u32>>>);

    impl Doorbell for Register {
        fn ring(&self, value: u32) {
            self.0.borrow_mut().push(value);
        }
    }

    #[test]
    fn a_step_over_the_event_index_wants_the_register() {
        // Queue of 8: from every value, by every step, with every event index that a device may
        // leave: it was at `last` or behind when it last looked.
        for last in 0..8u32 {
            for step in 1..8 {
                let value = (last + step) % 8;
                // The device had caught up and waits.
                assert!(wants_event(last, value, last), "{last} +{step}");
            }
        }
        // It is still busy with what was told before, and will look by itself.
        assert!(!wants_event(3, 6, 5));
        assert!(!wants_event(3, 4, 4));
        assert!(!wants_event(6, 3, 2), "also after the wrap");
        // It wants to hear of a later one.
        assert!(!wants_event(6, 5, 4));
        assert!(wants_event(5, 6, 4) && wants_event(4, 6, 4));
    }

    #[test]
    fn the_register_is_written_when_asked_for_and_the_shadow_always() {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(1 << 30));
        let device = DeviceMemory::new(mapper, 12);
        let buffers = Arc::new(ShadowBuffers::new(&device, 1).unwrap());
        let [values, events] = buffers.bus();
        assert_eq!((values, events), (1 << 30, (1 << 30) + 4096));
        let rung = Rc::new(RefCell::new(Vec::new()));
        let mut bell = Bell::new(Register(rung.clone()), Some(&buffers), 3, true);
        let memory = buffers.mapping().region().clone();
        let at = (2 * 3 + 1) * 8;
        assert!(bell.ring(1), "the device was not told of the buffers");
        buffers.set(true);
        assert!(bell.ring(2), "nor does a queue that runs find out");
        bell.reset();
        assert!(bell.ring(1));
        assert_eq!(memory.load32(at, Ordering::Relaxed), 1);
        assert!(!bell.ring(2), "the device is behind");
        assert_eq!(memory.load32(at, Ordering::Relaxed), 2);
        memory.store32(4096 + at, 2, Ordering::Relaxed);
        assert!(bell.ring(5));
        assert_eq!(*rung.borrow(), [1, 2, 1, 5]);
        buffers.clear_queue(3);
        assert_eq!(memory.load32(at, Ordering::Relaxed), 0);
        assert_eq!(memory.load32(4096 + at, Ordering::Relaxed), 0);
        buffers.set(false);
        bell.reset();
        assert!(bell.ring(1) && bell.ring(2) && bell.ring(3));
    }

    #[test]
    fn a_queue_beyond_the_page_uses_its_register() {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(1 << 30));
        let device = DeviceMemory::new(mapper, 12);
        let buffers = Arc::new(ShadowBuffers::new(&device, 10).unwrap());
        buffers.set(true);
        let rung = Rc::new(RefCell::new(Vec::new()));
        let mut bell = Bell::new(Register(rung.clone()), Some(&buffers), 1, false);
        buffers.clear_queue(1);
        bell.reset();
        assert!(bell.ring(1) && bell.ring(2));
    }
}
