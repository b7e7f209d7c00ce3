//! Tests of [`Header`].

use super::*;

fn sample(version: u32) -> Header {
    let mut h = Header::new(&Geometry::new(version, 16, 4, 1 << 30).unwrap());
    h.l1_size = 2;
    h.l1_table_offset = 0x3_0000;
    h.refcount_table_offset = 0x1_0000;
    h.refcount_table_clusters = 1;
    h
}

fn with(version: u32, at: usize, bytes: &[u8]) -> Result<Header, FieldError> {
    let mut b = sample(version).encode().unwrap();
    b.resize(65536, 0);
    b[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&b)
}

#[test]
fn round_trip_keeps_everything() {
    for version in [2, 3] {
        let mut h = sample(version);
        h.extensions.push(Extension { kind: ext::BACKING_FORMAT, data: b"raw".to_vec() });
        if version == 3 {
            h.add_feature_names();
            h.incompatible_features = incompatible::COMPRESSION | incompatible::DIRTY;
            h.compression = Compression::Zstd;
            h.autoclear_features = 1 << 40;
            h.header_length = 128;
            h.tail = (0..128 - 105).collect();
        }
        h.extensions.push(Extension { kind: 0x1234_5678, data: vec![7; 13] });
        h.backing_name = Some(b"dir/base.raw".to_vec());
        let mut bytes = h.encode().unwrap();
        bytes.resize(65536, 0);
        let back = Header::parse(&bytes).unwrap();
        assert_eq!(back, h);
        assert_eq!(back.backing_format().as_deref(), Some("raw"));
    }
}

#[test]
fn short_version_3_header_without_compression_type() {
    let mut h = sample(3);
    h.header_length = 104;
    h.tail.clear();
    let mut bytes = h.encode().unwrap();
    bytes.resize(512, 0);
    assert_eq!(Header::parse(&bytes).unwrap(), h);
}

#[test]
fn each_impossible_field_is_named_with_offset_value_and_range() {
    let text = |r: Result<Header, FieldError>| r.unwrap_err().to_string();
    let be = u32::to_be_bytes;
    assert_eq!(
        text(with(3, 20, &be(40))),
        "header field cluster_bits at offset 20 is 40; 9 to 21 are possible"
    );
    assert_eq!(
        text(with(3, 0, b"QFI\0")),
        "header field magic at offset 0 is 0x51464900; 0x514649fb (\"QFI\\xfb\") marks a QCOW2 image"
    );
    assert_eq!(
        text(with(3, 4, &be(4))),
        "header field version at offset 4 is 4; 2 and 3 are possible"
    );
    assert_eq!(
        text(with(3, 96, &be(7))),
        "header field refcount_order at offset 96 is 7; 0 to 6 are possible"
    );
    for len in [0u32, 100, 108, 65544, u32::MAX] {
        assert_eq!(
            text(with(3, 100, &be(len))),
            format!(
                "header field header_length at offset 100 is {len}; \
                 multiples of 8 from 104 to 65536 are possible"
            )
        );
    }
    assert_eq!(
        text(with(3, 24, &u64::MAX.to_be_bytes())),
        "header field size at offset 24 is 18446744073709551615; sizes below 2^63 are possible"
    );
    assert_eq!(
        text(with(3, 24, &(1u64 << 62).to_be_bytes())),
        "header field l1_size at offset 36 is 2; \
         a disk of 4611686018427387904 bytes needs at least 8589934592 entries"
    );
    assert_eq!(
        text(with(3, 36, &be(u32::MAX))),
        "header field l1_size at offset 36 is 4294967295; \
         at most 4194304 entries (32 MiB) are possible"
    );
    assert_eq!(
        text(with(2, 56, &be(129))),
        "header field refcount_table_clusters at offset 56 is 129; \
         at most 128 clusters (8 MiB) are possible"
    );
    assert_eq!(
        text(with(2, 60, &be(65537))),
        "header field nb_snapshots at offset 60 is 65537; at most 65536 are possible"
    );
    assert_eq!(
        text(with(3, 32, &be(3))),
        "header field crypt_method at offset 32 is 3; 0 (none), 1 (AES) and 2 (LUKS) are defined"
    );
    assert_eq!(
        text(with(3, 104, &[1])),
        "header field compression_type at offset 104 is 1; \
         0 (deflate) is possible when the compression type feature bit is not set"
    );
    assert_eq!(
        text(with(3, 72, &(incompatible::COMPRESSION).to_be_bytes())),
        "header field compression_type at offset 104 is 0; \
         1 (zstd) is possible when the compression type feature bit is set"
    );
    assert_eq!(
        text(with(2, 8, &71u64.to_be_bytes())),
        "header field backing_file_offset at offset 8 is 71; 0 (none) and 72 to 65536 are possible"
    );
    let mut name = [0; 12];
    name[..8].copy_from_slice(&65500u64.to_be_bytes());
    name[8..].copy_from_slice(&be(37));
    assert_eq!(
        text(with(2, 8, &name)),
        "header field backing_file_size at offset 16 is 37; a name of at most 36 bytes is possible"
    );
    name[..8].copy_from_slice(&2048u64.to_be_bytes());
    name[8..].copy_from_slice(&be(1024));
    assert_eq!(
        text(with(2, 8, &name)),
        "header field backing_file_size at offset 16 is 1024; \
         a name of at most 1023 bytes is possible"
    );
    assert_eq!(Header::parse(b"QFI").unwrap_err().found, "too short for a QCOW2 header");
}

