//! Random numbers, and which block is asked for: the same seed gives the same.

/// Vigna's xorshift64*: a multiplication and three shifts a number.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Any seed will do, 0 too.
    pub(super) fn new(seed: u64) -> Random {
        // One step of splitmix64, so that seeds that are alike give streams that are not.
        let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Random((z ^ z >> 31) | 1)
    }

    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 to `n - 1`, by one multiplication: off by less than `n / 2^64`.
    #[inline]
    pub(super) fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// 0 to 1, without 1.
    #[inline]
    pub(super) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Ranks by Zipf's law, for any number of them and without a table: rejection-inversion, by
/// W. Hörmann and G. Derflinger (ACM Transactions on Modeling and Computer Simulation 6, 1996).
#[derive(Clone, Debug)]
pub(super) struct Zipf {
    theta: f64,
    count: u64,
    /// Of the integral of the hat: where it begins, where it ends.
    from: f64,
    to: f64,
    /// A rank that is no further than this above where it was found is taken at once.
    at_once: f64,
    ranks: Shuffle,
}

impl Zipf {
    /// `count` blocks, at least one; `theta` above 0.
    pub(super) fn new(theta: f64, count: u64, seed: u64) -> Zipf {
        let mut z = Zipf {
            theta,
            count,
            from: 0.0,
            to: 0.0,
            at_once: 0.0,
            ranks: Shuffle::new(count, seed),
        };
        z.from = z.integral(1.5) - 1.0;
        z.to = z.integral(count as f64 + 0.5);
        z.at_once = 2.0 - z.inverse(z.integral(2.5) - z.hat(2.0));
        z
    }

    /// The next block, 0 to `count - 1`: its rank's place in a random order.
    #[inline]
    pub(super) fn next(&self, random: &mut Random) -> u64 {
        self.ranks.place(self.rank(random))
    }

    /// 0 for the one that is asked for most.
    fn rank(&self, random: &mut Random) -> u64 {
        loop {
            let u = self.to + random.share() * (self.from - self.to);
            let x = self.inverse(u);
            let k = (x + 0.5).floor().clamp(1.0, self.count as f64);
            if k - x <= self.at_once || u >= self.integral(k + 0.5) - self.hat(k) {
                return (k as u64 - 1).min(self.count - 1);
            }
        }
    }

    fn hat(&self, x: f64) -> f64 {
        (-self.theta * x.ln()).exp()
    }

    fn integral(&self, x: f64) -> f64 {
        let (ln, t) = (x.ln(), (1.0 - self.theta) * x.ln());
        // (e^t - 1) / t, by its series where it would be 0 / 0.
        let by = if t.abs() > 1e-8 { t.exp_m1() / t } else { 1.0 + t / 2.0 * (1.0 + t / 3.0) };
        by * ln
    }

    fn inverse(&self, x: f64) -> f64 {
        let t = (x * (1.0 - self.theta)).max(-1.0);
        // ln(1 + t) / t.
        let by = if t.abs() > 1e-8 { t.ln_1p() / t } else { 1.0 - t / 2.0 + t * t / 3.0 };
        (by * x).exp()
    }
}

/// A random order of any number of things, without a table: a bijection of the next power of two,
/// repeated until it falls into the range (cycle walking), which takes less than two times on average.
#[derive(Clone, Debug)]
struct Shuffle {
    count: u64,
    mask: u64,
    shift: u32,
    factors: [u64; 2],
    add: u64,
}

impl Shuffle {
    fn new(count: u64, seed: u64) -> Shuffle {
        let mut random = Random::new(seed ^ 0x5bf0_3635);
        let bits = 64 - count.saturating_sub(1).leading_zeros();
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        let factors = [random.next() | 1, random.next() | 1];
        Shuffle { count, mask, shift: bits.div_ceil(2).max(1), factors, add: random.next() }
    }

