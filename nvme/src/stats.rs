//! [`Stats`]: what a queue pair counts. Plain numbers, written by its reactor only.

/// Counters of one queue pair since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Calls of `poll`.
    pub polls: u64,
    /// Of these, calls that found no completion.
    pub empty_polls: u64,
    /// Commands given to the device, repetitions included.
    pub submitted: u64,
    /// Commands that the device completed.
    pub completed: u64,
    /// Writes of the submission queue's doorbell register.
    pub sq_doorbells: u64,
    /// Writes of the completion queue's doorbell register.
    pub cq_doorbells: u64,
    /// Completions that named no command in flight: late, doubled or invented.
    pub stale_cids: u64,
    /// Commands sent again because the device asked for it.
    pub retries: u64,
    /// Commands sent again after a reset of the controller.
    pub resent: u64,
    /// Commands that needed a PRP list.
    pub prp_lists: u64,
    /// Commands whose data went through a bounce buffer.
    pub bounces: u64,
    /// Requests that became more than one command.
    pub splits: u64,
    /// Requests that ended with each status, by `block::Status as usize`; 0 is not counted.
    pub errors: [u64; block::Status::ALL.len()],
}

impl Stats {
    /// Both together.
    pub fn plus(self, other: Stats) -> Stats {
        let mut errors = self.errors;
        errors.iter_mut().zip(other.errors).for_each(|(a, b)| *a += b);
        Stats {
            polls: self.polls + other.polls,
            empty_polls: self.empty_polls + other.empty_polls,
            submitted: self.submitted + other.submitted,
            completed: self.completed + other.completed,
            sq_doorbells: self.sq_doorbells + other.sq_doorbells,
            cq_doorbells: self.cq_doorbells + other.cq_doorbells,
            stale_cids: self.stale_cids + other.stale_cids,
            retries: self.retries + other.retries,
            resent: self.resent + other.resent,
            prp_lists: self.prp_lists + other.prp_lists,
            bounces: self.bounces + other.bounces,
            splits: self.splits + other.splits,
            errors,
        }
    }
}
