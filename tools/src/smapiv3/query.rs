//! What the plugins say of themselves: `Plugin.query`.

use serde_json::{Value, json};

use super::Kind;
use crate::serve::REPOSITORY_TYPE;

/// Methods of the volume plugin, beside `Plugin.query`.
pub(super) const VOLUME: [&str; 25] = [
    "SR.probe",
    "SR.create",
    "SR.attach",
    "SR.detach",
    "SR.destroy",
    "SR.stat",
    "SR.set_name",
    "SR.set_description",
    "SR.ls",
    "Volume.create",
    "Volume.snapshot",
    "Volume.clone",
    "Volume.destroy",
    "Volume.revert",
    "Volume.compose",
    "Volume.resize",
    "Volume.set",
    "Volume.unset",
    "Volume.set_name",
    "Volume.set_description",
    "Volume.stat",
    "Volume.enable_cbt",
    "Volume.disable_cbt",
    "Volume.data_destroy",
    "Volume.list_changed_blocks",
];

/// Methods of the datapath plugin, beside `Plugin.query`.
pub(super) const DATAPATH: [&str; 11] = [
    "Datapath.attach",
    "Datapath.activate",
    "Datapath.activate_readonly",
    "Datapath.deactivate",
    "Datapath.detach",
    "Datapath.import_activate",
    "Data.mirror",
    "Data.stat",
    "Data.cancel",
    "Data.destroy",
    "Data.ls",
];

/// What the volume plugin can do that is not seen from its methods.
const FEATURES: [&str; 8] = [
    "VDI_RESIZE_ONLINE",
    "VDI_REVERT",
    "VDI_COMPOSE",
    "VDI_CONFIG_CBT",
    "VDI_MIRROR",
    "VDI_MIRROR_IN",
    "LARGE_VDI",
    "THIN_PROVISIONING",
];

/// The answer.
pub(super) fn answer(kind: Kind) -> Value {
    let features: &[&str] = match kind {
        Kind::Volume => &FEATURES,
        Kind::Datapath => &["VDI_MIRROR_IN"],
    };
    json!({
        "plugin": REPOSITORY_TYPE,
        "name": "polldisk",
        "description": "Disks in volume groups of LVM2 on drives that polldisk polls itself",
        "vendor": "polldisk",
        "copyright": "MIT OR Apache-2.0",
        "version": env!("CARGO_PKG_VERSION"),
        "required_api_version": "5.0",
        "features": features,
        "configuration": {
            "device": "A block node, or several with commas between: all of the repository's devices",
            "stripes": "On how many devices each volume lies in stripes (optional; 1)",
        },
        "required_cluster_stack": [],
    })
}
