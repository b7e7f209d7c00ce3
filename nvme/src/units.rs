//! Namespaces as the controller and its queue pairs share them: what may change while they are open.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::DeviceInfo;
use nvme_spec::IoOpcode;

use crate::identify::{ControllerInfo, Namespace};
use crate::queue::Command;

/// What may change about a namespace. Written by the controller; queue pairs look when they are
/// given an order, and no other time.
#[derive(Debug)]
pub(crate) struct Changing {
    size: AtomicU64,
    read_only: AtomicBool,
    gone: AtomicBool,
}

impl Changing {
    pub(crate) fn new(info: &DeviceInfo) -> Changing {
        Changing {
            size: AtomicU64::new(info.size),
            read_only: AtomicBool::new(info.read_only),
            gone: AtomicBool::new(false),
        }
    }

    /// The state as it is now. Returns whether that is anything new.
    pub(crate) fn set(&self, size: u64, read_only: bool, gone: bool) -> bool {
        // Relaxed: the order that is given afterwards publishes all three.
        let changed = self.size.swap(size, Ordering::Relaxed) != size;
        let changed = (self.read_only.swap(read_only, Ordering::Relaxed) != read_only) | changed;
        (self.gone.swap(gone, Ordering::Relaxed) != gone) | changed
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// Bytes that are most often asked for.
pub(crate) const PAGE: u64 = 4096;

/// A namespace as one queue pair sees it.
pub(crate) struct Unit {
    pub(crate) info: DeviceInfo,
    /// Block size less one.
    pub(crate) block_mask: u64,
    pub(crate) nsid: u32,
    pub(crate) block_shift: u32,
    /// Operations that move data and may go straight to the device now: those whose number is below
    /// this. Read and write, only read, or none.
    pub(crate) transfers: u8,
    /// Most bytes of one Read or Write.
    pub(crate) max_command: u32,
    /// The same within one page of the controller's memory.
    pub(crate) max_page: u32,
    /// Blocks of [`PAGE`] bytes, less one as a command says it (NLB).
    pub(crate) page_nlb: u32,
    /// Where [`PAGE`] bytes may not begin any more, by operation: of those of `transfers`; 0 where they
    /// may not go straight to the device, or cannot be transferred in one page at all.
    pub(crate) pages_end: [u64; 2],
    /// The first words of Read and Write: see [`Command::head`].
    pub(crate) heads: [u64; 2],
    /// The namespace was taken away, or is another one now.
    pub(crate) gone: bool,
    /// Write Zeroes may deallocate.
    pub(crate) zeroes_deallocate: bool,
    /// Most bytes of one Write Zeroes.
    pub(crate) max_zeroes: u64,
    /// Most bytes of one Dataset Management range.
    pub(crate) max_discard: u64,
}

impl Unit {
    /// For a controller with memory pages of `1 << page_shift` bytes. Nothing goes straight to it before
    /// [`Unit::refresh`].
    pub(crate) fn new(ns: &Namespace, controller: &ControllerInfo, page_shift: u32) -> Unit {
        let block = u64::from(ns.info.block_size);
        // NLB is 0's based in 16 bits (§6.17); a range's length has 32 bits (§6.7).
        let zeroes = controller.zeroes_limit.unwrap_or(u64::MAX).min(block << 16);
        Unit {
            info: ns.info.clone(),
            block_mask: block - 1,
            transfers: 0,
            nsid: ns.nsid,
            block_shift: ns.block_shift,
            max_command: controller.max_command,
            max_page: controller.max_command.min(1 << page_shift),
            page_nlb: ((PAGE / block).max(1) - 1) as u32,
            pages_end: [0; 2],
            heads: [IoOpcode::Read, IoOpcode::Write].map(|op| Command::head(op.code(), ns.nsid)),
            gone: false,
            zeroes_deallocate: ns.zeroes_deallocate,
            max_zeroes: (zeroes & !(block - 1)).max(block),
            max_discard: block << 31,
        }
    }

    /// Takes over what changed, for a queue that runs.
    pub(crate) fn refresh(&mut self, from: &Changing) {
        const { assert!(block::Op::Read as u8 == 0 && block::Op::Write as u8 == 1) };
        self.info.size = from.size.load(Ordering::Relaxed);
        self.info.read_only = from.read_only.load(Ordering::Relaxed);
        self.gone = from.is_gone();
        let fits = u64::from(self.max_page) >= PAGE && self.block_mask < PAGE;
        let pages_end = if fits { (self.info.size + 1).saturating_sub(PAGE) } else { 0 };
        self.transfers = match (self.gone, self.info.read_only) {
            (true, _) => 0,
            (_, true) => block::Op::Read as u8 + 1,
            _ => block::Op::Write as u8 + 1,
        };
        self.pages_end = [block::Op::Read, block::Op::Write]
            .map(|op| if (op as u8) < self.transfers { pages_end } else { 0 });
    }

    /// The queue does not run any more.
    pub(crate) fn stop(&mut self) {
        self.transfers = 0;
        self.pages_end = [0; 2];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identify::tests::controller;

    fn unit(block_size: u32, limit: Option<u64>) -> Unit {
        let mut c = controller(|_| ()).unwrap();
        c.zeroes_limit = limit;
        let info = DeviceInfo {
            size: 1 << 30,
            block_size,
            physical_block_size: 4096,
            read_only: false,
            volatile_cache: false,
            write_zeroes: true,
            discard: true,
            discard_granularity: block_size,
            max_transfer: 1 << 20,
        };
        let (nguid, eui64, block_shift) = ([0; 16], [0; 8], block_size.ilog2());
        let ns = Namespace { nsid: 1, info, nguid, eui64, block_shift, zeroes_deallocate: false };
        Unit::new(&ns, &c, 12)
    }

    #[test]
    fn zeroes_are_limited_by_the_command_and_by_the_controller() {
        assert_eq!(unit(512, None).max_zeroes, 32 << 20);
        assert_eq!(unit(4096, None).max_zeroes, 256 << 20);
        assert_eq!(unit(512, Some(128 << 10)).max_zeroes, 128 << 10);
        assert_eq!(unit(512, Some(1 << 40)).max_zeroes, 32 << 20);
        assert_eq!(unit(4096, Some(4096)).max_zeroes, 4096);
    }

    #[test]
    fn what_may_be_transferred_follows_the_state() {
        let mut u = unit(512, None);
        let state = Changing::new(&u.info);
        assert_eq!(u.transfers, 0, "the queue does not run yet");
        u.refresh(&state);
        assert_eq!((u.transfers, u.max_page, u.page_nlb), (2, 4096, 7));
        assert_eq!(u.pages_end, [(1 << 30) - 4095; 2]);
        assert!(state.set(1 << 20, true, false));
        assert!(!state.set(1 << 20, true, false), "nothing new");
        u.refresh(&state);
        assert_eq!((u.transfers, u.info.size, u.info.read_only), (1, 1 << 20, true));
        assert_eq!(u.pages_end, [(1 << 20) - 4095, 0]);
        assert!(state.set(0, false, true));
        u.refresh(&state);
        assert_eq!((u.transfers, u.pages_end, u.gone), (0, [0; 2], true));
        assert!(state.set(1 << 20, false, false));
        u.refresh(&state);
        assert_eq!((u.transfers, u.gone), (2, false));
        u.stop();
        assert_eq!((u.transfers, u.pages_end, u.gone), (0, [0; 2], false));
    }

    #[test]
    fn pages_begin_where_they_have_an_end() {
        for (block, size, end) in [
            (512u32, 8192u64, 4097u64),
            (4096, 4096, 1),
            (512, 3584, 0),
            (512, 0, 0),
            (8192, 1 << 20, 0),
            (512, !511, !511 - 4095),
        ] {
            let mut u = unit(block, None);
            let state = Changing::new(&u.info);
            state.set(size, false, false);
            u.refresh(&state);
            assert_eq!(u.pages_end, [end; 2], "{block} {size}");
            assert_eq!(u64::from(u.page_nlb), (4096 / u64::from(block)).max(1) - 1);
        }
    }
}
