//! [`Rng`]: the seeded generator that every decision of a run is drawn from.

/// A small generator (SplitMix64). The same seed gives the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator; neighbouring seeds have nothing in common.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // The bias is that of n over 2^64.
        self.draw() % n
    }

    /// A number from `from` to `to`, both included.
    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// True once in `n` times; never for 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// An index into `weights`, each as often as its weight says; not all are 0.
    pub fn weighted(&mut self, weights: &[u64]) -> usize {
        let mut at = self.below(weights.iter().sum());
        for (i, &w) in weights.iter().enumerate() {
            if at < w {
                return i;
            }
            at -= w;
        }
        0
    }

    /// A generator of its own for some part, so that more draws there change nothing here.
    pub fn fork(&mut self) -> Rng {
        Rng(self.draw())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let mut a = Rng::new(7);
        // The first output of SplitMix64 for seed 7: a change here would void all kept seeds.
        assert_eq!(a.draw(), 7_191_089_600_892_374_487);
        let (mut b, mut c) = (Rng::new(7), Rng::new(8));
        b.draw();
        assert!(a.draw() == b.draw() && a.draw() != c.draw());
    }

    #[test]
    fn weights_are_kept() {
        let (mut rng, mut hits) = (Rng::new(1), [0; 3]);
        (0..4000).for_each(|_| hits[rng.weighted(&[1, 0, 3])] += 1);
        assert!(hits[1] == 0 && hits[0] > 800 && hits[2] > 2600, "{hits:?}");
        assert!((0..1000).all(|_| (3..=5).contains(&rng.within(3, 5))));
    }
}
