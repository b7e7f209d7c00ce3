//! Moving a request's bytes between the guest's pages and its own buffer: at once where pages are
//! mapped for good, else by grant copy, all requests of a turn, and all rings of a reactor, in one call.

use block::Submit;

use super::{Backend, NO_BUFFER, Stage};
use crate::abi::{ERROR, OKAY, PAGE, READ, SEGMENTS_PER_PAGE, Segment};
use crate::grants::{CopyOp, Direction, GNTST_EAGAIN, GNTST_GENERAL_ERROR, GNTST_OKAY};
use crate::pages::Absent;
use crate::{EventChannel, Grants, RingMemory};

/// A page that is paged out is asked for again after this time, in nanoseconds…
const EAGAIN_DELAY: u64 = 1_000_000;
/// …and so many times, after which the request fails.
const EAGAIN_TRIES: u8 = 100;

/// A request's share of the batch.
#[derive(Clone, Copy, Debug)]
struct Part {
    index: u16,
    first: u32,
    count: u32,
}

/// The copies of a turn. Holds room for what all requests together can ever ask for.
#[derive(Debug)]
pub(super) struct Batch {
    ops: Vec<CopyOp>,
    parts: Vec<Part>,
}

impl Batch {
    /// For `slots` requests of `copies` copies together.
    pub(super) fn new(slots: usize, copies: usize) -> Batch {
        Batch { ops: Vec::with_capacity(copies), parts: Vec::with_capacity(slots) }
    }

    /// How many requests have copies in it.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// The `i`th segment of a request.
    #[inline]
    fn segment(&self, index: u16, i: usize) -> Segment {
        let slot = &self.slots[usize::from(index)];
        if slot.large == NO_BUFFER {
            Segment(slot.word)
        } else {
            self.lists[self.list_at(slot.large) + i]
        }
    }

    /// Where the list of a large buffer begins.
    #[inline]
    pub(super) fn list_at(&self, large: u16) -> usize {
        usize::from(large) * (self.config.large_size() / PAGE)
    }

    /// Copies one range of a page, now if the page is mapped, else with the batch. A page that is
    /// new is asked to be mapped for the next time.
    #[inline]
    fn copy_range(
        &mut self,
        index: u16,
        gref: u32,
        (offset, len): (u32, u32),
        at: u32,
        direction: Direction,
    ) {
        let Some(page) = self.pages.find(gref, self.stamp) else {
            self.stats.page_misses.add(1);
            self.want_page(index, gref);
            self.batch.ops.push(CopyOp {
                gref,
                local: at,
                offset: offset as u16,
                len: len as u16,
                direction,
                status: GNTST_GENERAL_ERROR,
            });
            return;
        };
        self.stats.other_hits.add(1);
        match direction {
            Direction::FromGuest => {
                self.grants.read_page(page, offset, &self.bounce, at as usize, len);
            }
            Direction::ToGuest => {
                self.grants.write_page(page, offset, &self.bounce, at as usize, len);
            }
        }
    }

    #[cold]
    fn want_page(&mut self, index: u16, gref: u32) {
        let mapping = match self.pages.absent(gref) {
            Absent::Refused => false,
            Absent::Pending => true,
            Absent::Unknown => {
                let reserved = self.pages.reserve(gref, self.stamp);
                let started = reserved && self.grants.start_map(gref);
                if reserved && !started {
                    self.pages.cancel(gref);
                }
                started
            }
        };
        // A guest keeps a page granted for good only if it finds it mapped when the answer comes.
        self.slots[usize::from(index)].mapping |= mapping;
    }

    /// Makes the copies since `first` the request's part of the batch. Returns whether there are
    /// any; if not, all of it has been copied.
    fn batched(&mut self, index: u16, first: usize) -> bool {
        let count = self.batch.ops.len() - first;
        if count > 0 {
            self.batch.parts.push(Part { index, first: first as u32, count: count as u32 });
        }
        count > 0
    }

    /// Copies a request's data. Returns whether some of it waits in the batch.
    fn copy_data(&mut self, index: u16, direction: Direction) -> bool {
        let count = self.slots[usize::from(index)].segments();
        let first = self.batch.ops.len();
        let mut at = self.buffer_at(index) as u32;
        for i in 0..count {
            let s = self.segment(index, i);
            self.copy_range(index, s.gref(), (s.offset(), s.bytes()), at, direction);
            at += s.bytes();
        }
        self.batched(index, first)
    }

    /// Brings a request's data in, and sends it to the disk when it is there.
    pub(super) fn gather<D: Submit>(&mut self, disk: &mut D, index: u16) {
        self.slots[usize::from(index)].stage = Stage::Gather;
        if !self.copy_data(index, Direction::FromGuest) {
            self.put_data(disk, index);
        }
    }

    /// Brings a read's data out, and answers when it is there.
    pub(super) fn scatter(&mut self, index: u16) {
        self.slots[usize::from(index)].stage = Stage::Scatter;
        if !self.copy_data(index, Direction::ToGuest) {
            self.scattered(index);
        }
    }

    fn scattered(&mut self, index: u16) {
        self.stats.read_bytes.add(u64::from(self.slots[usize::from(index)].len));
        self.answer(index, OKAY);
    }

