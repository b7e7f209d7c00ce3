//! Fuzz target: compressed clusters, unpacked and packed.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::compressed(data);
});
