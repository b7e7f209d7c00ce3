//! Fuzz target: guests on changed images, through the real datapath.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::image(data);
});
