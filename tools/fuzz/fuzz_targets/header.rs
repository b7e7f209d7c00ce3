//! Fuzz target: the QCOW2 header and its extensions.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::header(data);
});
