//! Header extensions ("Header extensions", "Feature name table").

use super::FieldError;
use super::bytes::be32;

/// Types of header extensions.
pub mod ext {
    /// End of the area.
    pub const END: u32 = 0;
    /// The backing file's format, a string.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Persistent bitmaps.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the encryption header is.
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// The external data file's name, a string.
    pub const DATA_FILE: u32 = 0x4441_5441;

    /// The types that may appear once.
    pub(crate) const KNOWN: [(u32, &str); 5] = [
        (BACKING_FORMAT, "backing format"),
        (FEATURE_NAMES, "feature name table"),
        (BITMAPS, "bitmaps"),
        (ENCRYPTION, "encryption header"),
        (DATA_FILE, "data file name"),
    ];
}

/// A header extension, kept byte for byte whether known or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type, see [`ext`].
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// A named feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Bit number, 0 to 63.
    pub bit: u8,
    /// Its name.
    pub name: String,
}

impl FeatureName {
    /// Bytes of an entry.
    const LEN: usize = 48;

    /// The entries of a feature name table. A rest shorter than an entry is left out.
    pub(crate) fn parse(data: &[u8]) -> impl Iterator<Item = FeatureName> + '_ {
        data.chunks_exact(Self::LEN).map(|entry| {
            let name = entry[2..].split(|&b| b == 0).next().unwrap_or_default();
            FeatureName {
                kind: entry[0],
                bit: entry[1],
                name: String::from_utf8_lossy(name).into_owned(),
            }
        })
    }

    /// A table of entries (kind, bit, name of at most 46 bytes).
    pub(crate) fn encode(entries: &[(u8, u8, &str)]) -> Vec<u8> {
        let mut out = vec![0; entries.len() * Self::LEN];
        for (into, (kind, bit, name)) in out.chunks_exact_mut(Self::LEN).zip(entries) {
            into[0] = *kind;
            into[1] = *bit;
            into[2..2 + name.len()].copy_from_slice(name.as_bytes());
        }
        out
    }
}

/// Reads the extensions that stand in `cluster[start..end]`.
pub(crate) fn parse(
    cluster: &[u8],
    start: usize,
    end: usize,
) -> Result<Vec<Extension>, FieldError> {
    let mut found: Vec<Extension> = Vec::new();
    let mut at = start;
    // Each turn moves on by at least the 8 bytes of an extension's head.
    while at + 8 <= end {
        let (Some(kind), Some(len)) = (be32(cluster, at), be32(cluster, at + 4)) else { break };
        if kind == ext::END {
            break;
        }
        let data_at = at + 8;
        let room = end - data_at;
        if len as usize > room {
            return Err(FieldError::new(
                format!("length of header extension {kind:#010x}"),
                at as u64 + 4,
                len,
                format!("{room} bytes are left for it"),
            ));
        }
        if let Some((_, name)) = ext::KNOWN.iter().find(|(k, _)| *k == kind)
            && found.iter().any(|e| e.kind == kind)
        {
            return Err(FieldError::new(
                "header extension type",
                at as u64,
                format!("{kind:#010x} ({name}) a second time"),
                "each known type may appear once",
            ));
        }
        found.push(Extension { kind, data: cluster[data_at..data_at + len as usize].to_vec() });
        at = data_at + (len as usize).next_multiple_of(8);
    }
    Ok(found)
}

/// Appends the extensions and the end mark.
pub(crate) fn encode(extensions: &[Extension], out: &mut Vec<u8>) {
    for e in extensions {
        out.extend_from_slice(&e.kind.to_be_bytes());
        out.extend_from_slice(&(e.data.len() as u32).to_be_bytes());
        out.extend_from_slice(&e.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(&[0; 8]);
}
