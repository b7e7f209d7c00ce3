//! Files that lie: refused with a sentence, or read without harm.

use super::writer::{File, sum};
use super::*;

fn refused(files: &[(&str, Vec<u8>)], text: &str) {
    match open(files) {
        Ok(_) => panic!("not refused: {text}"),
        Err(e) => assert!(e.to_string().contains(text), "{text}: {e}"),
    }
}

/// Changes the header of a file and makes its checksum right.
fn header(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[512 + at..][..value.len()].copy_from_slice(value);
    sum(&mut bytes[512..1536], 36);
}

/// Changes both footers.
fn footer(bytes: &mut [u8], at: usize, value: &[u8]) {
    let end = bytes.len();
    for f in [0, end - 512] {
        bytes[f + at..][..value.len()].copy_from_slice(value);
        sum(&mut bytes[f..f + 512], 64);
    }
}

fn small() -> File {
    File::dynamic(6 * MIB).with([(0, 1), (5000, 2)])
}

fn change(how: impl FnOnce(&mut Vec<u8>)) -> [(&'static str, Vec<u8>); 1] {
    let mut bytes = small().bytes();
    how(&mut bytes);
    [("top", bytes)]
}

#[test]
fn footers_and_headers() {
    refused(&[("top", vec![0; 100])], "only 100 bytes");
    refused(&[("top", vec![0; 4096])], "no VHD image");
    refused(&change(|b| footer(b, 60, &9u32.to_be_bytes())), "disk type 9");
    refused(&change(|b| footer(b, 12, &0x2_0000u32.to_be_bytes())), "version 0x20000");
    refused(&change(|b| footer(b, 48, &u64::MAX.to_be_bytes())), "at most");
    refused(&change(|b| footer(b, 48, &(1u64 << 40).to_be_bytes())), "524288 blocks");
    refused(&change(|b| footer(b, 16, &u64::MAX.to_be_bytes())), "not in the file");
    refused(&change(|b| footer(b, 16, &0u64.to_be_bytes())), "not in the file");
    refused(&change(|b| footer(b, 0, b"v_poison")), "disabled by vhd-util");
    refused(&change(|b| b[700] = 1), "checksum");
    for block in [0u32, 3 << 20, 256, 1 << 31] {
        refused(&change(|b| header(b, 32, &block.to_be_bytes())), "power of two");
    }
    refused(&change(|b| header(b, 16, &(1u64 << 60).to_be_bytes())), "not in the file");
    refused(&change(|b| header(b, 16, &u64::MAX.to_be_bytes())), "not in the file");
    refused(&change(|b| header(b, 28, &1u32.to_be_bytes())), "has 1 entries");
}

#[test]
fn a_huge_table_takes_no_memory() {
    // A disk of 2040 GiB in blocks of 512 bytes would have a table of 16 GiB.
    let bytes = change(|b| {
        footer(b, 48, &(0xff00_0000u64 * 512).to_be_bytes());
        header(b, 32, &512u32.to_be_bytes());
        header(b, 28, &u32::MAX.to_be_bytes());
    });
    refused(&bytes, "at most 4194304");
}

#[test]
fn entries_of_the_table() {
    let entry = |index: usize, value: u32| {
        change(move |b| b[1536 + index * 4..][..4].copy_from_slice(&value.to_be_bytes()))
    };
    refused(&entry(1, 1), "lies over the header");
    refused(&entry(1, 3), "lies over the block allocation table");
    refused(&entry(1, 0), "lies over");
    refused(&entry(1, 0xffff_fffe), "behind the file's end");
    let first = u32::from_be_bytes(small().bytes()[1536..1540].try_into().unwrap());
    refused(&entry(1, first), "lies over block");
    refused(&entry(1, first + 5), "lies over block");
}

#[test]
fn a_file_that_was_cut() {
    // Without its end the copy of the footer serves; data that is gone is an error, not zeroes.
    let bytes = small().bytes();
    let keep = bytes.len() - 512 - (1 << 20);
    let cut = bytes[..keep].to_vec();
    let mut reader = Reader::new(open(&[("top", cut.clone())]).unwrap());
    let mut sector = [0; 512];
    reader.read_at(5000 * 512, &mut sector).unwrap();
    assert_eq!(sector, [2; 512]);
    let mut wrong = Vec::new();
    let mut storage = Bytes::of(cut);
    vhd::check::run(&mut storage, "cut", &mut |w| wrong.push(w.to_owned())).unwrap();
    assert!(wrong[0].contains("copy at the front"), "{wrong:?}");

    let keep = bytes.len() - 512 - (2 << 20) + 512;
    let cut = bytes[..keep].to_vec();
    let mut reader = Reader::new(open(&[("top", cut.clone())]).unwrap());
    let error = reader.read_at(5000 * 512, &mut sector).unwrap_err().to_string();
    assert!(error.contains("top: block 1") && error.contains("cut short"), "{error}");
    let report = vhd::check::run(&mut Bytes::of(cut), "cut", &mut |_| {}).unwrap();
    assert_eq!(report.corruptions, 2);
}

#[test]
fn the_guest_of_a_fixed_disk_cannot_make_it_something_else() {
    let mut disk = File::child(MIB, b"identity-number1", &[0; 16], "/etc/passwd").bytes();
    disk.resize(4 << 20, 0);
    let mut footer = File { size: 4 << 20, kind: 2, ..File::dynamic(0) }.footer();
    footer[16..24].fill(0xff);
    sum(&mut footer, 64);
    disk.extend(footer);
    let chain = open(&[("top", disk.clone())]).unwrap();
    assert_eq!(chain.layers.len(), 1);
    assert_eq!(read_all(chain), disk[..4 << 20]);
    // Cut short: the size no longer fits, and nothing else is believed.
    let cut = [&disk[..1 << 20], &disk[4 << 20..]].concat();
    refused(&[("top", cut)], "cut short");
}

#[test]
fn parents() {
    let (a, b) = (*b"identity-number0", *b"identity-number1");
    let base = File { uuid: a, ..File::dynamic(MIB) };
    let top = File::child(MIB, &b, &a, "base");
    assert!(open(&[("top", top.bytes()), ("base", base.bytes())]).is_ok());
    let other = File { uuid: *b"identity-number7", ..base.clone() };
    refused(
        &[("top", top.bytes()), ("base", other.bytes())],
        "is the disk 6964656e-7469-7479-2d6e",
    );
    refused(&[("top", top.bytes()), ("other", base.bytes())], "no parent");
    let own = File::child(MIB, &b, &b, "top");
    refused(&[("top", own.bytes())], "cycle");
    let (x, y) = (File::child(MIB, &a, &b, "y"), File::child(MIB, &b, &a, "top"));
    refused(&[("top", x.bytes()), ("y", y.bytes())], "cycle");
    let mut nameless = top.clone();
    nameless.locators =
        vec![(*b"W2ku", "C:\\base".encode_utf16().flat_map(u16::to_le_bytes).collect())];
    nameless.parent_name = String::new();
    refused(&[("top", nameless.bytes())], "no name of a parent");
    let mut far = top.bytes();
    header(&mut far, 576 + 16, &(1u64 << 50).to_be_bytes());
    refused(&[("top", far)], "a parent's name of");
    let mut long = top.bytes();
    header(&mut long, 576 + 8, &u32::MAX.to_be_bytes());
    refused(&[("top", long)], "a parent's name of 4294967295");
}

#[test]
fn a_chain_that_does_not_end() {
    let ids: Vec<[u8; 16]> = (0..=vhd::MAX_DEPTH as u128 + 2).map(u128::to_be_bytes).collect();
    let mut files = vec![];
    for i in 0..vhd::MAX_DEPTH + 1 {
        let file = File::child(4096, &ids[i + 1], &ids[i + 2], &format!("f{}", i + 1));
        files.push((if i == 0 { "top".to_owned() } else { format!("f{i}") }, file.bytes()));
    }
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    refused(&files, "more than 200 layers");
}

#[test]
fn checks_find_what_is_wrong() {
    let look = |how: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes =
            File::dynamic(6 * MIB).with((0..4096).map(|s| (s, 1))).with([(5000, 2)]).bytes();
        how(&mut bytes);
        let mut found = Vec::new();
        vhd::check::run(&mut Bytes::of(bytes), "f", &mut |w| found.push(w.to_owned())).unwrap();
        found
    };
    assert_eq!(look(&|_| {}), Vec::<String>::new());
    assert!(look(&|b| b[100] = 1)[0].contains("copy of the footer"));
    // The map of full blocks: its checksum, a block that is not full, one that is not there.
    assert!(look(&|b| b[2048 + 512] |= 0x40)[0].contains("map of full blocks: has checksum"));
    let set = |b: &mut Vec<u8>, bits: u8| {
        b[2048 + 512] = bits;
        b[2048 + 24..2048 + 28].copy_from_slice(&(!u32::from(bits)).to_be_bytes());
    };
    assert!(look(&|b| set(b, 0xc0))[0].contains("block 1, whose bitmap is not full"));
    assert!(look(&|b| set(b, 0xa0))[0].contains("block 2, which is not allocated"));
    assert!(look(&|b| b[2048] = b'x')[0].contains("there is none"));
    // A block over the map, and one over the footer.
    assert!(
        look(&|b| b[1540..1544].copy_from_slice(&5u32.to_be_bytes()))[0].contains("map of full")
    );
    let last = |b: &mut Vec<u8>| {
        let at = (b.len() as u64 / 512 - 1) as u32;
        b[1540..1544].copy_from_slice(&at.to_be_bytes());
    };
    assert!(look(&last)[0].contains("lies over the footer"));
}

/// Each byte of the metadata, changed in several ways: nothing panics or takes much memory.
#[test]
fn any_byte_of_the_metadata_may_be_wrong() {
    let parent =
        File { block: 4096, uuid: *b"identity-number0", ..File::dynamic(32 << 10) }.with([(1, 1)]);
    let top = File {
        block: 4096,
        ..File::child(64 << 10, b"identity-number1", b"identity-number0", "base")
    }
    .with([(0, 1), (3, 2), (100, 3)]);
    let good = top.bytes();
    let base = parent.bytes();
    let end = good.len() - 512;
    for at in (0..5120).chain(end..good.len()) {
        for xor in [1u8, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= xor;
            if at < 512 || at >= end {
                sum(&mut bad[..512], 64);
                sum(&mut bad[end..], 64);
            } else if at < 1536 {
                sum(&mut bad[512..1536], 36);
            }
            let _ = vhd::check::run(&mut Bytes::of(bad.clone()), "bad", &mut |_| {});
            let Ok(chain) = open(&[("top", bad), ("base", base.clone())]) else { continue };
            let mut reader = Reader::new(chain);
            let mut disk = vec![0; 64 << 10];
            let _ = reader.read_at(0, &mut disk);
        }
    }
}
