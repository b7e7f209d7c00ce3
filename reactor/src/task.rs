//! Slot tasks: `async` functions without wakers, executor queues or allocation per request.
//!
//! What a layer cannot do as a straight function (a miss, an allocation, a flush) it writes as an
//! `async fn` that loops over the work of one slot. A task is made when it is first run, which for
//! most slots is never, and lives as long as the layer. A task is polled when its slot's I/O completed or what it waits for changed;
//! there is nobody to wake, so the waker does nothing. A task is never dropped with I/O in flight:
//! errors are delivered to it as completions.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The tasks of a layer, one per slot.
pub struct Tasks {
    tasks: Box<[Option<Task>]>,
    make: Box<dyn Fn(usize) -> Task>,
}

impl Tasks {
    /// `count` tasks, each of which `make` makes when it is first run.
    pub fn new<T: Future<Output = ()> + 'static>(
        count: usize,
        make: impl Fn(usize) -> T + 'static,
    ) -> Tasks {
        Tasks {
            tasks: (0..count).map(|_| None).collect(),
            make: Box::new(move |index| Box::pin(make(index))),
        }
    }

    /// Lets task `index` run until it waits again. A slot task loops for ever, so it never ends.
    pub fn run(&mut self, index: usize) {
        let mut context = Context::from_waker(Waker::noop());
        let task = self.tasks[index].get_or_insert_with(|| (self.make)(index));
        let ended = task.as_mut().poll(&mut context);
        debug_assert!(ended.is_pending(), "a slot task ended");
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }
}

/// Waits until `ready` returns something; asked again each time that the task is run.
pub fn until<T>(mut ready: impl FnMut() -> Option<T>) -> impl Future<Output = T> {
    std::future::poll_fn(move |_| match ready() {
        Some(value) => Poll::Ready(value),
        None => Poll::Pending,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn a_task_goes_on_when_run_and_ready() {
        let go = Rc::new(Cell::new(0));
        let seen = Rc::new(Cell::new(0));
        let (g, s) = (go.clone(), seen.clone());
        let mut tasks = Tasks::new(1, move |_| {
            let (g, s) = (g.clone(), s.clone());
            async move {
                loop {
                    let n = until(|| (g.get() > s.get()).then(|| g.get())).await;
                    s.set(n);
                }
            }
        });
        tasks.run(0);
        assert_eq!(seen.get(), 0);
        go.set(3);
        assert_eq!(seen.get(), 0);
        tasks.run(0);
        assert_eq!(seen.get(), 3);
    }

    #[test]
    fn a_task_is_made_when_it_is_first_run() {
        let made = Rc::new(Cell::new(0));
        let m = made.clone();
        let mut tasks = Tasks::new(100, move |index| {
            m.set(m.get() + 1 + 100 * index);
            std::future::pending()
        });
        assert_eq!((made.get(), tasks.len()), (0, 100));
        tasks.run(7);
        tasks.run(7);
        assert_eq!(made.get(), 701);
    }
}
