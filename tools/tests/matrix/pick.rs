//! Which images are tried: pairs of properties are covered, not all combinations.

use std::collections::BTreeSet;
use std::fmt;

/// A small generator of numbers; the same for the same seed.
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Where an image's data is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Data {
    Inside,
    File,
    RawFile,
}

/// Who makes an image, or writes to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Who {
    Qemu,
    Polldisk,
}

/// On what polldisk serves the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Node {
    File,
    TwoReactors,
    /// A drive model with blocks of 4096 bytes.
    Model,
}

/// How compressed clusters of an image are made; [`None`](Option::None): it has none.
pub(crate) type Compression = Option<&'static str>;

const CLUSTERS: [u64; 4] = [512, 4096, 65536, 2 << 20];
const VERSIONS: [u32; 2] = [2, 3];
const WIDTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
const DATA: [Data; 3] = [Data::Inside, Data::File, Data::RawFile];
const COMPRESSIONS: [Compression; 3] = [None, Some("zlib"), Some("zstd")];
const DEPTHS: [usize; 4] = [0, 1, 5, 20];
const MAKERS: [Who; 2] = [Who::Qemu, Who::Polldisk];
const NODES: [Node; 3] = [Node::File, Node::TwoReactors, Node::Model];

/// How many values each property has.
const COUNTS: [usize; 9] = [4, 2, 7, 2, 3, 3, 4, 2, 3];

/// One image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    pub(crate) cluster: u64,
    pub(crate) version: u32,
    pub(crate) width: u32,
    pub(crate) extended: bool,
    pub(crate) data: Data,
    pub(crate) compression: Compression,
    /// How many backing files there are below it.
    pub(crate) depth: usize,
    pub(crate) maker: Who,
    pub(crate) node: Node,
}

type Choice = [usize; COUNTS.len()];

impl Shape {
    fn of(c: &Choice) -> Shape {
        Shape {
            cluster: CLUSTERS[c[0]],
            version: VERSIONS[c[1]],
            width: WIDTHS[c[2]],
            extended: c[3] == 1,
            data: DATA[c[4]],
            compression: COMPRESSIONS[c[5]],
            depth: DEPTHS[c[6]],
            maker: MAKERS[c[7]],
            node: NODES[c[8]],
        }
    }

    /// Whether the format has such images, and QEMU makes them.
    fn exists(&self) -> bool {
        let old = self.width == 16
            && !self.extended
            && self.data == Data::Inside
            && self.compression != Some("zstd");
        (self.version == 3 || old)
            && (!self.extended || self.cluster >= 16 << 10)
            && (self.data == Data::Inside || self.compression.is_none())
            && (self.data != Data::RawFile || self.depth == 0)
    }

    /// Any shape at all, at this depth: for layers that are not the top.
    pub(crate) fn any(rng: &mut Rng, depth: usize) -> Shape {
        loop {
            let choice = COUNTS.map(|n| rng.below(n as u64) as usize);
            let shape = Shape { depth, ..Shape::of(&choice) };
            if shape.exists() {
                return shape;
            }
        }
    }

    /// As options of `create`, but for the name of a data file.
    pub(crate) fn options(&self, lazy: bool) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut text =
            format!("cluster_size={},compat={compat},refcount_bits={}", self.cluster, self.width);
        if self.extended {
            text += ",extended_l2=on";
        }
        if let Some(kind) = self.compression.filter(|_| self.version == 3) {
            text += &format!(",compression_type={kind}");
        }
        if self.data == Data::RawFile {
            text += ",data_file_raw=on";
        }
        if lazy && self.version == 3 {
            text += ",lazy_refcounts=on";
        }
        text
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            to,
            "{} v{} refcount {} {}data {:?} compression {} depth {} by {:?} on {:?}",
            self.cluster,
            self.version,
            self.width,
            if self.extended { "extended " } else { "" },
            self.data,
            self.compression.unwrap_or("none"),
            self.depth,
            self.maker,
            self.node
        )
    }
}

/// Two properties with a value each.
type Pair = (usize, usize, usize, usize);

fn pairs(c: &Choice) -> impl Iterator<Item = Pair> + '_ {
    (0..c.len()).flat_map(move |i| (i + 1..c.len()).map(move |j| (i, c[i], j, c[j])))
}

/// All combinations that exist.
fn all() -> Vec<Choice> {
    let total: usize = COUNTS.iter().product();
    let nth = |mut n: usize| {
        COUNTS.map(|count| {
            let value = n % count;
            n /= count;
            value
        })
    };
    (0..total).map(nth).filter(|c| Shape::of(c).exists()).collect()
}

/// Up to `count` shapes, of which each covers as many pairs as it can that no one before it does;
/// and how many pairs are left over.
pub(crate) fn pick(seed: u64, count: usize) -> (Vec<Shape>, usize) {
    let mut rng = Rng(seed);
    let all = all();
    let mut open: BTreeSet<Pair> = all.iter().flat_map(pairs).collect();
    let mut shapes = Vec::new();
    while shapes.len() < count {
        let gain = |c: &Choice| pairs(c).filter(|p| open.contains(p)).count();
        // Of some that are drawn the best one: all of them would cost too much.
        let best = (0..200).map(|_| all[rng.below(all.len() as u64) as usize]).max_by_key(gain);
        let Some(best) = best else { break };
        for pair in pairs(&best) {
            open.remove(&pair);
        }
        shapes.push(Shape::of(&best));
    }
    (shapes, open.len())
}

/// Every combination of what an image can be in itself; the rest (compression, maker, node) covers
/// pairs.
pub(crate) fn whole(seed: u64) -> Vec<Shape> {
    let key = |c: &Choice| [c[0], c[1], c[2], c[3], c[4], c[6]];
    let mut rng = Rng(seed);
    let all = all();
    let keys: BTreeSet<_> = all.iter().map(key).collect();
    let mut open: BTreeSet<Pair> = all.iter().flat_map(pairs).collect();
    let mut shapes = Vec::new();
    for this in keys {
        let gain = |c: &&Choice| pairs(c).filter(|p| open.contains(p)).count();
        let of_it = all.iter().filter(|c| key(c) == this);
        let Some(best) = of_it.max_by_key(|c| (gain(c), rng.next())) else { continue };
        for pair in pairs(best) {
            open.remove(&pair);
        }
        shapes.push(Shape::of(best));
    }
    shapes
}

#[test]
fn the_whole_has_every_combination_and_every_pair() {
    let shapes = whole(3);
    // Clusters x widths x extended, each x data inside or not x depths, or raw at depth 0; version 2.
    assert_eq!(shapes.len(), (4 + 2) * 7 * (2 * 4 + 1) + 4 * 4);
    let all = all();
    let taken = all.iter().filter(|c| shapes.contains(&Shape::of(c)));
    let had: BTreeSet<Pair> = taken.flat_map(pairs).collect();
    assert!(all.iter().flat_map(pairs).all(|p| had.contains(&p)));
}

#[test]
fn fifty_cover_nearly_all_pairs() {
    for seed in 0..5 {
        let (shapes, left) = pick(seed, 50);
        assert!(shapes.len() == 50 && left <= 3, "{left} pairs are left");
        assert!(shapes.iter().all(Shape::exists));
    }
    assert_eq!(pick(7, 50).0, pick(7, 50).0);
}
