//! Writes VHD files for tests from the specification alone: nothing here is shared with the crate
//! that reads them.

#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

/// A file to be written.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) size: u64,
    pub(crate) block: u32,
    pub(crate) creator: [u8; 4],
    pub(crate) version: u32,
    pub(crate) geometry: [u8; 4],
    pub(crate) uuid: [u8; 16],
    /// 3: dynamic, 4: differencing.
    pub(crate) kind: u32,
    pub(crate) parent: [u8; 16],
    /// UTF-16 big-endian, in the header.
    pub(crate) parent_name: String,
    /// Code, bytes.
    pub(crate) locators: Vec<([u8; 4], Vec<u8>)>,
    /// Sectors that are written: number and byte they are filled with.
    pub(crate) sectors: Vec<(u64, u8)>,
    /// tapdisk's map of full blocks.
    pub(crate) batmap: bool,
    pub(crate) hidden: bool,
}

impl File {
    pub(crate) fn dynamic(size: u64) -> File {
        File {
            size,
            block: 2 << 20,
            creator: *b"tap\0",
            version: 0x1_0003,
            geometry: [0xff, 0xff, 16, 255],
            uuid: *b"the-base-disk-id",
            kind: 3,
            parent: [0; 16],
            parent_name: String::new(),
            locators: Vec::new(),
            sectors: Vec::new(),
            batmap: true,
            hidden: false,
        }
    }

    /// A child of a disk, named as vhd-util does it.
    pub(crate) fn child(size: u64, uuid: &[u8; 16], parent: &[u8; 16], name: &str) -> File {
        let url = format!("file://./{name}").into_bytes();
        let windows: Vec<u8> =
            format!(".\\{name}").encode_utf16().flat_map(u16::to_le_bytes).collect();
        File {
            kind: 4,
            uuid: *uuid,
            parent: *parent,
            parent_name: name.to_owned(),
            locators: vec![(*b"MacX", url), (*b"W2ku", windows.clone()), (*b"W2ru", windows)],
            ..File::dynamic(size)
        }
    }

    pub(crate) fn with(mut self, sectors: impl IntoIterator<Item = (u64, u8)>) -> File {
        self.sectors.extend(sectors);
        self
    }

    pub(crate) fn footer(&self) -> Vec<u8> {
        let mut f = Vec::new();
        f.extend(b"conectix");
        f.extend(2u32.to_be_bytes());
        f.extend(0x1_0000u32.to_be_bytes());
        f.extend(512u64.to_be_bytes());
        f.extend(0u32.to_be_bytes());
        f.extend(self.creator);
        f.extend(self.version.to_be_bytes());
        f.extend([0; 4]);
        f.extend(self.size.to_be_bytes());
        f.extend(self.size.to_be_bytes());
        f.extend(self.geometry);
        f.extend(self.kind.to_be_bytes());
        f.extend([0; 4]);
        f.extend(self.uuid);
        f.extend([0, u8::from(self.hidden)]);
        f.resize(512, 0);
        sum(&mut f, 64);
        f
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let blocks = (self.size.div_ceil(u64::from(self.block))) as usize;
        let per_block = u64::from(self.block) / 512;
        let bitmap = (per_block as usize / 8).max(1).next_multiple_of(512);
        let mut out = self.footer();
        out.resize(1536, 0);
        out.resize(1536 + (blocks * 4).next_multiple_of(512), 0xff);
        let map_at = out.len();
        if self.batmap {
            out.resize(out.len() + 512 + (blocks / 8).max(1).next_multiple_of(512), 0);
        }
        let mut places = Vec::new();
        for (code, name) in &self.locators {
            places.push((*code, out.len() as u64, name.len() as u32));
            out.extend(name);
            out.resize(out.len().next_multiple_of(512), 0);
        }
        let mut table = vec![u32::MAX; blocks];
        for &(sector, fill) in &self.sectors {
            let (index, within) = ((sector / per_block) as usize, sector % per_block);
            if table[index] == u32::MAX {
                table[index] = (out.len() / 512) as u32;
                out.resize(out.len() + bitmap + self.block as usize, 0);
            }
            let at = table[index] as usize * 512;
            let swapped = self.version == 1;
            let bit = if swapped { 1 << (within % 8) } else { 0x80 >> (within % 8) };
            out[at + within as usize / 8] |= bit;
            let data = at + bitmap + within as usize * 512;
            out[data..data + 512].fill(fill);
        }
        for (i, entry) in table.iter().enumerate() {
            out[1536 + i * 4..][..4].copy_from_slice(&entry.to_be_bytes());
        }
        if self.batmap {
            let len = out[map_at + 512..].len().min((blocks / 8).max(1).next_multiple_of(512));
            for (i, &entry) in table.iter().enumerate() {
                let at = entry as usize * 512;
                if entry != u32::MAX
                    && out[at..at + per_block as usize / 8].iter().all(|&b| b == 0xff)
                {
                    out[map_at + 512 + i / 8] |= 0x80 >> (i % 8);
                }
            }
            let total: u32 =
                out[map_at + 512..map_at + 512 + len].iter().map(|&b| u32::from(b)).sum();
            let mut h = Vec::new();
            h.extend(b"tdbatmap");
            h.extend((map_at as u64 + 512).to_be_bytes());
            h.extend(((len / 512) as u32).to_be_bytes());
            h.extend(0x1_0002u32.to_be_bytes());
            h.extend((!total).to_be_bytes());
            out[map_at..map_at + h.len()].copy_from_slice(&h);
        }
        let header = self.header(blocks as u32, &places);
        out[512..1536].copy_from_slice(&header);
        out.extend(self.footer());
        out
    }

    fn header(&self, blocks: u32, places: &[([u8; 4], u64, u32)]) -> Vec<u8> {
        let mut h = Vec::new();
        h.extend(b"cxsparse");
        h.extend(u64::MAX.to_be_bytes());
        h.extend(1536u64.to_be_bytes());
        h.extend(0x1_0000u32.to_be_bytes());
        h.extend(blocks.to_be_bytes());
        h.extend(self.block.to_be_bytes());
        h.extend([0; 4]);
        h.extend(self.parent);
        h.extend([0; 8]);
        h.extend(self.parent_name.encode_utf16().flat_map(u16::to_be_bytes));
        h.resize(576, 0);
        for &(code, at, len) in places {
            h.extend(code);
            h.extend(len.next_multiple_of(512).to_be_bytes());
            h.extend(len.to_be_bytes());
            h.extend([0; 4]);
            h.extend(at.to_be_bytes());
        }
        h.resize(1024, 0);
        sum(&mut h, 36);
        h
    }
}

/// Puts the checksum into its place.
pub(crate) fn sum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let total: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
    bytes[at..at + 4].copy_from_slice(&(!total).to_be_bytes());
}

/// What a chain's disk holds: files from the top down, over a raw disk perhaps.
pub(crate) fn expected(files: &[&File], raw: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; files[0].size as usize];
    let n = disk.len().min(raw.len());
    disk[..n].copy_from_slice(&raw[..n]);
    for file in files.iter().rev() {
        for &(sector, fill) in &file.sectors {
            let at = sector as usize * 512;
            if at < disk.len() {
                disk[at..at + 512].fill(fill);
            }
        }
    }
    disk
}
