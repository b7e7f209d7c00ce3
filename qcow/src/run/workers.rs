//! [`Workers`]: threads that decompress clusters, so that no reactor stands still for it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};

use crossbeam_queue::ArrayQueue;
use reactor::Wake;

use crate::compress::Decompressor;
use crate::format::Compression;

/// What a worker does.
type Work = Box<dyn FnOnce(&mut Decompressor) + Send>;

/// Threads for the images of a process, begun when they are first needed.
pub struct Workers {
    count: usize,
    threads: OnceLock<Vec<Sender<Work>>>,
    next: AtomicUsize,
}

impl Workers {
    /// At most `count` threads.
    pub fn new(count: usize) -> Arc<Workers> {
        Arc::new(Workers { count, threads: OnceLock::new(), next: AtomicUsize::new(0) })
    }

    /// Has `work` done. Gives it back if there are no threads to be had.
    fn send(&self, work: Work) -> Result<(), Work> {
        let threads = self.threads.get_or_init(|| (0..self.count).filter_map(thread).collect());
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        match threads.get(n % threads.len().max(1)) {
            Some(t) => t.send(work).map_err(|e| e.0),
            None => Err(work),
        }
    }
}

fn thread(_number: usize) -> Option<Sender<Work>> {
    let (send, receive) = channel::<Work>();
    let body = move || {
        let mut decompressor = Decompressor::new();
        while let Ok(work) = receive.recv() {
            work(&mut decompressor);
        }
    };
    let spawned = std::thread::Builder::new().name("unpack".to_owned()).spawn(body);
    spawned.inspect_err(|e| log::warn!("no thread to decompress: {e}")).ok().map(|_| send)
}

/// The way of an image to the workers.
pub(super) struct Unpacker {
    workers: Arc<Workers>,
    /// Of the image's reactor.
    wake: Wake,
    /// There are answers since this was last cleared.
    answered: Arc<AtomicBool>,
}

/// A cluster, or why it cannot be decompressed.
pub(super) type Unpacked = Result<Vec<u8>, String>;

impl Unpacker {
    pub(super) fn new(workers: Arc<Workers>, wake: Wake) -> Unpacker {
        Unpacker { workers, wake, answered: Arc::default() }
    }

    /// Has a cluster of `size` bytes decompressed. The answer comes into the queue.
    pub(super) fn send(
        &self,
        compression: Compression,
        packed: Vec<u8>,
        size: usize,
    ) -> Arc<ArrayQueue<Unpacked>> {
        let reply = Arc::new(ArrayQueue::new(1));
        let (to, answered, wake) = (reply.clone(), self.answered.clone(), self.wake.clone());
        let work = move |d: &mut Decompressor| {
            let _one = to.push(unpack(d, compression, &packed, size));
            answered.store(true, Ordering::Release);
            wake.wake();
        };
        if let Err(work) = self.workers.send(Box::new(work)) {
            work(&mut Decompressor::new());
        }
        reply
    }

    #[inline]
    pub(super) fn has_answers(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }

    pub(super) fn clear(&self) {
        self.answered.store(false, Ordering::Release);
    }
}

/// Decompresses a cluster of `size` bytes.
pub(super) fn unpack(
    decompressor: &mut Decompressor,
    compression: Compression,
    packed: &[u8],
    size: usize,
) -> Unpacked {
    let mut data = vec![0; size];
    decompressor.decode(compression, packed, &mut data).map_err(|e| e.to_string())?;
    Ok(data)
}
