//! What `image info` prints, with the field names of `qemu-img info --output=json`.

use block::Storage;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::format::Snapshot;
use crate::open::{Chain, Layer, LayerKind, read_snapshots};

/// An image's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// The file's name.
    pub filename: String,
    /// Bytes of a cluster; none for raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// "qcow2" or "raw".
    pub format: &'static str,
    /// Bytes that the file takes on its disk, if the caller knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// The backing file's name as it stands in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Where that leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format as the image states it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// Whether the image was not closed cleanly and needs repair.
    pub dirty_flag: bool,
}

/// What only this format has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FormatSpecific {
    /// "qcow2".
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The fields.
    pub data: Qcow2Info,
}

/// What only QCOW2 has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// "0.10" for version 2, "1.1" for version 3.
    pub compat: &'static str,
    /// "zlib" or "zstd".
    pub compression_type: &'static str,
    /// Whether refcounts may be written late; version 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Persistent bitmaps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<crate::BitmapInfo>,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// The external data file's name as it stands in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether the external data file is the guest's disk by itself, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Whether the image is marked corrupt; version 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether L2 entries have subclusters; version 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Unique ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// How long the guest had run: seconds.
    pub vm_clock_sec: u64,
    /// The nanoseconds of that second.
    pub vm_clock_nsec: u64,
    /// Count of executed instructions, if it was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

impl From<Snapshot> for SnapshotInfo {
    fn from(s: Snapshot) -> SnapshotInfo {
        SnapshotInfo {
            id: s.id,
            name: s.name,
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec,
            date_nsec: s.date_nsec,
            vm_clock_sec: s.vm_clock_nsec / 1_000_000_000,
            vm_clock_nsec: s.vm_clock_nsec % 1_000_000_000,
            icount: s.icount,
        }
    }
}

impl Info {
    /// Describes a layer. `actual_size` is what the file takes on its disk, if known.
    ///
    /// # Errors
    /// If the snapshot table cannot be read.
    pub fn of<S: Storage>(layer: &mut Layer<S>, actual_size: Option<u64>) -> Result<Info> {
        let mut info = Info {
            virtual_size: layer.size(),
            filename: layer.name.clone(),
            cluster_size: None,
            format: layer.format().name(),
            actual_size,
            format_specific: None,
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            snapshots: Vec::new(),
            dirty_flag: false,
        };
        let LayerKind::Qcow2(image) = &layer.kind else { return Ok(info) };
        let header = &image.header;
        let v3 = header.version >= 3;
        let (snapshots, _) = read_snapshots(&mut layer.storage, &layer.name, header)?;
        info.snapshots = snapshots.into_iter().map(SnapshotInfo::from).collect();
        info.cluster_size = Some(image.geometry.cluster_size());
        info.dirty_flag = header.is_dirty();
        info.format_specific = Some(FormatSpecific {
            kind: "qcow2",
            data: Qcow2Info {
                compat: if v3 { "1.1" } else { "0.10" },
                compression_type: header.compression.name(),
                lazy_refcounts: v3.then(|| header.lazy_refcounts()),
                bitmaps: crate::bitmaps::list(&mut layer.storage, &layer.name, header)?,
                refcount_bits: 1 << header.refcount_order,
                data_file: header
                    .data_file_name()
                    .map(|name| String::from_utf8_lossy(name).into_owned()),
                data_file_raw: header.has_data_file().then(|| header.raw_data()),
                corrupt: v3.then(|| header.is_corrupt()),
                extended_l2: v3.then(|| header.extended_l2()),
            },
        });
        info.backing_filename =
            header.backing_name.as_ref().map(|n| String::from_utf8_lossy(n).into_owned());
        info.backing_filename_format = header.backing_format();
        info.full_backing_filename =
            layer.backing.as_ref().map(|b| b.path.to_string_lossy().into_owned());
        Ok(info)
    }

    /// Describes every layer of a chain, as `info --backing-chain` does. `actual_size` is asked
    /// for each layer's.
    ///
    /// # Errors
    /// If a snapshot table cannot be read.
    pub fn of_chain<S: Storage>(
        chain: &mut Chain<S>,
        actual_size: &mut dyn FnMut(&Layer<S>) -> Option<u64>,
    ) -> Result<Vec<Info>> {
        let mut all = Vec::with_capacity(chain.layers.len());
        for layer in &mut chain.layers {
            let actual = actual_size(layer);
            all.push(Info::of(layer, actual)?);
        }
        Ok(all)
    }
}
