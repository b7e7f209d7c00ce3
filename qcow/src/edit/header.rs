//! The header cluster's rest: extensions and backing file name, changed so that a cut leaves the
//! old ones or the new ones.
//!
//! The first sector says where the name is, and is replaced by one write. What stands in the other
//! sectors of the cluster is written before that, in places that the old header does not use.

use block::Storage;

use super::tx::{SECTOR, Tx};
use crate::format::{Extension, FieldError, Header, MAX_BACKING_NAME, autoclear, ext};
use crate::open::{Format, ImageMeta, Mode};
use crate::{Error, Result};

/// Changes the backing file that stands in the header, and nothing else: its name, as it shall
/// stand there, and its format. `None`: the image has no backing file any more.
///
/// # Errors
/// If the name is empty, too long or does not fit, or a write fails.
pub fn set_backing(
    st: &mut dyn Storage,
    name: &str,
    backing: Option<(&str, Format)>,
) -> Result<()> {
    let meta = ImageMeta::open(st, name, Mode::Write)?;
    let mut new = meta.header.clone();
    new.backing_name = None;
    match backing {
        None => new.extensions.retain(|e| e.kind != ext::BACKING_FORMAT),
        Some((backing, format)) => {
            if backing.is_empty() || backing.len() > MAX_BACKING_NAME as usize {
                let reason = format!("a backing file name has 1 to {MAX_BACKING_NAME} bytes");
                return Err(Error::refused(name, reason));
            }
            new.backing_name = Some(backing.as_bytes().to_vec());
            let data = format.name().as_bytes().to_vec();
            match new.extensions.iter_mut().find(|e| e.kind == ext::BACKING_FORMAT) {
                Some(e) => e.data = data,
                None => new.extensions.push(Extension { kind: ext::BACKING_FORMAT, data }),
            }
        }
    }
    replace(st, name, &new)
}

/// Puts a new header in the place of the old one; nothing vouches any more for what is unknown here.
pub(super) fn replace(st: &mut dyn Storage, name: &str, new: &Header) -> Result<()> {
    let known = new.autoclear_features & autoclear::KNOWN;
    let new = &Header { autoclear_features: known, ..new.clone() };
    let io = || Error::io(name, "header");
    let mut old = vec![0; 1 << new.cluster_bits];
    st.read_at(0, &mut old).map_err(io())?;
    let bytes = lay_out(&old, new).map_err(|e| Error::field(name, e))?.ok_or_else(|| {
        Error::refused(
            name,
            "has no room in its first cluster for a new backing file name beside the old one; a \
             shorter name may fit",
        )
    })?;
    if bytes[SECTOR..] != old[SECTOR..] {
        st.write_at(SECTOR as u64, &bytes[SECTOR..]).map_err(io())?;
        st.flush().map_err(io())?;
    }
    st.write_at(0, &bytes[..SECTOR]).map_err(io())?;
    st.flush().map_err(io())
}

impl Tx {
    /// Lays the header out anew around what the transaction changes in its extensions, and writes
    /// all of it but the first sector, which is returned: until that is on disk the old header
    /// says what it said.
    pub(super) fn lay_out_header(&mut self, st: &mut dyn Storage) -> Result<[u8; SECTOR]> {
        let name = &self.meta.name;
        let io = || Error::io(name, "header");
        let mut old = vec![0; 1 << self.meta.header.cluster_bits];
        st.read_at(0, &mut old).map_err(io())?;
        let bytes = lay_out(&old, &self.meta.header)
            .map_err(|e| Error::field(name, e))?
            .ok_or_else(|| Error::refused(name, "has no room in its first cluster for bitmaps"))?;
        if bytes[SECTOR..] != old[SECTOR..] {
            st.write_at(SECTOR as u64, &bytes[SECTOR..]).map_err(io())?;
        }
        Ok(bytes[..SECTOR].try_into().expect("a sector"))
    }

    /// Puts names of feature bits back into the header if they had to give way while it was laid
    /// out anew.
    pub(super) fn restore_names(&mut self, st: &mut dyn Storage) -> Result<()> {
        let name = &self.meta.name;
        let now = ImageMeta::open(st, name, Mode::Check)?.header;
        if now.extensions != self.meta.header.extensions
            && let Err(e) = replace(st, name, &self.meta.header)
        {
            log::debug!("{name}: names of feature bits had to give way: {e}");
        }
        self.meta.header.extensions = ImageMeta::open(st, name, Mode::Check)?.header.extensions;
        Ok(())
    }
}

