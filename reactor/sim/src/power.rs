//! What a power cut leaves of a disk.

use std::collections::BTreeMap;

use block::Op;

use crate::disk::State;
use crate::{Disk, Rng, SECTOR};

/// How much of what is not durable lands.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Nothing,
    Everything,
    /// Each write whole or not.
    Writes,
    /// Each sector or not; so many in 100.
    Sectors(u64),
    /// Some writes whole, some not, of some a few sectors.
    Mixed,
    /// One write alone, whole or in part.
    One,
    /// All but one.
    AllButOne,
}

impl Disk {
    /// What the disk would hold if its power failed now: all that is durable, and of everything
    /// else (in the cache, or sent and not answered) any part, sector by sector. A file ends with
    /// what landed last.
    pub fn survivor(&self, rng: &mut Rng) -> Vec<u8> {
        let s = self.state();
        let (mut disk, mut len) = (s.stable.clone(), s.stable_len as usize);
        let mut odds = Odds::draw(&s, rng);
        for (&sector, versions) in &s.cache {
            for v in versions {
                // In their order: a cache that holds the newer one does not write the older one.
                if odds.lands(v.write, rng) {
                    disk[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(v.bytes());
                    len = len.max((sector + 1) * SECTOR);
                }
            }
        }
        s.end_flying(&mut disk, &mut len, |number| odds.lands(number, rng));
        disk.truncate(len);
        disk
    }

    /// What the disk holds when whoever used it has died, and it itself goes on: all that was done,
    /// and of what was sent and not answered any part.
    pub fn after_death(&self, rng: &mut Rng) -> Vec<u8> {
        let s = self.state();
        let (mut disk, mut len) = (s.now().to_vec(), s.len() as usize);
        s.end_flying(&mut disk, &mut len, |number| rng.below(100) < number * 37 % 3 * 50);
        disk.truncate(len);
        disk
    }
}

impl State {
    /// Does those sectors of what was sent and not answered for whose request `lands` says so.
    fn end_flying(&self, disk: &mut [u8], len: &mut usize, mut lands: impl FnMut(u64) -> bool) {
        for (n, lane) in self.lanes.iter().enumerate() {
            for h in lane.held.iter().filter(|h| h.end.is_none()) {
                let r = &h.request;
                let valid = self.info.contains(r.offset, r.len) && r.segs_fit();
                let data = self.contents(n, h, 0, r.len).filter(|_| valid);
                for (i, bytes) in data.iter().flat_map(|d| d.chunks(SECTOR)).enumerate() {
                    if lands(h.number) {
                        let at = r.offset as usize + i * SECTOR;
                        disk[at..at + SECTOR].copy_from_slice(bytes);
                        *len = (*len).max(at + SECTOR);
                    }
                }
            }
        }
    }
}

/// By write: how many in 100 of its sectors land.
struct Odds {
    of: BTreeMap<u64, u64>,
}

impl Odds {
    fn draw(s: &State, rng: &mut Rng) -> Odds {
        let cached = s.cache.values().flatten().map(|v| v.write);
        let held = s.lanes.iter().flat_map(|l| &l.held);
        let flying = held.filter(|h| h.request.op != Op::Read).map(|h| h.number);
        let mut of: BTreeMap<u64, u64> = cached.chain(flying).map(|w| (w, 0)).collect();
        let moods = [
            Mood::Nothing,
            Mood::Everything,
            Mood::Writes,
            Mood::Sectors(50),
            Mood::Sectors(90),
            Mood::Sectors(10),
            Mood::Mixed,
            Mood::One,
            Mood::AllButOne,
        ];
        let mood = rng.pick(&moods);
        let special = rng.below(of.len().max(1) as u64) as usize;
        for (i, odds) in of.values_mut().enumerate() {
            *odds = match mood {
                Mood::Nothing => 0,
                Mood::Everything => 100,
                Mood::Writes => rng.pick(&[0, 100]),
                Mood::Sectors(n) => n,
                Mood::Mixed => rng.pick(&[0, 0, 50, 100, 100]),
                Mood::One if i == special => rng.pick(&[50, 100]),
                Mood::One => 0,
                Mood::AllButOne if i == special => rng.pick(&[0, 50]),
                Mood::AllButOne => 100,
            };
        }
        Odds { of }
    }

    fn lands(&mut self, write: u64, rng: &mut Rng) -> bool {
        match self.of.get(&write) {
            None | Some(0) => false,
            Some(100) => true,
            Some(&n) => rng.below(100) < n,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{DiskConfig, Sabotage, Trace};
    use block::Storage;

    fn disk(volatile_cache: bool) -> Disk {
        let (size, block_size) = (8192, 512);
        let config = DiskConfig {
            size,
            block_size,
            volatile_cache,
            discarded: None,
            fresh: 0xd5,
            file: false,
        };
        Disk::new(config, vec![1; 4096], Rng::new(1), Trace::default())
    }

    /// What the first two sectors hold after 200 cuts.
    fn cuts(disk: &Disk) -> BTreeSet<(u8, u8)> {
        let mut rng = Rng::new(5);
        let one = |_| {
            let bytes = disk.survivor(&mut rng);
            assert!(bytes[..SECTOR].iter().all(|&b| b == bytes[0]), "a torn sector");
            assert!(bytes[4096..].iter().all(|&b| b == 0xd5));
            (bytes[0], bytes[SECTOR])
        };
        (0..200).map(one).collect()
    }

    #[test]
    fn what_is_flushed_stays_and_of_the_rest_any_part() {
        let mut d = disk(true);
        d.write_at(0, &[2; 2 * SECTOR]).unwrap();
        assert_eq!(cuts(&d), BTreeSet::from([(1, 1), (1, 2), (2, 1), (2, 2)]));
        d.flush().unwrap();
        assert_eq!(cuts(&d), BTreeSet::from([(2, 2)]));
        d.write_at(0, &[3; SECTOR]).unwrap();
        d.write_at(0, &[4; SECTOR]).unwrap();
        assert_eq!(cuts(&d), BTreeSet::from([(2, 2), (3, 2), (4, 2)]));
    }

    #[test]
    fn without_a_cache_nothing_is_lost_and_a_lie_is_one() {
        let mut d = disk(false);
        d.write_at(0, &[2; SECTOR]).unwrap();
        assert_eq!(cuts(&d), BTreeSet::from([(2, 1)]));
        let mut d = disk(true);
        d.set_sabotage(Sabotage::DropFlushes);
        d.write_at(0, &[2; SECTOR]).unwrap();
        d.flush().unwrap();
        assert_eq!(cuts(&d), BTreeSet::from([(1, 1), (2, 1)]));
    }

    #[test]
    fn the_control_path_loses_its_power() {
        let mut d = disk(true);
        d.set_power_for(1);
        d.write_at(0, &[2; SECTOR]).unwrap();
        assert!(d.flush().is_err() && d.write_at(0, &[3; SECTOR]).is_err());
        assert_eq!(cuts(&d), BTreeSet::from([(1, 1), (2, 1)]));
    }
}
