//! An image by itself, its leaf queues turned by hand: what it does where memory for bitmaps is short.

use block::{Blocking, MemQueue, Storage, StorageError};
use dma::Held;

use super::*;
use crate::{ChainOptions, Opened};

#[path = "../../tests/chains/writer.rs"]
mod writer;

use writer::File;

const MIB: u64 = 1 << 20;
/// Blocks of the disk, of 2 MiB.
const BLOCKS: u64 = 4;
/// Files of the chain.
const DEPTH: u8 = 9;

struct Rig {
    image: Image,
    leaves: Vec<MemQueue>,
    data: Arc<Region>,
    /// Completions of the leaves until now.
    reads: u64,
}

fn stored(bytes: &[u8]) -> Result<Blocking<MemQueue>, StorageError> {
    let queue = MemQueue::new((bytes.len() as u64).next_multiple_of(512), 512).unwrap();
    let mut storage = Blocking::new(queue, 0).unwrap();
    storage.write_at(0, bytes)?;
    Ok(storage)
}

impl Rig {
    /// A chain in which each layer has a sector of its own in each block, so that no bitmap is full,
    /// and the lowest one what all are asked for.
    fn new(limit: usize) -> Rig {
        let id = |depth: u8| [depth + 1; 16];
        let file = |depth: u8| {
            let own = (0..BLOCKS).map(|b| (b * 4096 + 100 + u64::from(depth), depth + 1));
            match depth + 1 < DEPTH {
                true => File::child(BLOCKS * 2 * MIB, &id(depth), &id(depth + 1), "x").with(own),
                false => File { uuid: id(depth), ..File::dynamic(BLOCKS * 2 * MIB) }
                    .with(own)
                    .with((0..BLOCKS).map(|b| (b * 4096, 77))),
            }
        };
        let opened = |depth: u8| Opened {
            storage: stored(&file(depth).bytes()).unwrap(),
            path: None,
            name: format!("{depth}"),
            id: None,
        };
        let mut parent = |p: &crate::ParentRef| Ok(opened(p.depth as u8));
        let chain = Chain::open(opened(0), ChainOptions::default(), &mut parent).unwrap();
        let ports: Vec<Port> = (0..u16::from(DEPTH)).map(|leaf| Port { leaf, unit: 0 }).collect();
        let mut stack = Stack::new(&chain, &ports);
        stack.map.limit = limit;
        let mut leaves: Vec<MemQueue> =
            chain.layers.into_iter().map(|l| l.storage.into_leaf()).collect();
        let mut image = Image::attach(stack, 3, &mut leaves).unwrap();
        let data = Region::new(1 << 16, PageSize::Small).unwrap();
        for leaf in &mut leaves {
            leaf.register(&data).unwrap();
        }
        Layer::<MemQueue>::register(&mut image, &data);
        Rig { image, leaves, data, reads: 0 }
    }

    /// Asks for the first sector of each block at once.
    fn ask(&mut self) {
        for block in 0..BLOCKS {
            let mut segs = SegList::EMPTY;
            assert!(segs.push(self.data.seg(block * 512, 512).unwrap()));
            let request = Request {
                tag: Tag::new(9, block as u16, 0),
                op: Op::Read,
                flags: Flags::NONE,
                unit: 0,
                offset: block * 2 * MIB,
                len: 512,
                segs: segs.as_slice(),
            };
            self.image.submit(&mut self.leaves, &request).unwrap();
        }
    }

    /// A turn: each leaf's completions, then the image's own.
    fn turn(&mut self) -> Vec<(u16, Status)> {
        let mut done = Completions::new();
        for leaf in &mut self.leaves {
            leaf.poll(&mut done);
        }
        let mut answers = Vec::new();
        for i in 0..done.len() {
            self.reads += 1;
            let mut done = done.get(i);
            if self.image.complete(&mut self.leaves, &mut done) {
                answers.push(done);
            }
        }
        let mut done = Completions::new();
        self.image.poll(&mut self.leaves, &mut done);
        answers.extend((0..done.len()).map(|i| done.get(i)));
        answers.into_iter().map(|c| (c.tag.slot(), c.status)).collect()
    }
}

#[test]
fn requests_in_lockstep_end_though_bitmaps_of_all_layers_do_not_fit() {
    // Room for one bitmap of the four times nine that are asked for.
    let mut rig = Rig::new(64 + 512);
    rig.ask();
    let mut answers = Vec::new();
    for _ in 0..1000 {
        answers.extend(rig.turn());
        if answers.len() as u64 == BLOCKS {
            break;
        }
    }
    answers.sort_unstable_by_key(|a| a.0);
    assert_eq!(answers, [0, 1, 2, 3].map(|slot| (slot, Status::Ok)));
    for block in 0..BLOCKS as usize {
        let mut sector = [0; 512];
        rig.data.read(block * 512, &mut sector);
        assert_eq!(sector, [77; 512], "block {block}");
    }
    // A bitmap from each layer, then the data: none is fetched twice for one request.
    assert_eq!(rig.reads, BLOCKS * (u64::from(DEPTH) + 1));
}

#[test]
fn a_close_ends_what_is_still_on_its_way_down() {
    let mut rig = Rig::new(1 << 20);
    rig.ask();
    assert!(rig.turn().is_empty());
    Layer::<MemQueue>::close(&mut rig.image);
    assert_eq!(Layer::<MemQueue>::closed(&rig.image), None, "bitmaps are in flight");
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.extend(rig.turn());
    }
    assert_eq!(answers.len() as u64, BLOCKS);
    assert!(answers.iter().all(|a| a.1 == Status::Gone), "{answers:?}");
    assert_eq!(Layer::<MemQueue>::closed(&rig.image), Some(Status::Ok));
}

#[test]
fn a_region_stays_while_a_request_in_work_names_it() {
    let mut rig = Rig::new(1 << 20);
    let held = Held::new(&rig.data);
    // The image's, each leaf's and this.
    let all = usize::from(DEPTH) + 2;
    rig.ask();
    let next = || Region::new(4096, PageSize::Small).unwrap();
    rig.data = next();
    Layer::<MemQueue>::register(&mut rig.image, &rig.data);
    assert_eq!(held.tables(), all);
    let mut answers = Vec::new();
    for _ in 0..1000 {
        answers.extend(rig.turn());
    }
    assert_eq!(answers.len() as u64, BLOCKS);
    assert!(answers.iter().all(|a| a.1 == Status::Ok));
    let mut sector = [0; 512];
    held.read(0, &mut sector);
    assert_eq!(sector, [77; 512]);
    rig.data = next();
    Layer::<MemQueue>::register(&mut rig.image, &rig.data);
    assert_eq!(held.tables(), all - 1);
}
