//! A chain on a reactor that is turned by hand, against what the writer says.

use block::{Blocking, Flags, MemQueue, Op, Port, Status};
use dma::Pool;
use reactor::{Clock, Core, Portal, PortalFrontend, PortalRequest};
use vhd::run::{Image as Served, Stack};

use super::*;

type TestCore = Core<MemQueue, Served, PortalFrontend>;

struct Rig {
    core: TestCore,
    portal: Portal,
    pool: Pool,
}

impl Rig {
    fn new(files: &[(&str, Vec<u8>)]) -> Rig {
        let chain = open(files).unwrap();
        let ports: Vec<Port> =
            (0..chain.layers.len() as u16).map(|leaf| Port { leaf, unit: 0 }).collect();
        let stack = Stack::new(&chain, &ports);
        let mut core = TestCore::new(Clock::virtual_clock().0).unwrap();
        for layer in chain.layers {
            let bytes = layer.storage.0.to_vec();
            let len = (bytes.len() as u64).next_multiple_of(512);
            let mut storage = Blocking::new(MemQueue::new(len, 512).unwrap(), 0).unwrap();
            storage.write_at(0, &bytes).unwrap();
            core.add_leaf(storage.into_leaf()).unwrap();
        }
        core.add_image(|owner, leaves| Served::attach(stack, owner, leaves)).unwrap();
        let pool = Pool::new(64, 1 << 20).unwrap();
        let (portal, end) = Portal::new(64, vec![pool.region().clone()], core.wake()).unwrap();
        core.add_frontend(0, |owner, _| Ok(end(owner))).unwrap();
        Rig { core, portal, pool }
    }

    /// Sends requests at once; their answers, in this order.
    fn all(&mut self, requests: &[(Op, u64, u64)]) -> Vec<(Status, Vec<u8>)> {
        let mut bufs = Vec::new();
        for (id, &(op, offset, len)) in requests.iter().enumerate() {
            let buf = self.pool.take().unwrap();
            self.pool.region().write_seg(&buf.seg(), &vec![0xee; 1 << 20]);
            let data = matches!(op, Op::Read | Op::Write);
            let seg = if data { buf.head(len as u32) } else { None };
            let id = id as u64;
            self.portal
                .send(PortalRequest { id, op, flags: Flags::NONE, offset, len, seg })
                .unwrap();
            bufs.push(buf);
        }
        let mut answers = vec![None; requests.len()];
        for _ in 0..1_000_000 {
            self.core.turn();
            while let Some(reply) = self.portal.receive() {
                answers[reply.id as usize] = Some(reply.status);
            }
            if answers.iter().all(Option::is_some) {
                break;
            }
        }
        let mut list = Vec::new();
        for (buf, (answer, &(_, _, len))) in bufs.into_iter().zip(answers.iter().zip(requests)) {
            let mut data = vec![0; len as usize];
            if let Some(seg) = buf.head(len as u32) {
                self.pool.region().read_seg(&seg, &mut data);
            }
            self.pool.give(buf);
            list.push((answer.expect("an answer"), data));
        }
        list
    }
}

#[test]
fn reads_of_all_kinds() {
    let ids = [*b"identity-number0", *b"identity-number1"];
    let mut state = 7u64;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let scattered: Vec<(u64, u8)> =
        (0..3000).map(|_| (random(16384), random(255) as u8 + 1)).collect();
    let base = File { uuid: ids[0], ..File::dynamic(6 * MIB) }.with((0..4096).map(|s| (s, 1)));
    let top =
        File { block: 512 << 10, ..File::child(8 * MIB, &ids[1], &ids[0], "base") }.with(scattered);
    let disk = expected(&[&top, &base], &[]);
    let mut rig = Rig::new(&[("top", top.bytes()), ("base", base.bytes())]);
    for _ in 0..60 {
        let requests: Vec<(Op, u64, u64)> = (0..32)
            .map(|_| {
                let most = if random(4) == 0 { 2048 } else { 32 };
                let len = (random(most) + 1) * 512;
                (Op::Read, random((8 * MIB - len) / 512) * 512, len)
            })
            .collect();
        for ((status, data), (_, offset, len)) in rig.all(&requests).into_iter().zip(requests) {
            assert_eq!(status, Status::Ok);
            let (from, to) = (offset as usize, (offset + len) as usize);
            assert!(data == disk[from..to], "{len} bytes at {offset:#x}");
        }
    }
    let image = rig.core.image(0).unwrap();
    assert_eq!(image.stale(), 0);
    block::Layer::<MemQueue>::close(image);
    rig.core.turn();
    assert_eq!(rig.core.remove_closed_image(0).map(|(_, status)| status), Some(Status::Ok));
}

#[test]
fn what_is_not_served() {
    let file = File::dynamic(4 * MIB).with([(0, 1), (5000, 2)]);
    let bytes = file.bytes();
    // Block 1 is cut behind its bitmap.
    let cut = bytes[..bytes.len() - 512 - (2 << 20) + 512].to_vec();
    let mut rig = Rig::new(&[("top", cut)]);
    let answers = rig.all(&[
        (Op::Write, 0, 512),
        (Op::WriteZeroes, 0, 512),
        (Op::Discard, 0, 512),
        (Op::Flush, 0, 0),
        (Op::Read, 4 * MIB, 512),
        (Op::Read, 5000 * 512, 512),
        (Op::Read, 0, 512),
        (Op::Read, 5001 * 512, 512),
    ]);
    let status: Vec<Status> = answers.iter().map(|a| a.0).collect();
    use Status::{Corrupt, Invalid, Ok, ReadOnly};
    assert_eq!(status, [ReadOnly, ReadOnly, ReadOnly, Ok, Invalid, Corrupt, Ok, Ok]);
    assert_eq!((answers[6].1[0], answers[7].1[0]), (1, 0));
}
