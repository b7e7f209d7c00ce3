//! A hint about this process's own memory, which changes no byte of it.

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

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_changes() {
        let words = vec![7u64; 1000];
        words.iter().for_each(super::prefetch);
        assert!(words.iter().all(|&w| w == 7));
    }
}
