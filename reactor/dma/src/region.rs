//! [`Region`]: one mapping of shared memory, kept alive by whoever may still touch it.
//!
//! Made by control code, before traffic starts; accessed from any thread. The mapping goes away
//! when nobody holds it any more: neither its users, by an `Arc` of the region, nor a queue that was
//! told about it, by a [`crate::Held`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Once};

#[cfg(not(miri))]
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
#[cfg(not(miri))]
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::{RegionId, Seg};

/// The pages that a region is made of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum PageSize {
    /// Ordinary 4 KiB pages.
    Small,
    /// Huge pages of 2 MiB.
    Huge2M,
    /// Huge pages of 1 GiB.
    Huge1G,
}

impl PageSize {
    /// Size of a page in bytes.
    pub fn bytes(self) -> usize {
        match self {
            PageSize::Small => 4 << 10,
            PageSize::Huge2M => 2 << 20,
            PageSize::Huge1G => 1 << 30,
        }
    }
}

/// Why a region could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused; `what` names the call.
    #[error("cannot get {len} bytes of DMA memory: {what}: {source}")]
    Os {
        /// The call that failed.
        what: &'static str,
        /// Bytes asked for.
        len: usize,
        /// The kernel's answer.
        source: nix::Error,
    },
    /// [`RegionId::MAX`] regions exist.
    #[error("{} DMA regions exist already, which is the limit", RegionId::MAX)]
    TooMany,
    /// A region of no bytes, or of more than the address space holds.
    #[error("a DMA region of {0} bytes is not possible")]
    Length(usize),
    /// What a peer passed is no memory that can be shared: say, a pipe, or a file that may still
    /// be shortened, so that an access would kill the process.
    #[error("the peer's descriptor is no memory that it cannot take away: {0}")]
    NotSealed(&'static str),
    /// The part of a peer's memory that is to be mapped is not inside, or no whole pages.
    #[error("{len} bytes at offset {offset} are no whole pages of the peer's {size} bytes")]
    Outside {
        /// Where it should begin in the peer's memory.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes that the peer's memory has.
        size: u64,
    },
}

/// A mapping of shared memory that devices, guests and other processes may access.
///
/// Backed by a memfd, so that it can be passed to a peer process and outlive a crash of this one.
/// All accesses are bounds-checked copies or single atomic words.
///
/// Its users hold it by an `Arc`. Tables of queues hold it by a [`crate::Held`], which keeps the memory
/// where it is and yet knows when the last user has gone.
#[derive(Debug)]
pub struct Region {
    id: RegionId,
    base: Base,
    len: usize,
    page: PageSize,
    lazy: bool,
    /// The one that was made with the mapping; others are a table's.
    users: bool,
    mapping: Arc<Mapping>,
}

/// What the users' region and those of tables share. Keeps the id for as long as it lives.
#[derive(Debug)]
struct Mapping {
    id: RegionId,
    base: Base,
    len: usize,
    fd: OwnedFd,
    /// The users' region exists.
    used: AtomicBool,
}

/// Where a mapping begins.
#[derive(Clone, Copy, Debug)]
struct Base(NonNull<u8>);

// SAFETY: the mapping is valid for the life of the region that has this (the file's length is sealed;
// where a page cannot be had the kernel ends the process, and nothing wrong is read) and every
// access through it is an opaque copy or an atomic, so no thread can make a data race that Rust
// would call undefined. Who uses `base` with `unsafe` keeps to that.
unsafe impl Send for Base {}
// SAFETY: as above.
unsafe impl Sync for Base {}

impl Region {
    /// Maps `len` bytes, rounded up to whole pages of the kind asked for, zeroed and resident.
    ///
    /// # Errors
    /// What the kernel says, e.g. that there are not enough huge pages.
    pub fn new(len: usize, page: PageSize) -> Result<Arc<Region>, Error> {
        Region::of_pages(len, page, false)
    }

