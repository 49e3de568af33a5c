#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| esplane_tests::fuzz::aead_aesni(data));
