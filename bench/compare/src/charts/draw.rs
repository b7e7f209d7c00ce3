//! How charts look, by `plotters`, which places and labels axes and writes SVG.

use plotters::coord::{CoordTranslate, Shift};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::rows::POLLDISK;
use super::scale::{Axis, Scale};
use super::theme::{self, GRID, MUTED, TEXT};

/// Coordinates are whole numbers: this many of them make one unit, so that curves are smooth.
const U: i32 = 4;
/// Units of width. A chart is as wide on a phone, so that its text can be read there.
const WIDTH: i32 = 440;
/// Units for the names of bars.
const NAMES: i32 = 158;
/// Letters of a name, and smaller ones below it, that fit there.
const LETTERS: [usize; 2] = [22, 26];
/// Units of a bar with the space around it.
const BAR: i32 = 33;
/// Units of a letter's height.
const LETTER: i32 = 12;
/// Units for title and subtitle.
const HEAD: i32 = 44;
/// Units for the labels of an axis.
const AXIS: i32 = 24;
/// Ticks of an axis, at most.
const TICKS: usize = 6;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Result<T> = std::result::Result<T, String>;
/// From values to coordinates.
type Place = Box<dyn Fn(f64, f64) -> (i32, i32)>;

/// A bar.
pub(super) struct Bar {
    pub(super) name: String,
    /// What sets it apart from others of that name.
    pub(super) how: String,
    /// Which colour.
    pub(super) series: usize,
    pub(super) value: f64,
    /// A longer value, behind the bar and paler.
    pub(super) longer: Option<f64>,
}

/// A value with its interval.
pub(super) struct Dot {
    pub(super) name: String,
    /// What sets it apart from others of that name.
    pub(super) how: String,
    pub(super) series: usize,
    pub(super) value: f64,
    pub(super) interval: Option<[f64; 2]>,
}

/// A line.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) series: usize,
    pub(super) points: Vec<(f64, f64)>,
}

/// A figure for people: three digits.
pub(crate) fn figure(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        v if v >= 999_500_000.0 => (value / 1e9, "G"),
        v if v >= 999_500.0 => (value / 1e6, "M"),
        v if v >= 9_995.0 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        v if v >= 99.95 || v == 0.0 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        v if v >= 0.09995 => 3,
        _ => 4,
    };
    let mut text = format!("{scaled:.digits$}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    text + unit
}

fn font(units: i32) -> TextStyle<'static> {
    // What plotters writes is smaller than what it is asked for by this.
    TextStyle::from(("sans-serif", f64::from(units * U) * 1.24)).color(&TEXT)
}

fn bold(units: i32) -> TextStyle<'static> {
    let style = font(units);
    TextStyle { font: style.font.style(FontStyle::Bold), ..style }
}

fn muted(units: i32) -> TextStyle<'static> {
    font(units).color(&MUTED)
}

fn shown<E: std::fmt::Display>(e: E) -> String {
    format!("cannot draw: {e}")
}

/// A name that fits.
fn short(name: &str, letters: usize) -> String {
    if name.chars().count() <= letters {
        return name.to_owned();
    }
    name.chars().take(letters - 1).chain(['…']).collect()
}

/// A canvas with a head; what is drawn is in coordinates, not units.
fn canvas(
    height: i32,
    title: &str,
    subtitle: &str,
    draw: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let size = ((WIDTH * U) as u32, (height * U) as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        text(&area, title, bold(14), (4, 12), HPos::Left)?;
        text(&area, &short(subtitle, 56), muted(LETTER), (4, 30), HPos::Left)?;
        draw(&area)?;
        area.present().map_err(shown)?;
    }
    Ok(theme::classes(svg))
}

/// Writes a text; the place is in units.
fn text(
    area: &Area<'_>,
    what: &str,
    style: TextStyle<'_>,
    at: (i32, i32),
    pos: HPos,
) -> Result<()> {
    let style = style.pos(Pos::new(pos, VPos::Center));
    area.draw_text(what, &style, (at.0 * U, at.1 * U)).map_err(shown)
}