    fn of_pages(len: usize, page: PageSize, lazy: bool) -> Result<Arc<Region>, Error> {
        let size = page.bytes();
        let len = len.checked_next_multiple_of(size).filter(|&l| l > 0 && l <= isize::MAX as usize);
        let len = len.ok_or(Error::Length(len.unwrap_or(0)))?;
        #[cfg(not(miri))]
        let flags = if lazy { MapFlags::empty() } else { MapFlags::MAP_POPULATE };
        #[cfg(miri)]
        let flags = MapFlags::empty();
        Region::map(memory(len, page)?, 0, len, page, flags, lazy)
    }

    /// As [`Region::new_best`] for what may never be used: a page is taken when it is first touched,
    /// or a device that needs to know where it is is told of the region. Huge pages are set aside at
    /// once; where the host has no ordinary page left when one is needed, that ends the process as it
    /// does with other memory.
    ///
    /// # Errors
    /// As [`Region::new_best`].
    pub fn new_lazy(len: usize) -> Result<Arc<Region>, Error> {
        Region::best(len, true)
    }

    /// Whether it was made by [`Region::new_lazy`]: it is not to be made resident for a favour.
    pub fn is_lazy(&self) -> bool {
        self.lazy
    }

    /// Maps `[offset, offset + len)` of memory that another process made and passed a descriptor of.
    ///
    /// Only a memfd that is sealed against being shortened, and that may be written: its length is
    /// there for good. Nothing is made resident, since the peer says how much there is; pages that
    /// the peer punches out come back as zeroes when they are touched. With huge pages that needs a
    /// free one on the host, else the access kills this process: so it is for peers that may do that.
    /// `offset` and `len` are multiples of the memory's page size.
    ///
    /// # Errors
    /// [`Error::NotSealed`] and [`Error::Outside`] as they say; [`Error::Os`] if the kernel refuses,
    /// e.g. because the descriptor is for reading only.
    #[cfg(not(miri))]
    pub fn from_peer(fd: OwnedFd, offset: u64, len: u64) -> Result<Arc<Region>, Error> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        match seals {
            Ok(s) if s.contains(SealFlag::F_SEAL_SHRINK) => {}
            Ok(_) => return Err(Error::NotSealed("it may still be shortened")),
            Err(_) => return Err(Error::NotSealed("not a memfd")),
        }
        let os = |what| move |source| Error::Os { what, len: len as usize, source };
        // After the seals: the size that is seen now is there for good.
        let stat = nix::sys::stat::fstat(&fd).map_err(os("fstat"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let page = match stat.st_blksize as usize {
            b if b == PageSize::Huge2M.bytes() => PageSize::Huge2M,
            b if b == PageSize::Huge1G.bytes() => PageSize::Huge1G,
            _ => PageSize::Small,
        };
        let end = offset.checked_add(len).filter(|&end| end <= size && end <= isize::MAX as u64);
        let whole = (offset | len).is_multiple_of(page.bytes() as u64) && len > 0;
        let (Some(_), true) = (end, whole) else {
            return Err(Error::Outside { offset, len, size });
        };
        Region::map(fd, offset as i64, len as usize, page, MapFlags::empty(), false)
    }

    /// Maps a file in memory (on tmpfs) of at least `len` bytes, so that what is written outlives the
    /// process. `len` is a multiple of 4096. Only for a file of ours in a folder that nobody else may
    /// write to: an access behind its end, were it shortened, would kill the process.
    ///
    /// # Errors
    /// [`Error::Outside`] if it is shorter; [`Error::Os`] if the kernel refuses.
    #[cfg(not(miri))]
    pub fn of_file(file: OwnedFd, len: u64) -> Result<Arc<Region>, Error> {
        let os = |what| move |source| Error::Os { what, len: len as usize, source };
        let stat = nix::sys::stat::fstat(&file).map_err(os("fstat"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if len > size || len == 0 || !len.is_multiple_of(4096) {
            return Err(Error::Outside { offset: 0, len, size });
        }
        Region::map(file, 0, len as usize, PageSize::Small, MapFlags::empty(), false)
    }

    /// As [`Region::new`] with the largest pages that the host has free for it.
    ///
    /// # Errors
    /// Only if not even ordinary pages can be had.
    pub fn new_best(len: usize) -> Result<Arc<Region>, Error> {
        Region::best(len, false)
    }

    fn best(len: usize, lazy: bool) -> Result<Arc<Region>, Error> {
        for page in [PageSize::Huge1G, PageSize::Huge2M] {
            // A page that would stay more than half empty is a waste of a scarce thing.
            if len >= page.bytes() / 2
                && let Ok(region) = Region::of_pages(len, page, lazy)
            {
                return Ok(region);
            }
        }
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            log::info!(
                "no huge pages to be had for DMA memory, ordinary pages are used (reserve some: \
                 sysctl vm.nr_hugepages=512)"
            );
        });
        Region::of_pages(len, PageSize::Small, lazy)
    }

    fn map(
        fd: OwnedFd,
        offset: i64,
        len: usize,
        page: PageSize,
        flags: MapFlags,
        lazy: bool,
    ) -> Result<Arc<Region>, Error> {
        let id = RegionId::take().ok_or(Error::TooMany)?;
        assert!(len >= MIN_LEN, "a region has whole pages");
        let length = std::num::NonZeroUsize::new(len).ok_or(Error::Length(len))?;
        #[cfg(miri)]
        // SAFETY: a fresh mapping at an address that the kernel chooses; it overlaps nothing.
        let mapped = unsafe {
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // Miri's regions are no files: `offset` is 0, and all is there at once.
            let flags = MapFlags::MAP_PRIVATE | flags;
            debug_assert_eq!(offset, 0);
            nix::sys::mman::mmap_anonymous(None, length, prot, flags)
        };
        #[cfg(not(miri))]
        // SAFETY: a fresh shared mapping at an address that the kernel chooses; it overlaps nothing.
        let mapped = unsafe {
            nix::sys::mman::mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | flags,
                &fd,
                offset,
            )
        };
        match mapped {
            Ok(base) => {
                let (base, used) = (Base(base.cast()), AtomicBool::new(true));
                let mapping = Arc::new(Mapping { id, base, len, fd, used });
                Ok(Arc::new(Region { id, base, len, page, lazy, users: true, mapping }))
            }
            Err(source) => {
                id.give_back();
                Err(Error::Os { what: "mmap", len, source })
            }
        }
    }