    #[inline]
    fn place(&self, rank: u64) -> u64 {
        let mut x = rank;
        loop {
            // Each step can be undone within the mask's bits.
            x = x.wrapping_add(self.add).wrapping_mul(self.factors[0]) & self.mask;
            x ^= x >> self.shift;
            x = x.wrapping_mul(self.factors[1]) & self.mask;
            x ^= x >> self.shift;
            if x < self.count {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_are_uniform() {
        for seed in [0, 1, 2, u64::MAX] {
            let mut random = Random::new(seed);
            let mut hits = [0u64; 64];
            const EACH: u64 = 2000;
            for _ in 0..64 * EACH {
                hits[random.below(64) as usize] += 1;
            }
            // Chi-square with 63 degrees of freedom: above 120 in one of 50,000 cases.
            let off = |n: u64| (n as f64 - EACH as f64).powi(2) / EACH as f64;
            let chi: f64 = hits.iter().map(|&n| off(n)).sum();
            assert!((20.0..120.0).contains(&chi), "seed {seed}: {chi}");
        }
        let (mut a, mut b) = (Random::new(7), Random::new(8));
        assert!((0..100).all(|_| a.below(u64::MAX) != b.below(u64::MAX)));
        assert!((0..1000).all(|_| (0.0..1.0).contains(&a.share()) && a.below(1) == 0));
    }

    #[test]
    fn ranks_follow_the_law() {
        for theta in [0.5, 0.99, 1.0, 1.2, 2.5] {
            let count = 1000;
            let zipf = Zipf::new(theta, count, 3);
            let mut random = Random::new(5);
            const DRAWS: usize = 200_000;
            let mut hits = vec![0u64; count as usize];
            for _ in 0..DRAWS {
                hits[zipf.rank(&mut random) as usize] += 1;
            }
            let weight = |k: usize| ((k + 1) as f64).powf(-theta);
            let all: f64 = (0..count as usize).map(weight).sum();
            // The head one by one, the rest in lots: each with enough hits for the square to mean something.
            let lots = [0..1, 1..2, 2..4, 4..10, 10..50, 50..200, 200..1000];
            let mut chi = 0.0;
            for lot in lots {
                let expected = lot.clone().map(weight).sum::<f64>() / all * DRAWS as f64;
                let found = hits[lot].iter().sum::<u64>() as f64;
                chi += (found - expected).powi(2) / expected.max(1.0);
            }
            // 6 degrees of freedom: above 30 in one of 25,000 cases.
            assert!(chi < 30.0, "theta {theta}: {chi}");
        }
    }

    #[test]
    fn the_head_of_a_huge_disk_has_its_share() {
        // 1 / zeta(1.2) = 0.1788 of all for an endless disk; a little more for 2^40 blocks.
        let zipf = Zipf::new(1.2, 1 << 40, 1);
        let mut random = Random::new(1);
        let first = zipf.ranks.place(0);
        const DRAWS: usize = 100_000;
        let hits = (0..DRAWS).filter(|_| zipf.next(&mut random) == first).count();
        assert!((0.17..0.19).contains(&(hits as f64 / DRAWS as f64)), "{hits}");
    }

    #[test]
    fn a_random_order_has_everything_once() {
        for count in [1u64, 2, 3, 5, 64, 1000, 1025] {
            let shuffle = Shuffle::new(count, 9);
            let mut seen = vec![false; count as usize];
            for rank in 0..count {
                let at = shuffle.place(rank) as usize;
                assert!(!std::mem::replace(&mut seen[at], true), "{count}: {at} twice");
            }
        }
        let (a, b) = (Shuffle::new(1000, 1), Shuffle::new(1000, 2));
        assert!((0..1000).filter(|&n| a.place(n) == b.place(n)).count() < 20);
        // Neighbours do not stay together.
        assert!((1..1000).filter(|&n| a.place(n).abs_diff(a.place(n - 1)) < 8).count() < 60);
        assert!(Shuffle::new(u64::MAX, 1).place(u64::MAX - 1) < u64::MAX);
    }
}