/// Draws two axes; `y` only places where it has no labels. The margin is in units: top, bottom, left,
/// right.
fn axes(area: &Area<'_>, x: Axis, y: Axis, labelled: bool, margin: [i32; 4]) -> Result<Place> {
    let [top, bottom, left, right] = margin.map(|m| m * U);
    let inner = area.margin(top, bottom, left, right);
    let mut chart = ChartBuilder::on(&inner)
        .x_label_area_size(AXIS * U)
        .y_label_area_size(if labelled { 66 * U } else { 0 })
        .build_cartesian_2d(x, y)
        .map_err(shown)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_labels(TICKS)
        .y_labels(TICKS)
        .label_style(muted(LETTER))
        .axis_style(GRID.stroke_width(U as u32))
        .bold_line_style(GRID.stroke_width(U as u32))
        .light_line_style(TRANSPARENT)
        .set_all_tick_mark_size(4 * U);
    if !labelled {
        mesh.disable_y_mesh().disable_y_axis();
    }
    mesh.draw().map_err(shown)?;
    let coordinates = chart.as_coord_spec().clone();
    Ok(Box::new(move |x, y| coordinates.translate(&(x, y))))
}

/// An axis of rows, without labels: each takes one, the first is the last to be reached.
fn row_axis(rows: usize) -> Axis {
    Axis::of(Scale::Linear, std::iter::once(rows as f64))
}

/// Writes the names of rows on the left; returns the middles of rows.
fn named<'n>(
    area: &Area<'_>,
    names: impl ExactSizeIterator<Item = (&'n str, &'n str)>,
    place: &Place,
) -> Result<Vec<i32>> {
    let rows = names.len();
    let mut middles = Vec::with_capacity(rows);
    for (i, (name, how)) in names.enumerate() {
        let y = place(0.0, (rows - i) as f64 - 0.5).1;
        let pos = Pos::new(HPos::Right, VPos::Center);
        let x = (NAMES - 7) * U;
        let style = if *name == *POLLDISK { bold(LETTER) } else { font(LETTER) };
        area.draw_text(&short(name, LETTERS[0]), &style.pos(pos), (x, y - 7 * U)).map_err(shown)?;
        area.draw_text(&short(how, LETTERS[1]), &muted(LETTER - 2).pos(pos), (x, y + 7 * U))
            .map_err(shown)?;
        middles.push(y);
    }
    Ok(middles)
}

/// Bars from zero, one below the other, each with its name and its figure.
pub(super) fn bars(title: &str, subtitle: &str, bars: &[Bar]) -> Result<String> {
    let most = bars.iter().map(|b| b.value.max(b.longer.unwrap_or(0.0))).fold(0.0, f64::max);
    // Room for the figure behind the longest.
    let most = most * 1.24;
    let rows = bars.len();
    let height = HEAD + rows as i32 * BAR + AXIS + 4;
    canvas(height, title, subtitle, |area| {
        let x = Axis::of(Scale::Linear, std::iter::once(most));
        let place = axes(area, x, row_axis(rows), false, [HEAD, 4, NAMES, 10])?;
        let names = bars.iter().map(|b| (b.name.as_str(), b.how.as_str()));
        let middles = named(area, names, &place)?;
        for (bar, y) in bars.iter().zip(middles) {
            let colour = theme::series(bar.series);
            let left = place(0.0, 0.0).0;
            let end = |v: f64| place(v, 0.0).0.max(left + U);
            let rectangle = |to: i32, style: ShapeStyle| {
                Rectangle::new([(left, y - 7 * U), (to, y + 7 * U)], style)
            };
            let mut right = end(bar.value);
            if let Some(longer) = bar.longer.filter(|l| *l > bar.value) {
                right = end(longer);
                area.draw(&rectangle(right, colour.mix(0.35).filled())).map_err(shown)?;
            }
            area.draw(&rectangle(end(bar.value), colour.filled())).map_err(shown)?;
            let label = match bar.longer.filter(|l| *l > bar.value) {
                Some(longer) => format!("{} ({})", figure(bar.value), figure(longer)),
                None => figure(bar.value),
            };
            // Where there is no room beside a bar, its figure stands before the end of the chart.
            let wide = label.chars().count() as i32 * 7 * U;
            let x = (right + 5 * U).min(WIDTH * U - wide);
            let style = font(LETTER).pos(Pos::new(HPos::Left, VPos::Center));
            area.draw_text(&label, &style, (x, y)).map_err(shown)?;
        }
        Ok(())
    })
}

