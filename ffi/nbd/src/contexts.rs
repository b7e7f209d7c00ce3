//! Metadata contexts: what a client may ask of an export beside its bytes. `base:allocation` says what is
//! allocated and zero; `qemu:dirty-bitmap:NAME`, as QEMU has it, where the bits of a bitmap are set.

use std::sync::Arc;

use block::Status;

use crate::export::Export;
use crate::proto;

/// What names of contexts of bitmaps begin with.
const BITMAPS: &str = "qemu:dirty-bitmap:";

/// Bitmaps that one client can have at most: each may be large.
const MOST: usize = 8;

/// Names that are listed at most.
const LISTED: usize = 1000;

/// A block-status flag of a bitmap's context (`NBD_STATE_DIRTY`).
const DIRTY: u32 = 1;

/// The bitmaps of an export. Called on connections' threads, while they negotiate.
pub trait Bitmaps: Send + Sync {
    /// Their names.
    fn names(&self) -> Vec<String>;

    /// The bits of one, as they are now. `None` if there is none of that name, or its bits mean nothing.
    fn open(&self, name: &str) -> Option<Arc<dyn Bitmap>>;
}

/// Bits of a disk. Called on connections' threads.
pub trait Bitmap: Send + Sync {
    /// For how many bytes from `offset` on, at least one and at most `most` (not 0), the bits are alike, and whether
    /// they are set.
    fn run(&self, offset: u64, most: u64) -> (u64, bool);
}

/// A context that a client has selected.
#[derive(Clone)]
pub(crate) enum Context {
    Allocation,
    Bitmap(String, Arc<dyn Bitmap>),
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Context {
    /// Its name on the wire.
    pub(crate) fn name(&self) -> String {
        match self {
            Context::Allocation => String::from_utf8_lossy(proto::ALLOCATION).into_owned(),
            Context::Bitmap(name, _) => format!("{BITMAPS}{name}"),
        }
    }

    /// The descriptors that answer a block-status query over a checked range, as [`Export::descriptors`].
    pub(crate) fn descriptors(
        &self,
        export: &Export,
        offset: u64,
        len: u32,
        limit: usize,
    ) -> Result<Vec<(u32, u32)>, Status> {
        let Context::Bitmap(_, bitmap) = self else {
            return export.descriptors(offset, len, limit);
        };
        let mut list: Vec<(u32, u32)> = Vec::new();
        let mut left = len;
        while left > 0 {
            let (run, dirty) = bitmap.run(offset + u64::from(len - left), left.into());
            let run = u32::try_from(run).unwrap_or(left).clamp(1, left);
            let flags = if dirty { DIRTY } else { 0 };
            let full = list.len() == limit;
            match list.last_mut() {
                Some(last) if last.1 == flags => last.0 += run,
                _ if full => break,
                _ => list.push((run, flags)),
            }
            left -= run;
        }
        Ok(list)
    }
}

/// The names of all contexts that these queries mean, or of all if there are none.
pub(crate) fn listed(export: &Export, queries: &[&[u8]]) -> Vec<String> {
    let asks = |what: &str| queries.is_empty() || queries.contains(&what.as_bytes());
    let base = Context::Allocation.name();
    let mut names = Vec::new();
    if asks("base:") || asks(&base) {
        names.push(base);
    }
    // Finding out what there is may take some time.
    if queries.is_empty() || queries.iter().any(|query| query.starts_with(b"qemu:")) {
        let all = export.bitmaps.iter().flat_map(|bitmaps| bitmaps.names());
        let all = all.map(|name| format!("{BITMAPS}{name}"));
        let short = all.filter(|name| name.len() <= proto::MAX_STRING);
        let meant = short.filter(|name| asks("qemu:") || asks(BITMAPS) || asks(name));
        names.extend(meant.take(LISTED));
    }
    names
}

/// The contexts that a client selects by these queries; what there is not is left out.
pub(crate) fn selected(export: &Export, queries: &[&[u8]]) -> Vec<Context> {
    let mut contexts = Vec::new();
    if queries.contains(&proto::ALLOCATION) {
        contexts.push(Context::Allocation);
    }
    let mut names: Vec<&str> = Vec::new();
    for query in queries {
        let name = std::str::from_utf8(query).ok().and_then(|query| query.strip_prefix(BITMAPS));
        names.extend(name.filter(|name| !names.contains(name)));
    }
    let open = |name: &str| {
        let bitmap = export.bitmaps.as_ref()?.open(name)?;
        Some(Context::Bitmap(name.to_owned(), bitmap))
    };
    contexts.extend(names.into_iter().filter_map(open).take(MOST));
    contexts
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::export::AllData;
    use crate::export::tests::export;

    /// Every other 64 KiB of a disk has changed, or every other 128 KiB.
    pub(crate) struct Stripes;

    struct Stripe(u64);

    impl Bitmaps for Stripes {
        fn names(&self) -> Vec<String> {
            let long = "x".repeat(proto::MAX_STRING);
            ["one", "two", "gone", &long].map(str::to_owned).to_vec()
        }

        fn open(&self, name: &str) -> Option<Arc<dyn Bitmap>> {
            match name {
                "one" => Some(Arc::new(Stripe(64 << 10))),
                "two" => Some(Arc::new(Stripe(128 << 10))),
                _ => None,
            }
        }
    }

    impl Bitmap for Stripe {
        fn run(&self, offset: u64, most: u64) -> (u64, bool) {
            let Stripe(len) = *self;
            ((len - offset % len).min(most), (offset / len).is_multiple_of(2))
        }
    }

    #[test]
    fn bitmaps_are_listed_and_selected_by_name() {
        let mut e = export(Box::new(AllData));
        assert_eq!(listed(&e, &[]), ["base:allocation"]);
        e.bitmaps = Some(Box::new(Stripes));
        let (one, two) = ("qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two");
        let gone = "qemu:dirty-bitmap:gone";
        assert_eq!(listed(&e, &[]), ["base:allocation", one, two, gone]);
        assert_eq!(listed(&e, &[b"qemu:"]), [one, two, gone]);
        assert_eq!(listed(&e, &[b"qemu:dirty-bitmap:", b"base:"]).len(), 4);
        assert_eq!(listed(&e, &[b"qemu:dirty-bitmap:two", b"qemu:dirty"]), [two]);
        assert!(listed(&e, &[b"base:other", b"\xff"]).is_empty());
        let select = |queries: &[&str]| -> Vec<String> {
            let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
            selected(&e, &queries).iter().map(Context::name).collect()
        };
        assert_eq!(select(&[two, "base:allocation", one, two]), ["base:allocation", two, one]);
        assert!(select(&[gone, "qemu:", "qemu:dirty-bitmap:", "base:"]).is_empty());
        let many: Vec<Vec<u8>> =
            (0..99).map(|n| format!("qemu:dirty-bitmap:{n}").into_bytes()).collect();
        let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
        assert!(selected(&e, &many).is_empty());
    }

    #[test]
    fn bits_become_descriptors() {
        let e = export(Box::new(AllData));
        let context = Context::Bitmap("one".to_owned(), Stripes.open("one").unwrap());
        let of = |offset, len, limit| context.descriptors(&e, offset, len, limit).unwrap();
        assert_eq!(of(0, 200_000, 9), [(65536, 1), (65536, 0), (65536, 1), (3392, 0)]);
        assert_eq!(of(65536 - 512, 1024, 9), [(512, 1), (512, 0)]);
        assert_eq!(of(512, 1 << 20, 2), [(65024, 1), (65536, 0)]);
        assert_eq!(of(1 << 29, 1, 1), [(1, 1)]);
    }
}
