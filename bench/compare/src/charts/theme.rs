//! Colours: one table for the page and for charts that stand alone, with variants for light and dark.
//!
//! Charts are drawn in stand-in colours, which become classes here: so that a chart takes its colours
//! from the page that it is in, and shows no colour that would not be told apart in the other mode.

use std::fmt::Write as _;

use plotters::style::RGBColor;

/// A colour on light ground and on dark ground, as 0xRRGGBB.
type Pair = (u32, u32);

/// Ground, text, lesser text, lines of grids, ground of boxes, accent.
pub(crate) const BASE: [(&str, Pair); 6] = [
    ("ground", (0xffffff, 0x12161c)),
    ("text", (0x1a1f27, 0xe8ebf0)),
    ("muted", (0x566070, 0xa3adba)),
    ("line", (0xd8dde5, 0x333b47)),
    ("box", (0xf5f7fa, 0x1a2029)),
    ("accent", (0x00619a, 0x62bdf0)),
];

/// Colours of series, after Okabe and Ito, who chose them for all kinds of colour vision; darker or lighter
/// where there would be too little contrast. Each has a dash pattern too.
pub(crate) const SERIES: [(Pair, &str); 8] = [
    ((0x0072b2, 0x56b4e9), "none"),
    ((0xc24e00, 0xff8a4c), "28 12"),
    ((0x008060, 0x2fc79a), "8 10"),
    ((0xa8407f, 0xe58fc1), "40 10 8 10"),
    ((0x946200, 0xf0b840), "60 16"),
    ((0x4f5b66, 0xb9c2cc), "16 8"),
    ((0x5b4fc4, 0xa99df5), "48 8 8 8 8 8"),
    ((0x7a4b1e, 0xd8a47f), "20 20"),
];

const STAND_IN: u8 = 1;
pub(super) const TEXT: RGBColor = RGBColor(2, 0, 0);
pub(super) const MUTED: RGBColor = RGBColor(2, 0, 1);
pub(super) const GRID: RGBColor = RGBColor(2, 0, 2);

/// The stand-in for a series' colour and dash pattern: after the last colour they go together otherwise.
pub(super) fn series(index: usize) -> RGBColor {
    let n = SERIES.len();
    RGBColor(STAND_IN, ((index + index / n) % n) as u8, (index % n) as u8)
}

/// The style sheet for charts: colours as variables, and the classes.
pub(crate) fn css() -> String {
    let mut css = ":root{color-scheme:light dark;".to_owned();
    let variables = |css: &mut String, pick: fn(Pair) -> u32| {
        for (name, pair) in BASE {
            let _ = write!(css, "--{name}:#{:06x};", pick(pair));
        }
        for (i, (pair, _)) in SERIES.iter().enumerate() {
            let _ = write!(css, "--s{i}:#{:06x};", pick(*pair));
        }
    };
    variables(&mut css, |p| p.0);
    css.push_str("}@media screen and (prefers-color-scheme:dark){:root{");
    variables(&mut css, |p| p.1);
    css.push_str("}}svg.chart text{font-family:system-ui,\"DejaVu Sans\",sans-serif}");
    for (class, colour) in [("t", "text"), ("m", "muted"), ("g", "line")] {
        let _ = write!(css, ".{class}f{{fill:var(--{colour})}}.{class}s{{stroke:var(--{colour})}}");
    }
    for (i, (_, dash)) in SERIES.iter().enumerate() {
        let _ = write!(
            css,
            ".f{i}{{fill:var(--s{i})}}.s{i}{{stroke:var(--s{i})}}.d{i}{{stroke-dasharray:{dash}}}"
        );
    }
    css
}

/// Classes for the stand-ins. Text in a chart cannot look like one: its quotes are escaped.
pub(super) fn classes(mut svg: String) -> String {
    let mut replace = |attribute: &str, RGBColor(r, g, b): RGBColor, class: String| {
        let from = format!("{attribute}=\"#{r:02X}{g:02X}{b:02X}\"");
        svg = svg.replace(&from, &format!("class=\"{class}\""));
    };
    for (colour, class) in [(TEXT, "t"), (MUTED, "m"), (GRID, "g")] {
        replace("fill", colour, format!("{class}f"));
        replace("stroke", colour, format!("{class}s"));
    }
    for i in 0..SERIES.len() * SERIES.len() {
        let colour = series(i);
        replace("fill", colour, format!("f{}", colour.2));
        replace("stroke", colour, format!("s{} d{}", colour.2, colour.1));
    }
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contrast by the rules of WCAG 2.2: relative luminance, and the ratio of two.
    fn contrast(a: u32, b: u32) -> f64 {
        let luminance = |c: u32| {
            let part = |shift: u32| {
                let v = f64::from(c >> shift & 0xff) / 255.0;
                if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * part(16) + 0.7152 * part(8) + 0.0722 * part(0)
        };
        let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
        if a > b { a / b } else { b / a }
    }

    #[test]
    fn everything_can_be_read_in_both_modes() {
        let of = |name: &str| BASE.iter().find(|(n, _)| *n == name).unwrap().1;
        for pick in [|p: Pair| p.0, |p: Pair| p.1] {
            for ground in ["ground", "box"].map(|g| pick(of(g))) {
                for name in ["text", "muted", "accent"] {
                    let found = contrast(pick(of(name)), ground);
                    assert!(found >= 4.5, "{name} on {ground:06x}: {found:.1}");
                }
                for (i, (pair, _)) in SERIES.iter().enumerate() {
                    let found = contrast(pick(*pair), ground);
                    assert!(found >= 3.0, "series {i} on {ground:06x}: {found:.1}");
                }
            }
        }
    }

    #[test]
    fn series_differ_without_colours_too() {
        let mut dashes: Vec<_> = SERIES.iter().map(|(_, dash)| dash).collect();
        dashes.sort_unstable();
        dashes.dedup();
        assert_eq!(dashes.len(), SERIES.len());
    }

    #[test]
    fn every_series_looks_different() {
        let mut all: Vec<_> =
            (0..SERIES.len() * SERIES.len()).map(series).map(|c| (c.1, c.2)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), SERIES.len() * SERIES.len());
        assert_eq!(classes("stroke=\"#010100\"".to_owned()), "class=\"s0 d1\"");
    }

    #[test]
    fn stand_ins_become_classes() {
        let svg =
            "<a fill=\"#010003\" stroke=\"none\"/><b stroke=\"#020002\"/>fill=&quot;#010303&quot;";
        let expected = "<a class=\"f3\" stroke=\"none\"/><b class=\"gs\"/>fill=&quot;#010303&quot;";
        assert_eq!(classes(svg.to_owned()), expected);
    }
}
