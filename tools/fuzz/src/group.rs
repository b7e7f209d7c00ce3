//! A device with a volume group of LVM2: label, header of the metadata area, text.

use block::Storage;
use volume::text::{parse, print};
use volume::{Author, Group, Id, Shape, probe};

use crate::memory::Memory;

const SECTOR: usize = 512;
/// Where the label and the header are put.
const LABEL: usize = SECTOR;
const HEADER: usize = 4096;
const DEVICE: usize = 2 << 20;
/// So many pieces of a volume are looked at.
const EXTENTS: usize = 64;
/// Longest text that gets a right checksum.
const TEXT: usize = 1 << 20;

/// The checksum of LVM2.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |crc, &byte| {
        let step = |c: u32, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 };
        (0..8).fold(crc ^ u32::from(byte), step)
    })
}

fn put(device: &mut [u8], at: usize, number: u32) {
    device[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn word(device: &[u8], at: usize) -> usize {
    let bytes = device[at..].first_chunk().expect("inside the device");
    usize::try_from(u64::from_le_bytes(*bytes)).unwrap_or(usize::MAX)
}

/// The input on a device: the label's sector, the header's, and all else behind that. Checksums are
/// made right, so that what they stand before is looked at.
fn device(data: &[u8]) -> Vec<u8> {
    let mut device = vec![0; DEVICE];
    let (label, rest) = data.split_at(data.len().min(SECTOR));
    let (header, rest) = rest.split_at(rest.len().min(SECTOR));
    let rest = &rest[..rest.len().min(DEVICE - HEADER - SECTOR)];
    for (at, part) in [(LABEL, label), (HEADER, header), (HEADER + SECTOR, rest)] {
        device[at..at + part.len()].copy_from_slice(part);
    }
    let sum = crc(&device[LABEL + 20..LABEL + SECTOR]);
    put(&mut device, LABEL + 16, sum);
    // Of the text: as far as it goes on to the area's end, and from the ring's begin on.
    let (area, offset, size) =
        (word(&device, HEADER + 32), word(&device, HEADER + 40), word(&device, HEADER + 48));
    if size <= TEXT && offset < area.min(DEVICE - HEADER) {
        let first = size.min(area - offset).min(DEVICE - HEADER - offset);
        let begin = HEADER + offset;
        let mut text = device[begin..begin + first].to_vec();
        text.extend_from_slice(&device[HEADER + SECTOR..][..(size - first).min(TEXT)]);
        let sum = crc(&text);
        put(&mut device, HEADER + 56, sum);
    }
    let sum = crc(&device[HEADER + 4..HEADER + SECTOR]);
    put(&mut device, HEADER, sum);
    device
}

/// Reads text; looks at the device, opens the group that is on it, changes it and opens it again.
pub fn group(data: &[u8]) {
    let text = data.get(2 * SECTOR..).unwrap_or(&[]);
    if let Ok(nodes) = parse(text) {
        assert_eq!(parse(print(&nodes).as_bytes()).ok(), Some(nodes));
    }
    let mut memory = Memory(device(data));
    let found = probe(&mut memory);
    let Ok(mut group) = Group::open(vec![memory], Some("me")) else { return };
    assert_eq!(found.ok().flatten().and_then(|found| found.group).as_ref(), Some(group.vg()));
    let names: Vec<String> = group.vg().lvs.iter().map(|lv| lv.name.clone()).collect();
    for name in names.iter().take(4) {
        let map = group.map(name).expect("it is there");
        let mut at = 0;
        for _ in 0..EXTENTS {
            let Some(extent) = map.find(at) else { break };
            assert!(extent.offset >= 4 * SECTOR as u64 && extent.len > 0);
            assert!(extent.offset + extent.len <= DEVICE as u64);
            at += extent.len;
        }
        let mut view = group.volume(name).expect("it is there");
        if view.len() > 0 {
            let middle = view.len() / 2;
            view.read_at(middle, &mut [0; 512]).expect("it is inside the device");
        }
    }
    let author = Author { host: "fuzz".to_owned(), time: 1 };
    let changed = group.change(&author, "a change", |vg| {
        if let Some(name) = names.first() {
            let _ = vg.grow_lv(name, 1);
            let _ = vg.tag_lv(name, "tag");
        }
        if let Some(name) = names.get(1) {
            let _ = vg.remove_lv(name);
        }
        let _ = vg.create_lv(Id::from_noise([7; 32]), "new", 2, Shape::LINEAR, &author);
        Ok(())
    });
    if let Ok(freed) = changed {
        let vg = group.vg().clone();
        group.discard(&freed);
        let again = Group::open(group.into_devices(), Some("me")).expect("it opens again");
        assert_eq!(*again.vg(), vg);
    }
}