#[test]
fn extensions_are_bounded_and_known_ones_come_once() {
    let mut twice = Vec::new();
    for _ in 0..2 {
        twice.extend_from_slice(&ext::BACKING_FORMAT.to_be_bytes());
        twice.extend_from_slice(&3u32.to_be_bytes());
        twice.extend_from_slice(b"raw\0\0\0\0\0");
    }
    assert_eq!(
        with(3, 112, &twice).unwrap_err().to_string(),
        "header extension type at offset 128 is 0xe2792aca (backing format) a second time; \
         each known type may appear once"
    );
    let mut long = 0x1111_1111u32.to_be_bytes().to_vec();
    long.extend_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(
        with(3, 112, &long).unwrap_err().to_string(),
        "length of header extension 0x11111111 at offset 116 is 4294967295; \
         65416 bytes are left for it"
    );
}

#[test]
fn unknown_incompatible_bits_are_named() {
    let mut h = sample(3);
    h.incompatible_features = (1 << 17) | (1 << 63) | incompatible::DIRTY;
    let data = FeatureName::encode(&[(0, 17, "frobs"), (1, 63, "other set")]);
    h.extensions.push(Extension { kind: ext::FEATURE_NAMES, data });
    assert_eq!(h.unknown_incompatible(), ["no. 17 (\"frobs\")", "no. 63"]);
}

#[test]
fn a_header_that_does_not_fit_is_an_error() {
    let mut h = Header::new(&Geometry::new(3, 9, 4, 512).unwrap());
    h.backing_name = Some(vec![b'x'; 600]);
    assert_eq!(
        h.encode().unwrap_err().to_string(),
        "header with its extensions and the backing file name at offset 0 is 720 bytes long; \
         a cluster holds 512"
    );
}

#[test]
fn features_that_change_the_sizes() {
    let g = Geometry::new(3, 16, 4, 1 << 30).unwrap();
    let g = g.with_extended_l2(true).unwrap().with_data_file(true);
    let mut h = Header { l1_size: g.l1_entries() as u32, ..Header::new(&g) };
    assert_eq!((h.l1_size, h.geometry()), (4, g));
    assert_eq!(h.data_file_name(), None);
    h.extensions.push(Extension { kind: ext::DATA_FILE, data: b"data".to_vec() });
    assert_eq!(h.data_file_name(), Some(&b"data"[..]));
    h.l1_size -= 1;
    let text = |h: &Header| {
        let mut bytes = h.encode().unwrap();
        bytes.resize(65536, 0);
        Header::parse(&bytes).unwrap_err().to_string()
    };
    assert!(text(&h).ends_with("a disk of 1073741824 bytes needs at least 4 entries"));
    (h.cluster_bits, h.l1_size) = (13, 1 << 20);
    assert_eq!(
        text(&h),
        "header field cluster_bits at offset 20 is 13; 14 to 21 are possible with extended L2 entries"
    );
    let mut h = sample(3);
    h.autoclear_features = autoclear::RAW_DATA;
    assert_eq!(
        text(&h),
        "header field autoclear_features at offset 88 is 0x2; bit 1 (raw external data) is possible \
         with an external data file"
    );
}
