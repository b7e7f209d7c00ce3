//! Fuzz target: the directory of persistent bitmaps.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::bitmaps(data);
});