    /// The region's name within this process.
    #[inline]
    pub fn id(&self) -> RegionId {
        self.id
    }

    /// Length in bytes, a multiple of the page size.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The pages it is made of.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The memfd behind it, for a peer that maps the same memory. A region of its own making is all
    /// of it; one [from a peer](Region::from_peer) may be a part.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.mapping.fd.as_fd()
    }

    /// Where it lies in this process: for a leaf that hands addresses to a kernel or a device, and
    /// keeps the region alive while it does. Dereferencing needs `unsafe` as for any raw pointer.
    #[inline]
    pub fn base(&self) -> NonNull<u8> {
        self.base.0
    }

    /// The same memory for a table, which is no user of it.
    pub(crate) fn for_table(self: &Arc<Region>) -> Arc<Region> {
        if !self.users {
            return self.clone();
        }
        let mapping = self.mapping.clone();
        Arc::new(Region { users: false, mapping, ..**self })
    }

    /// Whether its users hold it still. Once they do not, they never will again: only an `Arc` that
    /// they hold could be cloned.
    pub(crate) fn is_used(&self) -> bool {
        self.mapping.used.load(Ordering::Acquire)
    }

    /// How many tables hold it, for diagnosis: the queues that were told of it, and what makes it
    /// reachable for their devices.
    pub fn tables(&self) -> usize {
        Arc::strong_count(&self.mapping) - usize::from(self.is_used())
    }

    /// The segment `[offset, offset + len)`, or `None` if it does not lie inside.
    ///
    /// For the owner of the whole region; a shared region is cut by a [`crate::Pool`].
    pub fn seg(&self, offset: u64, len: u32) -> Option<Seg> {
        let end = offset.checked_add(u64::from(len))?;
        (end <= self.len as u64).then_some(Seg { region: self.id, len, offset })
    }

    /// [`Region::at`] for a `len` that is a constant, with one comparison.
    #[inline(always)]
    pub(crate) fn at_words(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(len <= MIN_LEN, "a few words");
        // No underflow: `map` makes no region that is shorter.
        assert!(offset <= self.len - len, "access outside a DMA region");
        // SAFETY: the offset was just found to lie within the mapping, `len` bytes before its end.
        unsafe { self.base.0.as_ptr().add(offset) }
    }

    /// Pointer to `[offset, offset + len)`. Panics if that is not inside, since offsets come from
    /// our own segments and layouts, never from a guest or device unchecked.
    #[inline(always)]
    pub(crate) fn at(&self, offset: usize, len: usize) -> *mut u8 {
        // The lengths are constants or below 2^32, and a region ends below 2^63: no overflow that
        // the comparison would not see.
        let end = offset.wrapping_add(len);
        assert!(offset <= end && end <= self.len, "access outside a DMA region");
        // SAFETY: the offset was just found to lie within the mapping.
        unsafe { self.base.0.as_ptr().add(offset) }
    }
}