/// Ratios with intervals, on a logarithmic axis with a line at one.
pub(super) fn ratios(title: &str, subtitle: &str, dots: &[Dot]) -> Result<String> {
    let all = dots.iter().flat_map(|d| {
        let [low, high] = d.interval.unwrap_or([d.value; 2]);
        [d.value, low, high]
    });
    let x = Axis::of(Scale::Times, all);
    let rows = dots.len();
    canvas(HEAD + rows as i32 * BAR + AXIS + 4, title, subtitle, |area| {
        let place = axes(area, x, row_axis(rows), false, [HEAD, 4, NAMES, 14])?;
        let names = dots.iter().map(|d| (d.name.as_str(), d.how.as_str()));
        let middles = named(area, names, &place)?;
        let (top, bottom) = (place(1.0, rows as f64), place(1.0, 0.0));
        area.draw(&PathElement::new([top, bottom], MUTED.stroke_width(2 * U as u32)))
            .map_err(shown)?;
        for (dot, y) in dots.iter().zip(middles) {
            let colour = theme::series(dot.series);
            let x = |v: f64| place(v, 0.0).0;
            let mut right = x(dot.value) + 5 * U;
            let mut label = format!("{}×", figure(dot.value));
            if let Some([low, high]) = dot.interval {
                // Filled, since strokes have dash patterns.
                let bar = |x0: i32, x1: i32, half: i32| {
                    Rectangle::new([(x0, y - half), (x1, y + half)], colour.filled())
                };
                area.draw(&bar(x(low), x(high), U)).map_err(shown)?;
                for end in [x(low), x(high)] {
                    area.draw(&bar(end - U, end + U, 5 * U)).map_err(shown)?;
                }
                right = right.max(x(high));
                label.push_str(&format!(" ({} to {})", figure(low), figure(high)));
            }
            area.draw(&Circle::new((x(dot.value), y), 5 * U, colour.filled())).map_err(shown)?;
            let wide = label.chars().count() as i32 * 6 * U;
            let style = font(11).pos(Pos::new(HPos::Left, VPos::Center));
            let free = WIDTH * U - wide;
            let (x, y) =
                if right + 6 * U <= free { (right + 6 * U, y) } else { (free, y - 10 * U) };
            area.draw_text(&label, &style, (x, y)).map_err(shown)?;
        }
        Ok(())
    })
}

/// Lines, with a key above them.
pub(super) fn lines(
    title: &str,
    subtitle: &str,
    (x, y): (Scale, Scale),
    lines: &[Line],
    marks: bool,
) -> Result<String> {
    let key = lines.len() as i32 * 18;
    let x = Axis::of(x, lines.iter().flat_map(|l| l.points.iter().map(|p| p.0)));
    let y = Axis::of(y, lines.iter().flat_map(|l| l.points.iter().map(|p| p.1)));
    canvas(HEAD + key + 236, title, subtitle, |area| {
        let margin = [HEAD + key + 6, 4, 2, 18];
        let place = axes(area, x, y, true, margin)?;
        for (i, line) in lines.iter().enumerate() {
            let colour = theme::series(line.series);
            let at: Vec<(i32, i32)> = line.points.iter().map(|(x, y)| place(*x, *y)).collect();
            let style = colour.stroke_width(5 * U as u32 / 2);
            let left = 4 * U;
            let middle = (HEAD + 4 + i as i32 * 18) * U;
            let sample = [(left, middle), (left + 34 * U, middle)];
            area.draw(&PathElement::new(sample, style)).map_err(shown)?;
            let name = font(LETTER - 1).pos(Pos::new(HPos::Left, VPos::Center));
            let at_name = (left + 40 * U, middle);
            area.draw_text(&short(&line.name, 54), &name, at_name).map_err(shown)?;
            if marks {
                mark(area, line.series, (left + 17 * U, middle))?;
            }
            for point in at.iter().filter(|_| marks) {
                mark(area, line.series, *point)?;
            }
            area.draw(&PathElement::new(at, style)).map_err(shown)?;
        }
        Ok(())
    })
}

/// A mark of a series' own form.
fn mark(area: &Area<'_>, series: usize, (x, y): (i32, i32)) -> Result<()> {
    let style = theme::series(series).filled();
    let r = 4 * U;
    match series % 4 {
        0 => area.draw(&Circle::new((x, y), r, style)),
        1 => area.draw(&Polygon::new([(x, y - r), (x + r, y + r), (x - r, y + r)], style)),
        2 => area.draw(&Rectangle::new([(x - r, y - r), (x + r, y + r)], style)),
        _ => area.draw(&Polygon::new([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], style)),
    }
    .map_err(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        for (value, text) in [
            (0.0, "0"),
            (0.01234, "0.0123"),
            (0.5, "0.5"),
            (1.0, "1"),
            (4.126, "4.13"),
            (58.04, "58"),
            (99.96, "100"),
            (1234.0, "1234"),
            (12_345.0, "12.3k"),
            (999_600.0, "1M"),
            (1.5e9, "1.5G"),
        ] {
            assert_eq!(figure(value), text, "{value}");
        }
    }

    #[test]
    fn long_names_are_cut_at_letters() {
        assert_eq!(short("äöüß", 4), "äöüß");
        assert_eq!(short("äöüßx", 4), "äöü…");
    }
}
