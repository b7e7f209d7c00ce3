//! The kernel's interface as it stands in `xen/gntdev.h` and `xen/evtchn.h`: numbers and layouts. Pure;
//! fields have the kernel's names. A test compares all of it with the headers.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Defines structures that are passed to the kernel as they are, with their sizes.
macro_rules! kernel {
    ($($(#[doc = $doc:literal])* $name:ident($size:literal) { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

kernel! {
    /// `ioctl_gntdev_grant_ref`
    GrantRef(8) { domid: u32, reference: u32 }
    /// `ioctl_gntdev_map_grant_ref` without the references that follow
    MapGrantRef(16) { count: u32, pad: u32, index: u64 }
    /// `ioctl_gntdev_unmap_grant_ref`
    UnmapGrantRef(16) { index: u64, count: u32, pad: u32 }
    /// `gntdev_grant_copy_segment`; each side is an address here, or what [`foreign`] makes
    CopySegment(24) { source: u64, dest: u64, len: u16, flags: u16, status: i16, pad: u16 }
    /// `ioctl_gntdev_grant_copy`
    GrantCopy(16) { count: u32, pad: u32, segments: u64 }
    /// `ioctl_evtchn_bind_interdomain`
    BindInterdomain(8) { remote_domain: u32, remote_port: u32 }
    /// `ioctl_evtchn_unbind` and `ioctl_evtchn_notify`
    Port(4) { port: u32 }
}

/// `_IOC(_IOC_NONE, kind, nr, size)`
const fn ioc(kind: u8, nr: u32, size: usize) -> u32 {
    (size as u32) << 16 | (kind as u32) << 8 | nr
}

/// The size counts one reference.
pub(crate) const MAP_GRANT_REF: u32 = ioc(b'G', 0, 24);
pub(crate) const UNMAP_GRANT_REF: u32 = ioc(b'G', 1, size_of::<UnmapGrantRef>());
pub(crate) const GRANT_COPY: u32 = ioc(b'G', 8, size_of::<GrantCopy>());
pub(crate) const BIND_INTERDOMAIN: u32 = ioc(b'E', 1, size_of::<BindInterdomain>());
pub(crate) const UNBIND: u32 = ioc(b'E', 3, size_of::<Port>());
pub(crate) const NOTIFY: u32 = ioc(b'E', 4, size_of::<Port>());
pub(crate) const RESET: u32 = ioc(b'E', 5, 0);

/// `GNTCOPY_source_gref`
pub(crate) const SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`
pub(crate) const DEST_GREF: u16 = 2;

/// `GNTST_okay`
pub(crate) const GNTST_OKAY: i16 = 0;
/// `GNTST_general_error`
pub(crate) const GNTST_GENERAL_ERROR: i16 = -1;
/// `GNTST_bad_copy_arg`
pub(crate) const GNTST_BAD_COPY_ARG: i16 = -10;

/// Size of a page of Xen's, whatever the kernel's is.
pub(crate) const PAGE: usize = 4096;

/// The side of a copy that a guest granted: reference, offset in the page, domain.
pub(crate) const fn foreign(reference: u32, offset: u16, domid: u16) -> u64 {
    reference as u64 | (offset as u64) << 32 | (domid as u64) << 48
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use std::process::Command;

    /// What a C compiler makes of the kernel's headers, one figure a line, in the order of `ours`.
    const PROGRAM: &str = r#"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
/* The headers use these and do not define them. */
typedef uint32_t grant_ref_t;
typedef uint16_t domid_t;
#include <xen/gntdev.h>
#include <xen/evtchn.h>
#define SHOW(x) printf("%lld\n", (long long)(x))
#define MAP struct ioctl_gntdev_map_grant_ref
#define UNMAP struct ioctl_gntdev_unmap_grant_ref
#define SEGMENT struct gntdev_grant_copy_segment
#define COPY struct ioctl_gntdev_grant_copy
#define BIND struct ioctl_evtchn_bind_interdomain
int main(void) {
    SHOW(IOCTL_GNTDEV_MAP_GRANT_REF); SHOW(IOCTL_GNTDEV_UNMAP_GRANT_REF);
    SHOW(IOCTL_GNTDEV_GRANT_COPY); SHOW(IOCTL_EVTCHN_BIND_INTERDOMAIN);
    SHOW(IOCTL_EVTCHN_UNBIND); SHOW(IOCTL_EVTCHN_NOTIFY); SHOW(IOCTL_EVTCHN_RESET);
    SHOW(sizeof(struct ioctl_gntdev_grant_ref)); SHOW(offsetof(struct ioctl_gntdev_grant_ref, ref));
    SHOW(offsetof(MAP, refs)); SHOW(offsetof(MAP, index));
    SHOW(sizeof(UNMAP)); SHOW(offsetof(UNMAP, index)); SHOW(offsetof(UNMAP, count));
    SHOW(sizeof(SEGMENT)); SHOW(offsetof(SEGMENT, source)); SHOW(offsetof(SEGMENT, dest));
    SHOW(offsetof(SEGMENT, len)); SHOW(offsetof(SEGMENT, flags)); SHOW(offsetof(SEGMENT, status));
    SEGMENT s = {0};
    s.source.foreign.ref = 0x01020304; s.source.foreign.offset = 0x0506; s.source.foreign.domid = 0x0708;
    SHOW((uint64_t)(uintptr_t)s.source.virt);
    SHOW(sizeof(COPY)); SHOW(offsetof(COPY, count)); SHOW(offsetof(COPY, segments));
    SHOW(sizeof(BIND)); SHOW(offsetof(BIND, remote_domain)); SHOW(offsetof(BIND, remote_port));
    SHOW(sizeof(struct ioctl_evtchn_unbind)); SHOW(sizeof(struct ioctl_evtchn_notify));
    return 0;
}
"#;

    fn ours() -> Vec<i64> {
        let size = |n: usize| n as i64;
        vec![
            MAP_GRANT_REF.into(),
            UNMAP_GRANT_REF.into(),
            GRANT_COPY.into(),
            BIND_INTERDOMAIN.into(),
            UNBIND.into(),
            NOTIFY.into(),
            RESET.into(),
            size(size_of::<GrantRef>()),
            size(offset_of!(GrantRef, reference)),
            size(size_of::<MapGrantRef>()),
            size(offset_of!(MapGrantRef, index)),
            size(size_of::<UnmapGrantRef>()),
            size(offset_of!(UnmapGrantRef, index)),
            size(offset_of!(UnmapGrantRef, count)),
            size(size_of::<CopySegment>()),
            size(offset_of!(CopySegment, source)),
            size(offset_of!(CopySegment, dest)),
            size(offset_of!(CopySegment, len)),
            size(offset_of!(CopySegment, flags)),
            size(offset_of!(CopySegment, status)),
            foreign(0x0102_0304, 0x0506, 0x0708) as i64,
            size(size_of::<GrantCopy>()),
            size(offset_of!(GrantCopy, count)),
            size(offset_of!(GrantCopy, segments)),
            size(size_of::<BindInterdomain>()),
            size(offset_of!(BindInterdomain, remote_domain)),
            size(offset_of!(BindInterdomain, remote_port)),
            size(size_of::<Port>()),
            size(size_of::<Port>()),
        ]
    }

    #[test]
    fn as_the_headers_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let (source, program) = (dir.path().join("abi.c"), dir.path().join("abi"));
        std::fs::write(&source, PROGRAM).unwrap();
        if !std::path::Path::new("/usr/include/xen/gntdev.h").exists() {
            println!("skipped: no xen/gntdev.h (Debian: linux-libc-dev)");
            return;
        }
        let made = Command::new("cc").arg(&source).arg("-o").arg(&program).output();
        let Ok(made) = made else {
            println!("skipped: no C compiler");
            return;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let text = Command::new(&program).output().unwrap().stdout;
        let theirs: Vec<i64> =
            String::from_utf8(text).unwrap().lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(ours(), theirs);
    }

    /// So that there is a check where no header is.
    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!((MAP_GRANT_REF, UNMAP_GRANT_REF, GRANT_COPY), (0x18_4700, 0x10_4701, 0x10_4708));
        assert_eq!((BIND_INTERDOMAIN, UNBIND), (0x08_4501, 0x04_4503));
        assert_eq!((NOTIFY, RESET), (0x04_4504, 0x4505));
    }
}