/// A file in memory of `len` bytes, a multiple of the page size.
#[cfg(not(miri))]
fn memory(len: usize, page: PageSize) -> Result<OwnedFd, Error> {
    let os = |what| move |source| Error::Os { what, len, source };
    let kind = match page {
        PageSize::Small => MFdFlags::empty(),
        PageSize::Huge2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        PageSize::Huge1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | kind;
    let fd = memfd_create("polldisk", flags).map_err(os("memfd_create"))?;
    nix::unistd::ftruncate(&fd, len as i64).map_err(os("ftruncate"))?;
    // A peer that is given the descriptor could else shorten the file: an access past its end
    // kills the process.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(os("sealing a memfd"))?;
    Ok(fd)
}

/// Miri knows no files in memory: any descriptor, and [`Region::map`] takes other memory.
#[cfg(miri)]
fn memory(len: usize, _page: PageSize) -> Result<OwnedFd, Error> {
    let made = nix::sys::eventfd::EventFd::new();
    made.map(OwnedFd::from).map_err(|source| Error::Os { what: "eventfd", len, source })
}

/// No region is shorter: one page.
const MIN_LEN: usize = 4096;

impl Drop for Region {
    fn drop(&mut self) {
        if self.users {
            // What users did to the memory was before this, for whoever finds it unused.
            self.mapping.used.store(false, Ordering::Release);
            GONE.fetch_add(1, Ordering::Release);
        }
    }
}

/// Counts regions that have lost their last user.
static GONE: AtomicU32 = AtomicU32::new(0);

/// A number that changes when a region loses its last user: as long as it does not, a table in which
/// no such region was found has none.
pub(crate) fn gone() -> u32 {
    GONE.load(Ordering::Acquire)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nobody holds the region.
        let done = unsafe { nix::sys::mman::munmap(self.base.0.cast(), self.len) };
        debug_assert!(done.is_ok());
        self.id.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri's regions are no files")]
    fn who_has_the_descriptor_cannot_take_memory_away() {
        let region = Region::new(8192, PageSize::Small).unwrap();
        for len in [0, 4096, 16384] {
            assert_eq!(nix::unistd::ftruncate(region.fd(), len), Err(nix::Error::EPERM));
        }
        region.write(8191, &[1]);
    }

    #[cfg(not(miri))]
    fn passed(region: &Region) -> OwnedFd {
        region.fd().try_clone_to_owned().unwrap()
    }

    #[test]
    #[cfg(not(miri))]
    fn a_peers_memory_is_the_same_memory() {
        let ours = Region::new(3 << 12, PageSize::Small).unwrap();
        let theirs = Region::from_peer(passed(&ours), 4096, 8192).unwrap();
        assert_eq!((theirs.len(), theirs.page_size()), (8192, PageSize::Small));
        assert_ne!(ours.id(), theirs.id());
        ours.write(4096, &[1, 2, 3]);
        theirs.write(8191, &[9]);
        let mut bytes = [0; 3];
        theirs.read(0, &mut bytes);
        assert_eq!(bytes, [1, 2, 3]);
        ours.read((3 << 12) - 1, &mut bytes[..1]);
        assert_eq!(bytes[0], 9);
    }

    #[test]
    #[cfg(not(miri))]
    fn parts_that_a_peer_has_not_are_refused() {
        let ours = Region::new(8192, PageSize::Small).unwrap();
        for (offset, len) in [
            (0, 0),
            (0, 12288),
            (4096, 8192),
            (8192, 4096),
            (1, 4096),
            (0, 100),
            (u64::MAX - 4095, 4096),
            (0, u64::MAX - 4095),
            (1 << 63, 4096),
        ] {
            let e = Region::from_peer(passed(&ours), offset, len).unwrap_err();
            assert!(matches!(e, Error::Outside { size: 8192, .. }), "{offset} {len}: {e}");
        }
    }

    #[test]
    #[cfg(not(miri))]
    fn memory_that_a_peer_could_take_away_is_refused() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let loose = memfd_create("loose", flags).unwrap();
        nix::unistd::ftruncate(&loose, 4096).unwrap();
        let copy = loose.try_clone().unwrap();
        assert!(matches!(Region::from_peer(copy, 0, 4096), Err(Error::NotSealed(_))));
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(matches!(Region::from_peer(pipe, 0, 4096), Err(Error::NotSealed(_))));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(matches!(Region::from_peer(file.into(), 0, 4096), Err(Error::NotSealed(_))));
        // May not be shortened, but not be written either: nothing that is no region.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE;
        fcntl(&loose, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        assert!(matches!(Region::from_peer(loose, 0, 4096), Err(Error::Os { what: "mmap", .. })));
    }

    #[test]
    fn absurd_lengths_are_refused() {
        assert!(matches!(Region::new(0, PageSize::Small), Err(Error::Length(_))));
        assert!(matches!(Region::new(usize::MAX, PageSize::Small), Err(Error::Length(_))));
    }

    #[test]
    fn best_falls_back_to_small_pages() {
        let region = Region::new_best(3 << 20).unwrap();
        region.write(region.len() - 1, &[7]);
        let mut last = [0];
        region.read(region.len() - 1, &mut last);
        assert_eq!(last, [7]);
    }

    #[test]
    #[cfg(not(miri))]
    fn a_lazy_region_takes_pages_when_they_are_touched() {
        let blocks = |r: &Region| nix::sys::stat::fstat(r.fd()).unwrap().st_blocks;
        let (lazy, other) =
            (Region::new_lazy(64 << 10).unwrap(), Region::new_best(64 << 10).unwrap());
        assert!(lazy.is_lazy() && !other.is_lazy());
        assert_eq!((blocks(&lazy), blocks(&other)), (0, 128));
        lazy.write(5000, &[7]);
        assert_eq!(blocks(&lazy), 8);
        let mut read = [1; 2];
        lazy.read(5000, &mut read);
        assert_eq!(read, [7, 0]);
    }

    #[test]
    fn segments_lie_inside() {
        let region = Region::new(4096, PageSize::Small).unwrap();
        assert!(region.seg(0, 4096).is_some());
        assert!(region.seg(1, 4096).is_none());
        assert!(region.seg(u64::MAX, 1).is_none());
    }
}
