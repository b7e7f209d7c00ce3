//! Migration of storage.

use std::process::Command;

use serde_json::json;

use super::{Host, SR};

/// As xapi migrates a running guest's disk: to an address of NBD, here another disk of the same daemon,
/// whose system calls are limited.
#[test]
fn a_disk_is_mirrored_while_it_is_written_to() {
    let Some(host) = Host::new() else { return };
    let path = host.dir.path().join("drive");
    std::fs::File::create(&path).unwrap().set_len(200 << 20).unwrap();
    let config = json!({"device": path.to_str().unwrap()});
    let new = json!({"uuid": SR, "configuration": config, "name": "", "description": ""});
    host.ok("SR.create", new);
    host.ok("SR.attach", json!({"configuration": config}));
    let query = host.ok("Plugin.query", json!({}));
    assert!(query["features"].as_array().unwrap().contains(&json!("VDI_MIRROR")));
    let query = host.datapath("Plugin.query", json!({}));
    assert_eq!(query["features"], json!(["VDI_MIRROR_IN"]));
    let make = |domain: &str| {
        let new =
            json!({"sr": SR, "name": "", "description": "", "size": 32 << 20, "sharable": false});
        let key = host.ok("Volume.create", new)["key"].as_str().unwrap().to_owned();
        let args = json!({"uri": format!("fast://{SR}/{key}"), "domain": domain});
        let answer = host.datapath("Datapath.attach", args.clone());
        host.datapath("Datapath.activate", args.clone());
        let nbd = answer["implementations"][1][1]["uri"].as_str().unwrap();
        let parts = nbd.strip_prefix("nbd:unix:").unwrap().split_once(":exportname=");
        let (socket, export) = parts.unwrap();
        (args, format!("nbd+unix:///{export}?socket={socket}"))
    };
    let (source, from) = make("7");
    let (target, to) = make("mirror_of_a_vm");
    let write = |what: &str| {
        let out = Command::new("qemu-io").args(["-f", "raw", &from, "-c", what]).output().ok()?;
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(())
    };
    if write("write -P 7 1M 3M").is_none() {
        println!("skipped: qemu-io is not installed");
        return;
    }
    let mut args = source.clone();
    args["remote"] = json!(to);
    let operation = host.datapath("Data.mirror", args);
    assert_eq!(operation[0], "MirrorV1");
    let stat = || {
        let state = host.datapath("Data.stat", json!({"operation": operation}));
        assert_eq!(state["failed"], false, "{state}");
        assert!(state["progress"].is_number());
        state["complete"] == true
    };
    write("write -P 8 2M 100k");
    while !stat() {}
    write("write -P 9 20M 5k");
    write("write -z 1M 64k");
    assert_eq!(host.datapath("Data.ls", json!({})), json!([operation]));
    host.datapath("Datapath.deactivate", source.clone());
    assert!(stat(), "it has ended well");
    host.datapath("Datapath.activate", source.clone());
    let mut compare = Command::new("qemu-img");
    let compared =
        compare.args(["compare", "-f", "raw", "-F", "raw", &from, &to]).output().unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    host.datapath("Data.destroy", json!({"operation": operation}));
    assert_eq!(host.datapath("Data.ls", json!({})), json!([]));
    let socket = host.datapath("Datapath.import_activate", target);
    assert!(std::os::unix::net::UnixStream::connect(socket.as_str().unwrap()).is_ok());
    let mut network = source;
    network["remote"] = json!("nbd://127.0.0.1:9/");
    host.code("../../datapath/fast/Data.mirror", network);
}
