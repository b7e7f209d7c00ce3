//! What is on a device: the marks by which other programs know what is theirs. A table, and looks at
//! the few whose place depends on the device's size.

use anyhow::Context;
use block::Storage;

/// Something that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// What it is a mark of.
    pub(super) what: String,
    /// Byte of the device where the mark is.
    pub(super) offset: u64,
}

/// So many bytes at the front hold all marks of the table.
const FRONT: usize = 68 << 10;

/// Marks at the front: where, which bytes, of what. The first one of a kind counts.
const MARKS: [(usize, &[u8], &str); 38] = [
    (512, b"EFI PART", GPT),
    (4096, b"EFI PART", GPT),
    (0, b"XFSB", "an XFS file system"),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"LUKS\xba\xbe", LUKS),
    (0x4000, b"SKUL\xba\xbe", LUKS),
    (0, b"\xfc\x4e\x2b\xa9", "an md RAID member (superblock 1.1)"),
    (4096, b"\xfc\x4e\x2b\xa9", "an md RAID member (superblock 1.2)"),
    // At the end of a page, of each size that processors have.
    (4086, b"SWAPSPACE2", SWAP),
    (8182, b"SWAPSPACE2", SWAP),
    (16374, b"SWAPSPACE2", SWAP),
    (32758, b"SWAPSPACE2", SWAP),
    (65526, b"SWAPSPACE2", SWAP),
    (4086, b"SWAP-SPACE", SWAP),
    (4086, b"S1SUSPEND\0", SUSPENDED),
    (4086, b"S2SUSPEND\0", SUSPENDED),
    (4086, b"LINHIB0001", SUSPENDED),
    (0, b"QFI\xfb", "a QCOW2 image"),
    (0, b"conectix", VHD),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"KDMV", "a VMDK image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"LABELONE", LVM),
    (512, b"LABELONE", LVM),
    (1024, b"LABELONE", LVM),
    (1536, b"LABELONE", LVM),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (54, b"FAT12   ", "a FAT file system"),
    (54, b"FAT16   ", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (0x1_0034, b"ReIsEr", "a ReiserFS file system"),
    (0, b"hsqs", "a SquashFS file system"),
    (0, b"bluestore block device", "a Ceph OSD"),
    (
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        "a bcache device",
    ),
    (
        4096 + 24,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
        "a bcachefs file system",
    ),
];

const GPT: &str = "a GPT partition table";
const GPT_COPY: &str = "the copy of a GPT partition table";
const LUKS: &str = "a LUKS encrypted device";
const SWAP: &str = "swap space";
const SUSPENDED: &str = "a suspended system";
const VHD: &str = "a VHD image";
/// A physical volume of LVM2; its group is looked for by others.
pub(super) const LVM: &str = "an LVM2 physical volume";

/// Looks for everything that is known.
///
/// # Errors
/// If the device cannot be read.
pub(super) fn detect(st: &mut dyn Storage) -> anyhow::Result<Vec<Found>> {
    let len = st.len();
    let front = read(st, 0, FRONT)?;
    let mut found: Vec<Found> = Vec::new();
    let mut add = |what: &str, offset: u64| {
        if found.iter().all(|f| f.what != what) {
            found.push(Found { what: what.to_owned(), offset });
        }
    };
    for (offset, bytes, what) in MARKS {
        if front[offset..].starts_with(bytes) {
            add(what, offset as u64);
        }
    }
    if let Some(what) = ext(&front) {
        add(what, 1080);
    }
    // The first copies of superblocks and tables may be overwritten; these suffice to bring all back.
    for sector in [512, 4096] {
        if let Some(at) = len.checked_sub(sector)
            && read(st, at, 8)? == b"EFI PART"
        {
            add(GPT_COPY, at);
        }
    }
    // Old programs made the last sector a byte shorter.
    for back in [512, 511] {
        if let Some(at) = len.checked_sub(back)
            && read(st, at, 8)? == b"conectix"
        {
            add(VHD, at);
        }
    }
    // On 64 KiB, at least 64 KiB from the end; in the byte order of the host that made it.
    if let Some(at) = (len & !0xffff).checked_sub(0x1_0000) {
        let magic = read(st, at, 4)?;
        if magic == *b"\xfc\x4e\x2b\xa9" || magic == *b"\xa9\x2b\x4e\xfc" {
            add("an md RAID member (superblock 0.90)", at);
        }
    }
    if let Some(sector) = (len / 512).checked_sub(16) {
        let at = (sector & !7) * 512;
        if read(st, at, 4)? == b"\xfc\x4e\x2b\xa9" {
            add("an md RAID member (superblock 1.0)", at);
        }
    }
    let at = 64 << 20;
    if read(st, at + 64, 8)? == b"_BHRfS_M" {
        add("the copy of a btrfs file system", at + 64);
    }
    // File systems' boot sectors end as partition tables do.
    if found.is_empty() && front[510..].starts_with(b"\x55\xaa") {
        let used = front[446..510].chunks_exact(16).any(|entry| entry[4] != 0);
        let what = if used { "an MBR partition table" } else { "a boot sector" };
        found.push(Found { what: what.to_owned(), offset: 510 });
    }
    Ok(found)
}

