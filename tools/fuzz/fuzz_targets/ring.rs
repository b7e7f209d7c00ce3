//! Fuzz target: a guest's ring, the pages that it grants, and a disk that fails.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::ring(data);
});
