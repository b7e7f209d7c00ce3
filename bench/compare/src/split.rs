//! [`Split`]: requests that are longer than a target takes, sent in parts, as a guest's kernel does.

use std::collections::VecDeque;

use bench::Error;
use bench::run::{Done, Limits, Request, Target};

/// Longest request in bytes: what NBD servers take, too.
const MAX_LEN: u32 = 2 << 20;

/// A target that takes longer requests than the one below.
pub(crate) struct Split<T> {
    below: T,
    limits: Limits,
    /// Bytes of a part.
    part: u32,
    /// Parts of a request at most; so many slots of the one below belong to each of ours.
    parts: u32,
    /// Parts that are not answered yet, and the first error, by slot.
    left: Vec<(u32, Option<i32>)>,
    /// Parts that there was no room for.
    waiting: VecDeque<Request>,
}

impl<T: Target> Split<T> {
    pub(crate) fn new(below: T) -> Split<T> {
        let limits = below.limits().clone();
        // Parts are whole blocks.
        let part = (limits.max_len - limits.max_len % limits.block.max(1)).max(limits.block);
        let limits = Limits { max_len: limits.max_len.max(MAX_LEN), ..limits };
        Split { below, limits, part, parts: 1, left: Vec::new(), waiting: VecDeque::new() }
    }

    /// The one below.
    pub(crate) fn below(&self) -> &T {
        &self.below
    }

    /// The same, for good.
    pub(crate) fn into_below(self) -> T {
        self.below
    }
}

impl<T: Target> Target for Split<T> {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, depth: u32, max_len: u32, keep: bool) -> Result<(), Error> {
        self.parts = max_len.div_ceil(self.part).max(1);
        if keep && self.parts > 1 {
            return Err(Error::other(format!(
                "{}: what requests of {max_len} bytes read is not kept: at most {}",
                self.limits.name, self.part
            )));
        }
        self.left = vec![(0, None); depth as usize];
        self.waiting = VecDeque::with_capacity(depth as usize * self.parts as usize);
        self.below.prepare(depth.saturating_mul(self.parts), max_len.min(self.part), keep)
    }

    #[inline]
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        let first = request.slot * self.parts;
        if request.len <= self.part {
            let sent = self.below.send(&Request { slot: first, ..*request }, data)?;
            if sent {
                self.left[request.slot as usize] = (1, None);
            }
            return Ok(sent);
        }
        let (mut at, mut n) = (0, 0);
        while at < request.len {
            let len = self.part.min(request.len - at);
            let offset = request.offset + u64::from(at);
            let part = Request { slot: first + n, kind: request.kind, offset, len };
            let data = data.map(|d| &d[at as usize..(at + len) as usize]);
            // Parts stay in order.
            let sent = self.waiting.is_empty() && self.below.send(&part, data)?;
            match (sent, n) {
                (true, _) => {}
                (false, 0) => return Ok(false),
                (false, _) if data.is_some() => {
                    let name = &self.limits.name;
                    return Err(Error::other(format!("{name}: no room for a part of a request")));
                }
                (false, _) => self.waiting.push_back(part),
            }
            at += len;
            n += 1;
        }
        self.left[request.slot as usize] = (n, None);
        Ok(true)
    }

    #[inline]
    fn poll(&mut self, wait: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        while let Some(part) = self.waiting.front() {
            if !self.below.send(part, None)? {
                break;
            }
            self.waiting.pop_front();
        }
        let (left, parts) = (&mut self.left, self.parts);
        self.below.poll(wait, &mut |part| {
            let slot = part.slot / parts;
            let Some((left, error)) = left.get_mut(slot as usize) else { return };
            *error = error.or(part.error);
            *left = left.saturating_sub(1);
            if *left == 0 {
                done(Done { slot, error: *error, data: part.data });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use bench::run::{Job, Kind, Shape, Sizes, run};

    use super::*;

    /// Takes eight requests of up to 128 KiB, and answers them in the opposite order.
    struct Small {
        limits: Limits,
        sent: Vec<Request>,
        all: Vec<Request>,
        fails: bool,
    }

    impl Target for Small {
        fn limits(&self) -> &Limits {
            &self.limits
        }

        fn prepare(&mut self, _: u32, max_len: u32, _: bool) -> Result<(), Error> {
            assert!(max_len <= 128 << 10);
            Ok(())
        }

        fn send(&mut self, request: &Request, _: Option<&[u8]>) -> Result<bool, Error> {
            let room = self.sent.len() < 8;
            if room {
                assert!(self.sent.iter().all(|r| r.slot != request.slot), "a slot twice");
                self.sent.push(*request);
            }
            Ok(room)
        }

        fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
            while let Some(request) = self.sent.pop() {
                let error = (self.fails && self.all.len() == 3).then_some(5);
                self.all.push(request);
                done(Done { slot: request.slot, error, data: &[] });
            }
            Ok(())
        }
    }

    fn small(fails: bool) -> Split<Small> {
        let limits = Limits {
            name: "small".into(),
            size: 64 << 20,
            block: 512,
            max_len: 128 << 10,
            max_depth: 64,
            writable: true,
            flush: true,
            trim: true,
            patience: 1_000_000_000,
        };
        Split::new(Small { limits, sent: Vec::new(), all: Vec::new(), fails })
    }

    fn job(size: u32) -> Job {
        let (sizes, shape) = (Sizes(vec![(size, 100)]), Shape::Depth(3));
        Job { sizes, shape, requests: Some(50), seconds: 10.0, ..Job::default() }
    }

    #[test]
    fn long_requests_go_in_parts_and_are_answered_once() {
        let mut target = small(false);
        let o = run(&job(1 << 20), &mut target, None, &mut |_| {}).unwrap();
        assert_eq!((o.requests, o.errors, o.bytes), (50, 0, 50 << 20));
        let below = target.into_below();
        assert_eq!(below.all.len(), 400);
        assert!(below.all.iter().all(|r| r.len == 128 << 10 && r.kind == Kind::Read));
        let mut short = small(false);
        let o = run(&job(4096), &mut short, None, &mut |_| {}).unwrap();
        assert_eq!((o.requests, short.below().all.len()), (50, 50));
    }

    #[test]
    fn one_part_that_fails_fails_its_request() {
        let mut target = small(true);
        let o = run(&job(1 << 20), &mut target, None, &mut |_| {}).unwrap();
        assert_eq!((o.requests + o.errors, o.errors), (50, 1));
    }
}
