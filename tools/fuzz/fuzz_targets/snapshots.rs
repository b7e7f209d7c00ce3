//! Fuzz target: the snapshot table, shown and edited.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::snapshots(data);
});
