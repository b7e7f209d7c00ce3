//! Flame graphs, by `inferno`: as a picture in the page, and as a file that can be searched and zoomed.
//!
//! In the page they are images, not elements: what is in an image runs no script and styles nothing
//! around it, whatever the names of functions are.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use inferno::flamegraph::{Options, TextTruncateDirection, from_lines};

use crate::results::{Comparison, Flame};

/// Stacks, and bytes of one, that are taken: more than any profile of seconds has.
const STACKS: usize = 100_000;
const BYTES: usize = 16 << 10;

/// Samples of one stack at most, so that sums stay sums.
const SAMPLES: u64 = 1 << 40;

/// A flame graph.
pub(super) struct Picture {
    pub(super) title: String,
    pub(super) alt: String,
    /// The picture as `data:` URL.
    pub(super) url: String,
    /// The name of its file, and what is in it.
    pub(super) file: String,
    pub(super) interactive: String,
    pub(super) samples: u64,
}

/// All that can be drawn of a comparison; profiles without a sample are left out.
pub(super) fn pictures(c: &Comparison, prefix: &str) -> Vec<Picture> {
    let flames = c.flames.iter().enumerate();
    flames.filter_map(|(n, f)| picture(f, format!("{prefix}-flame-{}.svg", n + 1))).collect()
}

fn picture(flame: &Flame, file: String) -> Option<Picture> {
    let mut samples = 0u64;
    let sound = |line: &String| {
        let (stack, count) = line.rsplit_once(' ')?;
        let count: u64 = count.parse().ok()?;
        let whole =
            !stack.trim().is_empty() && stack.len() <= BYTES && (1..=SAMPLES).contains(&count);
        // A line that ends in two numbers would be taken for a difference.
        let stack: String = stack
            .chars()
            .map(|c| if c.is_whitespace() || c.is_control() { '_' } else { c })
            .collect();
        whole.then(|| (format!("{stack} {count}"), count))
    };
    let lines: Vec<String> = flame
        .folded
        .iter()
        .take(STACKS)
        .filter_map(sound)
        .map(|(line, count)| {
            samples += count;
            line
        })
        .collect();
    if lines.is_empty() {
        return None;
    }
    let title = format!("{}: {}", flame.peer, flame.workload);
    let (still, interactive) = (draw(&lines, &title, true)?, draw(&lines, &title, false)?);
    let url = format!("data:image/svg+xml;base64,{}", STANDARD.encode(still));
    let alt = format!("Flame graph of {title}; widest: {}", widest(&lines, samples));
    Some(Picture { title, alt, url, file, interactive, samples })
}

fn draw(lines: &[String], title: &str, still: bool) -> Option<String> {
    let mut options = Options::default();
    options.title = title.to_owned();
    options.deterministic = true;
    options.bgcolors = "#f5f7fa".parse().ok();
    options.image_width = Some(1200);
    options.text_truncate_direction = TextTruncateDirection::Right;
    options.no_javascript = still;
    let mut svg = Vec::new();
    from_lines(&mut options, lines.iter().map(String::as_str), &mut svg).ok()?;
    String::from_utf8(svg).ok()
}

/// The functions that samples were taken in most often, with their shares.
fn widest(lines: &[String], samples: u64) -> String {
    let mut leaves: std::collections::BTreeMap<&str, u64> = std::collections::BTreeMap::new();
    for line in lines {
        let Some((stack, count)) = line.rsplit_once(' ') else { continue };
        let leaf = stack.rsplit(';').next().unwrap_or(stack);
        *leaves.entry(leaf).or_default() += count.parse::<u64>().unwrap_or(0);
    }
    let mut leaves: Vec<(&str, u64)> = leaves.into_iter().collect();
    leaves.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let share = |count: u64| count as f64 * 100.0 / samples.max(1) as f64;
    let named = leaves.iter().take(3).map(|(leaf, n)| format!("{leaf} {:.0} %", share(*n)));
    named.collect::<Vec<_>>().join(", ")
}