/// The header cluster with the new header, such that the old first sector together with any part of
/// the new rest still says what it said. `None` if there is no room for that.
fn lay_out(old: &[u8], new: &Header) -> Result<Option<Vec<u8>>, FieldError> {
    let was = Header::parse(old)?;
    let was_name = name_place(old);
    let was_extensions = 0..encode_without_name(&was)?.len();
    let name = new.backing_name.as_deref().unwrap_or_default();
    // Names of feature bits are for people: they go where there is no room.
    let mut without = new.clone();
    without.extensions.retain(|e| e.kind != ext::FEATURE_NAMES);
    for header in [new, &without] {
        let Ok(start) = encode_without_name(header) else { continue };
        let end = start.len();
        let behind = was_name.end.max(was_extensions.end).max(end).next_multiple_of(8);
        for at in [end, behind] {
            let mut bytes = old.to_vec();
            if at + name.len() > bytes.len() {
                continue;
            }
            bytes[..end].copy_from_slice(&start);
            if !name.is_empty() {
                bytes[at..at + name.len()].copy_from_slice(name);
                bytes[8..16].copy_from_slice(&(at as u64).to_be_bytes());
                bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            }
            let kept = [&was_name, &was_extensions].into_iter().all(|range| {
                let range = range.start.max(SECTOR)..range.end.max(SECTOR);
                bytes[range.clone()] == old[range]
            });
            if kept {
                return Ok(Some(bytes));
            }
        }
    }
    Ok(None)
}

/// Header and extensions, with their end mark.
fn encode_without_name(header: &Header) -> Result<Vec<u8>, FieldError> {
    Header { backing_name: None, ..header.clone() }.encode()
}

/// Where the backing file name stands in a header that was parsed.
fn name_place(bytes: &[u8]) -> std::ops::Range<usize> {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let start = word(8) as usize;
    if start == 0 { 0..0 } else { start..start + (word(16) >> 32) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Geometry;

    /// Any mix of old and new sectors behind the first one, under the old first sector, must read
    /// as the old header; the new one as the new header.
    #[test]
    fn old_and_new_never_mix() {
        let mut done = 0;
        for (version, bits) in [(2, 9), (3, 9), (3, 10), (3, 11), (3, 12), (3, 16), (2, 12)] {
            let g = Geometry::new(version, bits, 4, 1 << 20).unwrap();
            let plain = Header { l1_size: g.l1_entries() as u32, ..Header::new(&g) };
            for names in [false, true] {
                for old_len in [0, 1, 100, 400, 1023] {
                    for new_len in [0, 5, 99, 600, 1023] {
                        let mut old = plain.clone();
                        let mut new = plain.clone();
                        for (h, len, c) in [(&mut old, old_len, b'o'), (&mut new, new_len, b'n')] {
                            h.backing_name = (len > 0).then(|| vec![c; len]);
                            if len > 99 {
                                let data = b"qcow2".to_vec();
                                h.extensions.push(Extension { kind: ext::BACKING_FORMAT, data });
                            }
                            if names {
                                h.add_feature_names();
                            }
                        }
                        let Ok(mut bytes) = old.encode() else { continue };
                        bytes.resize(1 << bits, 0);
                        let Some(after) = lay_out(&bytes, &new).unwrap() else {
                            // Both names always fit where clusters are as large as pages.
                            assert!(bits < 12, "{version} {bits} {old_len} {new_len}");
                            continue;
                        };
                        done += 1;
                        let parsed = Header::parse(&after).unwrap();
                        assert_eq!(parsed.backing_name, new.backing_name);
                        assert_eq!(parsed.backing_format(), new.backing_format());
                        let sectors = bytes.len() / SECTOR - 1;
                        for mask in 0..1u32 << sectors.min(6) {
                            let mut mix = bytes.clone();
                            for i in 0..sectors {
                                if mask & (1 << i.min(5)) != 0 {
                                    let r = (i + 1) * SECTOR..(i + 2) * SECTOR;
                                    mix[r.clone()].copy_from_slice(&after[r]);
                                }
                            }
                            assert_eq!(
                                Header::parse(&mix).unwrap(),
                                Header::parse(&bytes).unwrap()
                            );
                        }
                    }
                }
            }
        }
        assert!(done > 150, "{done}");
    }
}
