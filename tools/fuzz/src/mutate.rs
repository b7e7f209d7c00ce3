//! Changes to an image that know its structure: a table entry is replaced by another possible one
//! far more often than by nonsense, which would be refused at once.

/// Bytes of the input, handed out from the front; zeroes when they are used up.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(crate) fn word(&mut self) -> u64 {
        u64::from(self.byte()) << 8 | u64::from(self.byte())
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.word() % n.max(1)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn get(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let bytes = image.get(at..).and_then(|b| b.first_chunk::<8>());
    bytes.map_or(0, |b| u64::from_be_bytes(*b))
}

fn set(image: &mut [u8], at: u64, value: u64) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if let Some(place) = image.get_mut(at..).and_then(|b| b.first_chunk_mut::<8>()) {
        *place = value.to_be_bytes();
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Changes one thing.
pub(crate) fn mutate(image: &mut [u8], input: &mut Input<'_>) {
    let cluster = 1u64 << (get(image, 16) & 31).clamp(9, 21);
    let clusters = (image.len() as u64).div_ceil(cluster);
    let l1 = get(image, 40);
    let l1_entries = get(image, 32) & 0xffff_ffff;
    let table = get(image, 48);
    match input.byte() % 6 {
        0 => {
            let at = input.below(112) as usize;
            let value = input.byte();
            if let Some(b) = image.get_mut(at) {
                *b ^= value;
            }
        }
        1 => {
            let at = l1.saturating_add(input.below(l1_entries) * 8);
            let value = entry(input, cluster, clusters);
            set(image, at, value);
        }
        2 | 3 => {
            let entry_at = l1.saturating_add(input.below(l1_entries) * 8);
            let l2 = get(image, entry_at) & OFFSET;
            let at = l2.saturating_add(input.below(cluster / 8) * 8);
            let value = entry(input, cluster, clusters);
            if l2 != 0 {
                set(image, at, value);
            }
        }
        4 => {
            let block = get(image, table.saturating_add(input.below(4) * 8)) & OFFSET;
            let at = block.saturating_add(input.below(2 * clusters)) as usize;
            let value = input.byte();
            if block != 0
                && let Some(b) = image.get_mut(at)
            {
                *b = value;
            }
        }
        _ => {
            let at = input.below(image.len() as u64) as usize;
            let value = input.byte();
            if let Some(b) = image.get_mut(at) {
                *b ^= value;
            }
        }
    }
}

/// A table entry: a cluster of the image, or none, with some flags.
fn entry(input: &mut Input<'_>, cluster: u64, clusters: u64) -> u64 {
    let host = input.below(clusters + 2) * cluster;
    match input.byte() % 8 {
        0 => 0,
        1 => 1,
        2 => host | 1,
        3 | 4 => host | 1 << 63,
        5 => host,
        6 => 1 << 62 | u64::from(input.byte()) << 54 | host | u64::from(input.byte()),
        _ => host | u64::from(input.byte()) << 56 | u64::from(input.byte()),
    }
}
