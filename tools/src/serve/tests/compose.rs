//! What a migration received is put together.

use node::Notify;
use serde_json::json;

use super::repository::{Rig, SR};
use super::*;

#[test]
fn what_was_written_since_is_put_on_what_there_was() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    // What there was; and what was written since, which begins as a snapshot of nothing.
    let [before, since] = [ours.disk(SIZE), ours.disk(SIZE)];
    let of = |key: &str| json!({"sr": SR, "key": key});
    let dummy = ours.smapi("Volume.snapshot", of(&since))["key"].as_str().unwrap().to_owned();
    let mut guest = rig.guest(&ours, 3, &before);
    (0..4).for_each(|n| guest.write(n * 256, 1, 4096));
    let composed = json!({"sr": SR, "key": since, "key2": before});
    let refused =
        |args: &Value| ours.asked("Volume.compose", args.clone())["error"]["code"].clone();
    assert_eq!(refused(&composed), "SR_BACKEND_FAILURE_24", "a guest has the lower one");
    rig.unplug(&ours, guest, &before);
    let mut guest = rig.guest(&ours, 3, &since);
    guest.write(256, 2, 4096);
    assert_eq!(refused(&composed), "SR_BACKEND_FAILURE_24", "a guest has the upper one");
    rig.unplug(&ours, guest, &since);
    assert!(
        refused(&json!({"sr": SR, "key": before, "key2": since})).is_string(),
        "the wrong way round"
    );
    assert!(refused(&json!({"sr": SR, "key": since, "key2": "nobody"})).is_string());

    ours.smapi("Volume.compose", composed);
    ours.smapi("Volume.destroy", of(&dummy));
    assert!(ours.asked("Volume.stat", of(&before))["error"].is_object());
    ours.stop();
    let ours = rig.world.serve(1, Notify::Thread);
    let mut guest = rig.guest(&ours, 3, &since);
    for (n, byte) in [(0, 1), (1, 2), (2, 1), (3, 1)] {
        guest.expect(n * 256, byte, 4096);
    }
    rig.unplug(&ours, guest, &since);
    ours.stop();
    assert_eq!(rig.volumes().len(), 2);
    rig.check();
}
