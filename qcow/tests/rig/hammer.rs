//! Random requests at depth, compared with a plain array.

use std::collections::HashMap;

use block::{Flags, Op, Status};

use super::{Rig, Rng};

enum Expect {
    Write(Vec<u8>),
    Read,
    Zero,
    Discard,
    Flush,
}

/// Random requests that do not overlap while in flight, compared with `model`.
pub(crate) fn hammer(rig: &mut Rig, model: &mut [u8], rng: &mut Rng, count: u32) {
    let mut flying: HashMap<u64, (u64, u64, Expect)> = HashMap::new();
    let mut sent = 0;
    let mut idle = 0;
    while sent < count || !flying.is_empty() {
        if sent < count && flying.len() < 24 {
            let sectors = if rng.one_in(4) { 1 + rng.below(400) } else { 1 + rng.below(16) };
            let disk = model.len() as u64 / 512;
            let first = rng.below(disk);
            let n = sectors.min(disk - first);
            let (offset, len) = (first * 512, n * 512);
            let clash = flying.values().any(|f| offset < f.0 + f.1 && f.0 < offset + len);
            let choice = rng.below(20);
            if !clash {
                let (op, flags, expect) = match choice {
                    0..=9 => {
                        let byte = rng.next() as u8;
                        let data = (0..len).map(|i| byte ^ (i >> 9) as u8).collect();
                        let fua = if rng.one_in(8) { Flags::FUA } else { Flags::NONE };
                        (Op::Write, fua, Expect::Write(data))
                    }
                    10..=14 => (Op::Read, Flags::NONE, Expect::Read),
                    15 | 16 => {
                        let keep = if rng.one_in(2) { Flags::NO_UNMAP } else { Flags::NONE };
                        (Op::WriteZeroes, keep, Expect::Zero)
                    }
                    17 | 18 => (Op::Discard, Flags::NONE, Expect::Discard),
                    _ => (Op::Flush, Flags::NONE, Expect::Flush),
                };
                let (offset, len) = if op == Op::Flush { (0, 0) } else { (offset, len) };
                let data: &[u8] = if let Expect::Write(d) = &expect { d } else { &[] };
                let id = rig.send(op, flags, offset, len, data);
                flying.insert(id, (offset, len, expect));
                sent += 1;
            }
        }
        let done = rig.turn();
        idle = if done.is_empty() { idle + 1 } else { 0 };
        assert!(idle < 1_000_000, "{} requests are never answered", flying.len());
        for (id, status, data) in done {
            let (offset, len, expect) = flying.remove(&id).unwrap();
            assert_eq!(status, Status::Ok);
            let range = offset as usize..(offset + len) as usize;
            match expect {
                Expect::Write(d) => model[range].copy_from_slice(&d),
                Expect::Zero => model[range].fill(0),
                Expect::Read => {
                    let got = &data.unwrap()[..len as usize];
                    same(got, &model[range], offset);
                }
                Expect::Discard => {
                    let got = rig_read_idle(rig, &mut flying, model, offset, len);
                    for (i, &b) in got.iter().enumerate() {
                        let at = offset as usize + i;
                        assert!(b == 0 || b == model[at], "discard made {b:#x} at {at:#x}");
                        model[at] = b;
                    }
                }
                Expect::Flush => {}
            }
        }
    }
}

/// Reads a range while others are in flight, and puts their answers into the model.
fn rig_read_idle(
    rig: &mut Rig,
    flying: &mut HashMap<u64, (u64, u64, Expect)>,
    model: &mut [u8],
    offset: u64,
    len: u64,
) -> Vec<u8> {
    let mine = rig.send(Op::Read, Flags::NONE, offset, len, &[]);
    let mut found = None;
    let mut later = Vec::new();
    while found.is_none() {
        for (id, status, data) in rig.turn() {
            assert_eq!(status, Status::Ok);
            if id == mine {
                found = data.clone();
            } else {
                later.push((id, data));
            }
        }
    }
    for (id, data) in later {
        let (offset, len, expect) = flying.remove(&id).unwrap();
        let range = offset as usize..(offset + len) as usize;
        match expect {
            Expect::Write(d) => model[range].copy_from_slice(&d),
            Expect::Zero => model[range].fill(0),
            Expect::Read => same(&data.unwrap()[..len as usize], &model[range], offset),
            Expect::Discard => {
                let got = rig_read_idle(rig, flying, model, offset, len);
                model[range].copy_from_slice(&got);
            }
            Expect::Flush => {}
        }
    }
    let mut data = found.unwrap();
    data.truncate(len as usize);
    data
}

pub(crate) fn same(got: &[u8], want: &[u8], offset: u64) {
    if let Some(i) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("byte {:#x} reads {:#x} instead of {:#x}", offset as usize + i, got[i], want[i]);
    }
}

pub(crate) fn read_all(rig: &mut Rig, size: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < size {
        let n = (size - all.len()).min(256 << 10) as u64;
        all.extend(rig.read(all.len() as u64, n));
    }
    all
}
