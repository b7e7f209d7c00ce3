//! Fuzz target: VHD files: check, chain, reader.

#![no_main]

libfuzzer_sys::fuzz_target!(init: polldisk_fuzz::limit_memory(), |data: &[u8]| {
    polldisk_fuzz::vhd(data);
});
