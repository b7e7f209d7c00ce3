//! Axes: where a value lies on one, where its ticks are, and how they are labelled.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;

use super::draw::figure;

/// What the values of an axis are.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scale {
    /// From zero.
    Linear,
    /// By powers of ten; nothing is zero.
    Log,
    /// The same, of how many times something is.
    Times,
    /// Shares as nines: 1 is 90 %, 2 is 99 %; up to so many.
    Nines(u32),
    /// Names, at 0, 1, 2, …
    Names(Vec<String>),
}

/// An axis.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    /// One on which there is room for these values.
    pub(super) fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (1.0, 1.0) };
        let (low, high) = match &scale {
            Scale::Linear => (0.0, if high > 0.0 { high } else { 1.0 }),
            Scale::Log => (low / 1.25, high * 1.25),
            Scale::Times => (low.min(1.0) / 1.3, high.max(1.0) * 5.0),
            Scale::Nines(most) => (0.0, f64::from(*most)),
            Scale::Names(names) => (-0.3, names.len() as f64 - 0.7),
        };
        Axis { scale, low, high }
    }

    fn is_log(&self) -> bool {
        matches!(self.scale, Scale::Log | Scale::Times)
    }

    /// How far along the axis a value is: from 0 to 1.
    fn along(&self, value: f64) -> f64 {
        let of = |v: f64| if self.is_log() { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let (low, high) = (of(self.low), of(self.high));
        ((of(value) - low) / (high - low)).clamp(0.0, 1.0)
    }

    /// Powers of ten, and what is between them where these are few.
    fn decades(&self, most: usize) -> Vec<f64> {
        let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let within = |factors: &[f64], step: i32| -> Vec<f64> {
            let of = |e: i32| factors.iter().map(move |f| f * 10f64.powi(e));
            let all = exponents.clone().filter(|e| e.rem_euclid(step) == 0).flat_map(of);
            all.filter(|v| (self.low..=self.high).contains(v)).collect()
        };
        // The finest that are not too many.
        let fine = [&[1.0, 2.0, 5.0][..], &[1.0, 3.0]].map(|factors| within(factors, 1));
        if let Some(ticks) = fine.into_iter().find(|ticks| ticks.len() <= most) {
            return ticks;
        }
        (1..).map(|step| within(&[1.0], step)).find(|ticks| ticks.len() <= most).unwrap_or_default()
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.along(*value) * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let whole = |n: usize| (0..n).map(|n| n as f64).collect();
        match &self.scale {
            Scale::Linear => RangedCoordf64::from(self.low..self.high).key_points(hint),
            Scale::Log | Scale::Times => self.decades(hint.max_num_points().max(2)),
            Scale::Nines(most) => whole(*most as usize + 1),
            Scale::Names(names) => whole(names.len()),
        }
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        figure(*value)
    }

    fn format_ext(&self, value: &f64) -> String {
        match &self.scale {
            Scale::Linear | Scale::Log => figure(*value),
            Scale::Times => format!("{}×", figure(*value)),
            Scale::Nines(_) => match value.round() as i32 {
                0 => "0 %".to_owned(),
                1 => "90 %".to_owned(),
                2 => "99 %".to_owned(),
                n => format!("99.{} %", "9".repeat(n.clamp(3, 9) as usize - 2)),
            },
            Scale::Names(names) => names.get(value.round() as usize).cloned().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_not_too_many() {
        let ticks =
            |low: f64, high: f64, most| Axis { scale: Scale::Log, low, high }.key_points(most);
        assert_eq!(ticks(1.0, 10.0, 6), [1.0, 2.0, 5.0, 10.0]);
        assert_eq!(ticks(0.7, 300.0, 6), [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]);
        assert_eq!(ticks(0.7, 400.0, 5), [1.0, 10.0, 100.0]);
        assert_eq!(ticks(1.0, 1e9, 6), [1.0, 100.0, 1e4, 1e6, 1e8]);
        assert!(ticks(1e-6, 1e15, 4).len() <= 4);
        let names = Scale::Names(vec!["A".into(), "B".into()]);
        let names = Axis::of(names, [0.0, 1.0].into_iter());
        assert_eq!(names.key_points(6), [0.0, 1.0]);
        assert_eq!(names.format_ext(&1.0), "B");
        let nines = Axis::of(Scale::Nines(3), std::iter::empty());
        assert_eq!(
            nines.key_points(1).iter().map(|v| nines.format_ext(v)).collect::<Vec<_>>(),
            ["0 %", "90 %", "99 %", "99.9 %"]
        );
    }

    #[test]
    fn values_lie_in_their_order() {
        let axis = Axis::of(Scale::Log, [1.0, 100.0].into_iter());
        let at = |v: f64| axis.map(&v, (0, 1000));
        assert!(at(0.0) == 0 && at(1.0) < at(10.0) && at(10.0) == 500 && at(1e9) == 1000);
        let axis = Axis::of(Scale::Linear, [0.0].into_iter());
        assert_eq!((axis.map(&0.5, (0, 1000)), axis.map(&0.5, (1000, 0))), (500, 500));
    }
}
