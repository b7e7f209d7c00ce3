//! Medians, and ratios of medians with the interval in which they lie with 95 % confidence.
//!
//! Rounds are interleaved, so round `i` of one server and round `i` of another met the same machine:
//! what disturbs both cancels out in their ratio. The spread of the logarithms of these paired ratios,
//! by Student's t, gives the interval; around the ratio of medians, which is what is reported, and
//! wider by the square root of π/2, since a median scatters that much more than a mean.

/// The one in the middle, or the mean of the two there; `None` of nothing.
pub(crate) fn median(of: &[f64]) -> Option<f64> {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (half, odd) = (sorted.len() / 2, sorted.len() % 2 == 1);
    match sorted.get(half)? {
        &upper if odd => Some(upper),
        upper => Some((sorted.get(half.checked_sub(1)?)? + upper) / 2.0),
    }
}

/// A ratio.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Ratio {
    /// Of the medians.
    pub(crate) value: f64,
    /// Where it lies with 95 % confidence; `None` with fewer than two pairs.
    pub(crate) interval: Option<[f64; 2]>,
}

/// The ratio of two servers' figures, of which those at the same place are from the same round. `None`
/// if there is none of one, or any is not above 0.
pub(crate) fn ratio(of: &[f64], to: &[f64]) -> Option<Ratio> {
    let good = |list: &[f64]| list.iter().all(|&x| x.is_finite() && x > 0.0);
    if !good(of) || !good(to) {
        return None;
    }
    let value = median(of)? / median(to)?;
    let logs: Vec<f64> = of.iter().zip(to).map(|(a, b)| (a / b).ln()).collect();
    let interval = half_width(&logs).map(|w| [value * (-w).exp(), value * w.exp()]);
    Some(Ratio { value, interval })
}

/// How far the median of these lies from the true one at most, with 95 % confidence.
fn half_width(values: &[f64]) -> Option<f64> {
    let freedom = values.len().checked_sub(1).filter(|&n| n > 0)?;
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / freedom as f64;
    Some(student(freedom) * (variance / n).sqrt() * std::f64::consts::FRAC_PI_2.sqrt())
}

/// The quantile 0.975 of Student's distribution, by degrees of freedom.
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    // Behind the table by the first terms of its expansion in 1/freedom (Abramowitz and Stegun, 26.7.5).
    let z: f64 = 1.959_964;
    let far = || {
        let v = freedom as f64;
        z + (z.powi(3) + z) / (4.0 * v)
            + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
    };
    freedom.checked_sub(1).and_then(|i| TABLE.get(i)).copied().unwrap_or_else(far)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-3, "{a} is not {b}");
    }

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[5.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn a_ratio_computed_by_hand() {
        // Medians 10 and 5. Logarithms of the pairs' ratios: ln 2, ln 2.2, ln 1.8 = 0.693147,
        // 0.788457, 0.587787; mean 0.689797; squared deviations 0.0000112, 0.0097340, 0.0104060,
        // sum 0.0201512, variance 0.0100756; standard error sqrt(0.0100756 / 3) = 0.0579528; times
        // 4.303 and 1.253314: 0.312538.
        let r = ratio(&[10.0, 11.0, 9.0], &[5.0, 5.0, 5.0]).unwrap();
        assert_eq!(r.value, 2.0);
        let [low, high] = r.interval.unwrap();
        near(low, 2.0 * (-0.312538f64).exp());
        near(high, 2.0 * 0.312538f64.exp());
    }

    #[test]
    fn what_disturbs_both_cancels_out() {
        let r = ratio(&[20.0, 60.0, 40.0], &[10.0, 30.0, 20.0]).unwrap();
        assert_eq!((r.value, r.interval), (2.0, Some([2.0, 2.0])));
    }

    #[test]
    fn what_cannot_be_told_is_not() {
        assert_eq!(ratio(&[2.0], &[1.0]), Some(Ratio { value: 2.0, interval: None }));
        assert_eq!(ratio(&[], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
        assert_eq!(ratio(&[f64::NAN], &[1.0]), None);
    }

    #[test]
    fn quantiles_behind_the_table() {
        near(student(1), 12.706);
        near(student(30), 2.042);
        near(student(31), 2.0395);
        near(student(60), 2.0003);
        near(student(1000), 1.9623);
    }
}
