//! [`Mailbox`]: calls from control threads, run by the reactor between two turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crossbeam_queue::SegQueue;

use crate::Wake;

/// What a control thread asks a reactor to do with its core.
pub type Call<C> = Box<dyn FnOnce(&mut C) + Send>;

/// The way in for control threads. Cloned at will. The reactor looks with one load a turn.
pub struct Mailbox<C> {
    shared: Arc<Shared<C>>,
    wake: Wake,
}

struct Shared<C> {
    queue: SegQueue<Call<C>>,
    closed: AtomicBool,
}

impl<C> Clone for Mailbox<C> {
    fn clone(&self) -> Mailbox<C> {
        Mailbox { shared: self.shared.clone(), wake: self.wake.clone() }
    }
}

impl<C> Mailbox<C> {
    /// An empty one for the reactor that `wake` wakes.
    pub fn new(wake: Wake) -> Mailbox<C> {
        let (queue, closed) = (SegQueue::new(), AtomicBool::new(false));
        Mailbox { shared: Arc::new(Shared { queue, closed }), wake }
    }

    /// Has `call` run on the reactor, soon. Calls of one thread run in order. If the reactor has
    /// ended, `call` is dropped.
    pub fn post(&self, call: impl FnOnce(&mut C) + Send + 'static) {
        self.shared.queue.push(Box::new(call));
        self.wake.wake();
        // Either this sees that the mailbox is closed, or who closes it sees the call.
        fence(Ordering::SeqCst);
        if self.shared.closed.load(Ordering::Relaxed) {
            self.discard();
        }
    }

    /// Drops what waits and whatever is posted from now on, so that no asker waits for ever. Called
    /// by the core when it ends.
    pub(crate) fn close(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.discard();
    }

    fn discard(&self) {
        while let Some(call) = self.shared.queue.pop() {
            drop(call);
        }
    }

    /// Runs `call` on the reactor and waits for what it returns; `None` if the reactor has ended.
    pub fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut C) -> T + Send + 'static,
    ) -> Option<T> {
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        self.post(move |core| {
            // The asker may have gone; then nobody wants the answer.
            let _ = send.send(call(core));
        });
        receive.recv().ok()
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.shared.queue.is_empty()
    }

    /// The next call.
    pub fn take(&self) -> Option<Call<C>> {
        self.shared.queue.pop()
    }
}