/// Which of the file systems that share a mark it is.
fn ext(front: &[u8]) -> Option<&'static str> {
    let superblock = &front[1024..2048];
    if !superblock[56..].starts_with(b"\x53\xef") {
        return None;
    }
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| superblock[at + i]));
    let (journal, incompatible) = (word(92) & 4 != 0, word(96));
    Some(match (journal, incompatible) {
        // Extents, 64 bits, and others that ext3 has not got.
        (_, i) if i & 0x2c0 != 0 => "an ext4 file system",
        (_, i) if i & 8 != 0 => "the journal of an ext4 file system",
        (true, _) => "an ext3 file system",
        (false, _) => "an ext2 file system",
    })
}

/// Bytes of the device, zeroes where it has ended.
fn read(st: &mut dyn Storage, offset: u64, count: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    let there = st.len().saturating_sub(offset).min(count as u64) as usize;
    if there > 0 {
        st.read_at(offset, &mut bytes[..there]).context("cannot see what is on it")?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use node::HostStorage;

    const LEN: u64 = 128 << 20;

    /// What is found on a device with these bytes.
    fn with(marks: &[(u64, &[u8])], len: u64) -> Vec<Found> {
        let mut device = HostStorage::of(tempfile::tempfile().unwrap(), false).unwrap();
        device.set_len(len).unwrap();
        for (offset, bytes) in marks {
            device.write_at(*offset, bytes).unwrap();
        }
        detect(&mut device).unwrap()
    }

    #[test]
    fn each_mark_is_found_where_it_is() {
        assert_eq!(with(&[], LEN), []);
        assert_eq!(with(&[], 0), []);
        assert_eq!(with(&[(0, b"something else"), (0x9000, b"XFSB")], LEN), []);
        for (offset, bytes, what) in MARKS {
            let found = with(&[(offset as u64, bytes)], LEN);
            assert_eq!(found, [Found { what: what.to_owned(), offset: offset as u64 }]);
        }
        let md = b"\xfc\x4e\x2b\xa9";
        let odd = LEN + 5 * 512;
        for (offset, bytes, len, what) in [
            (1080, &b"\x53\xef"[..], LEN, "an ext2 file system"),
            (LEN - 512, b"EFI PART", LEN, GPT_COPY),
            (LEN - 4096, b"EFI PART", LEN, GPT_COPY),
            (LEN - 512, b"conectix", LEN, VHD),
            (LEN - 511, b"conectix", LEN, VHD),
            (LEN - 65536, md, LEN, "an md RAID member (superblock 0.90)"),
            (LEN - 65536, md, odd, "an md RAID member (superblock 0.90)"),
            (LEN - 65536, b"\xa9\x2b\x4e\xfc", odd, "an md RAID member (superblock 0.90)"),
            (LEN - 8192, md, LEN, "an md RAID member (superblock 1.0)"),
            (LEN - 8192, md, odd, "an md RAID member (superblock 1.0)"),
            ((64 << 20) + 64, b"_BHRfS_M", LEN, "the copy of a btrfs file system"),
            (510, b"\x55\xaa", LEN, "a boot sector"),
        ] {
            let found = with(&[(offset, bytes)], len);
            assert_eq!(found, [Found { what: what.to_owned(), offset }], "{offset} of {len}");
        }
        let table = with(&[(450, b"\x83"), (510, b"\x55\xaa")], LEN);
        assert_eq!(table[0].what, "an MBR partition table");
        // A protective MBR is not worth a word beside the table that it protects.
        let gpt = with(&[(450, b"\xee"), (510, b"\x55\xaa"), (512, b"EFI PART")], LEN);
        assert_eq!((gpt.len(), gpt[0].what.as_str()), (1, GPT));
        let ext4: [(u64, &[u8]); 3] = [(1080, b"\x53\xef"), (1116, b"\x04"), (1120, b"\x40")];
        assert_eq!(with(&ext4, LEN)[0].what, "an ext4 file system");
        assert_eq!(with(&ext4[..2], LEN)[0].what, "an ext3 file system");
        // Small devices are read as far as they go.
        assert_eq!(with(&[(0, b"XFSB")], 512)[0].what, "an XFS file system");
    }
}
