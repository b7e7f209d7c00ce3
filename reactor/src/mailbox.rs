//! [`Mailbox`]: calls from control threads, run by the reactor between two turns.

use std::sync::Arc;

use crossbeam_queue::SegQueue;

use crate::Wake;

/// What a control thread asks a reactor to do with its core.
pub type Call<C> = Box<dyn FnOnce(&mut C) + Send>;

/// The way in for control threads. Cloned at will. The reactor looks with one load a turn.
pub struct Mailbox<C> {
    queue: Arc<SegQueue<Call<C>>>,
    wake: Wake,
}

impl<C> Clone for Mailbox<C> {
    fn clone(&self) -> Mailbox<C> {
        Mailbox { queue: self.queue.clone(), wake: self.wake.clone() }
    }
}

impl<C> Mailbox<C> {
    /// An empty one for the reactor that `wake` wakes.
    pub fn new(wake: Wake) -> Mailbox<C> {
        Mailbox { queue: Arc::default(), wake }
    }

    /// Has `call` run on the reactor, soon. Calls of one thread run in order.
    pub fn post(&self, call: impl FnOnce(&mut C) + Send + 'static) {
        self.queue.push(Box::new(call));
        self.wake.wake();
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
        self.queue.is_empty()
    }

    /// The next call.
    pub fn take(&self) -> Option<Call<C>> {
        self.queue.pop()
    }
}
