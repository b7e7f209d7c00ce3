//! [`Many`]: several disks of one server, loaded as one: their bytes behind each other.

use bench::Error;
use bench::run::{Done, Limits, Request, Target};

/// Disks of one size.
pub(crate) struct Many<T> {
    disks: Vec<T>,
    limits: Limits,
    /// Bytes of each.
    each: u64,
    /// Requests under way, by disk.
    under_way: Vec<u32>,
}

impl<T: Target> Many<T> {
    /// Of at least one disk; all have the size of the first.
    pub(crate) fn new(disks: Vec<T>) -> Result<Many<T>, Error> {
        let first = disks.first().ok_or_else(|| Error::other("no disks"))?;
        let mut limits = first.limits().clone();
        let each = limits.size;
        if let Some(other) = disks.iter().find(|d| d.limits().size != each) {
            let l = other.limits();
            return Err(Error::other(format!("{}: {} bytes, not {each}", l.name, l.size)));
        }
        limits.size = each.saturating_mul(disks.len() as u64);
        let under_way = vec![0; disks.len()];
        Ok(Many { disks, limits, each, under_way })
    }

    /// The first of them.
    pub(crate) fn first(&self) -> &T {
        // There is one, or it would not have been made.
        &self.disks[0]
    }

    /// The disks again.
    pub(crate) fn into_disks(self) -> Vec<T> {
        self.disks
    }
}

impl<T: Target> Target for Many<T> {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, depth: u32, max_len: u32, keep: bool) -> Result<(), Error> {
        self.under_way.fill(0);
        self.disks.iter_mut().try_for_each(|d| d.prepare(depth, max_len, keep))
    }

    #[inline]
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        let number = (request.offset / self.each) as usize;
        let disk = self.disks.get_mut(number);
        let disk = disk.ok_or_else(|| Error::other("a request behind the last disk"))?;
        let offset = request.offset % self.each;
        let sent = disk.send(&Request { offset, ..*request }, data)?;
        self.under_way[number] += u32::from(sent);
        Ok(sent)
    }

    /// It looks at each disk that has something to do, and never waits: it could wait for the wrong one.
    fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        for (disk, under_way) in self.disks.iter_mut().zip(&mut self.under_way) {
            if *under_way > 0 {
                disk.poll(0, &mut |answer| {
                    *under_way = under_way.saturating_sub(1);
                    done(answer);
                })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bench::run::{Job, Kind, Shape, run};

    use super::*;

    /// Answers all at the next poll, and remembers what it was asked for.
    struct Disk {
        limits: Limits,
        sent: Vec<Request>,
        all: Vec<Request>,
    }

    impl Target for Disk {
        fn limits(&self) -> &Limits {
            &self.limits
        }

        fn prepare(&mut self, _: u32, _: u32, _: bool) -> Result<(), Error> {
            Ok(())
        }

        fn send(&mut self, request: &Request, _: Option<&[u8]>) -> Result<bool, Error> {
            self.sent.push(*request);
            Ok(true)
        }

        fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
            for request in self.sent.drain(..) {
                done(Done { slot: request.slot, error: None, data: &[] });
                self.all.push(request);
            }
            Ok(())
        }
    }

    fn disk(size: u64) -> Disk {
        let limits = Limits {
            name: "disk".into(),
            size,
            block: 512,
            max_len: 1 << 20,
            max_depth: 64,
            writable: true,
            flush: true,
            trim: true,
            patience: 1_000_000_000,
        };
        Disk { limits, sent: Vec::new(), all: Vec::new() }
    }

    #[test]
    fn each_disk_gets_its_share_within_its_bounds() {
        let mut many = Many::new((0..3).map(|_| disk(1 << 20)).collect()).unwrap();
        assert_eq!(many.limits().size, 3 << 20);
        let shape = Shape::Depth(8);
        let job = Job { shape, requests: Some(3000), seconds: 10.0, ..Job::default() };
        let o = run(&job, &mut many, None, &mut |_| {}).unwrap();
        assert_eq!((o.requests, o.errors), (3000, 0));
        for disk in many.into_disks() {
            assert!(disk.all.len() > 700, "{}", disk.all.len());
            assert!(disk.all.iter().all(|r| r.kind == Kind::Read && r.offset + 4096 <= 1 << 20));
        }
    }

    #[test]
    fn disks_of_two_sizes_are_refused() {
        let e = Many::new(vec![disk(1 << 20), disk(2 << 20)]).err().unwrap();
        assert!(e.to_string().contains("2097152 bytes"), "{e}");
        assert!(Many::<Disk>::new(Vec::new()).is_err());
    }
}
