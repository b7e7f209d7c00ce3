//! Fuzz target: L1 and L2 tables, read through the blocking reader.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::tables(data);
});