    /// Brings the pages of segments in, and goes on when they are there. They land in the
    /// request's own buffer, which holds no data yet and which no guest can change.
    pub(super) fn fetch<D: Submit>(&mut self, disk: &mut D, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Fetch;
        let (count, operation) = (slot.pages, slot.operation);
        let pages = self.list_pages[usize::from(slot.large)];
        let mut left = slot.segments();
        let first = self.batch.ops.len();
        let base = self.buffer_at(index) as u32;
        for (i, &gref) in pages.iter().take(usize::from(count)).enumerate() {
            let here = left.min(SEGMENTS_PER_PAGE);
            left -= here;
            let at = base + (i * PAGE) as u32;
            self.copy_range(index, gref, (0, 8 * here as u32), at, Direction::FromGuest);
        }
        if !self.batched(index, first) && self.read_list(disk, index) {
            if operation == READ {
                self.put_data(disk, index);
            } else {
                self.gather(disk, index);
            }
        }
    }

    /// Takes the list of segments out of the buffer and checks it. An answer is given if it is
    /// wrong.
    fn read_list<D: Submit>(&mut self, disk: &D, index: u16) -> bool {
        let slot = &self.slots[usize::from(index)];
        let (list, at) = (self.list_at(slot.large), self.buffer_at(index));
        for i in 0..slot.segments() {
            let [word] = self.bounce.read_words(at + 8 * i);
            self.lists[list + i] = Segment(word);
        }
        let segments = &self.lists[list..list + slot.segments()];
        let limits = self.limits(disk);
        let sector = slot.offset / u64::from(crate::abi::SECTOR);
        let len = super::request::data_len(segments, slot.operation != READ, sector, limits);
        match len {
            Some(len) => self.slots[usize::from(index)].len = len,
            None => {
                self.count_refusal();
                self.refuse_slot(index, ERROR);
            }
        }
        len.is_some()
    }

    /// Starts the copies of this turn.
    #[inline(never)]
    pub(super) fn start_batch(&mut self) {
        self.stats.copy_batches.add(1);
        self.stats.copy_ops.add(self.batch.ops.len() as u64);
        self.grants.start_copies(&mut self.batch.ops);
    }

    /// Ends the copies of the last turn, and goes on with their requests.
    #[inline(never)]
    pub(super) fn end_batch<D: Submit>(&mut self, disk: &mut D) {
        let whole = self.grants.end_copies(&mut self.batch.ops);
        for i in 0..self.batch.parts.len() {
            let part = self.batch.parts[i];
            let ops = part.first as usize..(part.first + part.count) as usize;
            let mut end = if whole.is_ok() { GNTST_OKAY } else { GNTST_GENERAL_ERROR };
            for op in &self.batch.ops[ops] {
                match op.status {
                    _ if whole.is_err() => {}
                    GNTST_OKAY => {}
                    // Any other failure weighs more than "try again".
                    GNTST_EAGAIN if end == GNTST_OKAY => end = GNTST_EAGAIN,
                    GNTST_EAGAIN => {}
                    status => end = status,
                }
            }
            if end == GNTST_OKAY {
                self.copied(disk, part.index);
            } else {
                self.not_copied(part.index, end);
            }
        }
        self.batch.ops.clear();
        self.batch.parts.clear();
    }

    fn copied<D: Submit>(&mut self, disk: &mut D, index: u16) {
        match self.slots[usize::from(index)].stage {
            Stage::Gather => self.put_data(disk, index),
            Stage::Scatter => self.scattered(index),
            Stage::Fetch => {
                if self.read_list(disk, index) {
                    if self.slots[usize::from(index)].operation == READ {
                        self.put_data(disk, index);
                    } else {
                        // Its data comes with the batch of this turn.
                        self.again(index, Stage::Gather);
                    }
                }
            }
            stage => unreachable!("a request at {stage:?} was in the batch"),
        }
    }

    #[cold]
    fn not_copied(&mut self, index: u16, status: i16) {
        self.stats.copy_errors.add(1);
        let slot = &mut self.slots[usize::from(index)];
        if status == GNTST_EAGAIN && slot.tries < EAGAIN_TRIES {
            slot.tries += 1;
            slot.due = self.now.saturating_add(EAGAIN_DELAY);
            let stage = slot.stage;
            self.again(index, stage);
        } else {
            self.answer(index, ERROR);
        }
    }

    /// Hears of mappings that ended.
    #[cold]
    pub(super) fn hear_of_pages(&mut self) {
        while let Some(end) = self.grants.next_mapped() {
            self.pages.mapped(end.gref, end.page, self.stamp);
            self.stats.pages_mapped.add(u64::from(end.page.is_some()));
        }
    }

    /// Whether some page of the request is still being mapped.
    pub(super) fn awaits_pages(&self, index: u16) -> bool {
        let slot = &self.slots[usize::from(index)];
        let pending = |gref| self.pages.absent(gref) == Absent::Pending;
        let lists = match slot.large {
            NO_BUFFER => &[][..],
            large => &self.list_pages[usize::from(large)][..usize::from(slot.pages)],
        };
        lists.iter().any(|&g| pending(g))
            || (0..slot.segments()).any(|i| pending(self.segment(index, i).gref()))
    }
}
