//! Hints about this process's own memory, which change no byte of it.

/// Has the processor fetch the line in which a value begins, without waiting for it: for what is looked at
/// soon and is likely to be far away.
#[inline(always)]
pub fn prefetch<T>(at: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees, and faults nowhere; the address is that
        // of a live value.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Asks the kernel for pages of 2 MiB where `memory` is first touched from now on, so that addresses all over
/// it are found without a walk. Where it has none, or is not asked (`transparent_hugepage/enabled` is
/// `never`), pages are what they always were.
pub fn prefer_huge_pages<T>(memory: &[T]) {
    #[cfg(not(miri))]
    {
        use nix::sys::mman::{MmapAdvise, madvise};
        const PAGE: usize = 4096;
        let all = memory.as_ptr_range();
        let skip = all.start.addr().next_multiple_of(PAGE) - all.start.addr();
        let len = std::mem::size_of_val(memory).saturating_sub(skip) / PAGE * PAGE;
        let start = all.start.wrapping_byte_add(skip).cast_mut().cast();
        if let (Some(start), true) = (std::ptr::NonNull::new(start), len > 0) {
            // SAFETY: whole pages within a live slice; the advice changes no byte, only what backs them.
            let advised = unsafe { madvise(start, len, MmapAdvise::MADV_HUGEPAGE) };
            if let Err(e) = advised {
                log::debug!("the kernel has no large pages for {len} bytes: {e}");
            }
        }
    }
    #[cfg(miri)]
    let _ = memory;
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_changes() {
        for len in [0, 1, 1000, 1 << 20] {
            let words = vec![7u64; len];
            super::prefer_huge_pages(&words);
            super::prefer_huge_pages(&words[len / 2..]);
            words.iter().for_each(super::prefetch);
            assert!(words.iter().all(|&w| w == 7));
        }
    }
}
