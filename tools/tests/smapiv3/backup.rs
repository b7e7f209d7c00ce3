//! Backups by clients of NBD.

use std::process::Command;

use serde_json::{Value, json};

use super::{Host, SR, device};

/// Runs a client; `None`, with the reason on the output: it is not there.
fn run(program: &str, args: &[&str]) -> Option<String> {
    let Ok(out) = Command::new(program).args(args).output() else {
        println!("skipped: {program} is not installed");
        return None;
    };
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {said}");
    Some(String::from_utf8(out.stdout).unwrap())
}

/// A backup program that knows NBD and nothing of us: a full backup, and one of what has changed since, for which
/// nothing but the record of the first snapshot is left.
#[test]
fn an_incremental_backup_by_nbd() {
    let Some(host) = Host::new() else { return };
    let config = device(&host.dir.path().join("disk"));
    let new = json!({"uuid": SR, "configuration": config, "name": "", "description": ""});
    host.ok("SR.create", new);
    host.ok("SR.attach", json!({"configuration": config}));
    let new =
        json!({"sr": SR, "name": "d", "description": "", "size": 64 << 20, "sharable": false});
    let disk = host.ok("Volume.create", new)["key"].clone();
    let of = |method: &str, key: &Value| {
        host.ok(&format!("Volume.{method}"), json!({"sr": SR, "key": key}))
    };
    of("enable_cbt", &disk);
    // By NBD, while somebody has it.
    let with = |key: &Value, f: &mut dyn FnMut(&str, &str)| {
        let key = key.as_str().unwrap();
        let domain = json!({"uri": format!("fast://{SR}/{key}"), "domain": "u0_vbd"});
        host.datapath("Datapath.activate", domain.clone());
        let socket = host.dir.path().join(format!("run/state/nbd/{key}"));
        let socket = socket.to_str().unwrap();
        f(&format!("nbd+unix:///{key}?socket={socket}"), socket);
        host.datapath("Datapath.deactivate", domain);
    };
    let write = |commands: &[&str]| {
        with(&disk, &mut |url, _| {
            let commands = commands.iter().flat_map(|command| ["-c", command]);
            let args: Vec<&str> = ["-f", "raw", url].into_iter().chain(commands).collect();
            run("qemu-io", &args);
        });
    };
    let backup = host.dir.path().join("backup");
    let backup = backup.to_str().unwrap();
    write(&["write -P 1 0 8M", "write -P 2 40M 1M"]);
    let first = of("snapshot", &disk)["key"].clone();
    let mut copied = false;
    with(&first, &mut |url, _| {
        copied = run("qemu-img", &["convert", "-f", "raw", "-O", "raw", url, backup]).is_some();
    });
    of("data_destroy", &first);
    write(&[
        "write -P 3 1M 64k",
        "write -P 4 20M 300k",
        "write -z 40M 256k",
        "write -P 5 64508k 512",
    ]);
    let second = of("snapshot", &disk)["key"].clone();
    write(&["write -P 6 0 2M"]);
    let bitmap = format!("qemu:dirty-bitmap:{}", first.as_str().unwrap());
    with(&second, &mut |url, socket| {
        let Some(map) = run("nbdinfo", &[&format!("--map={bitmap}"), url]).filter(|_| copied)
        else {
            return;
        };
        let words = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let numbers = words.map(|w| [w[0], w[1], w[2]].map(|n| n.parse::<u64>().unwrap()));
        let dirty: Vec<[u64; 2]> =
            numbers.filter(|n| n[2] == 1).map(|n| [n[0], n[1]].map(|n| n >> 16)).collect();
        // 64 KiB each: 1 at 1 MiB, 5 at 20 MiB, 4 at 40 MiB, the last one but 15.
        assert_eq!(dirty, [[16, 1], [320, 5], [640, 4], [1007, 1]], "{map}");
        let part = host.dir.path().join("part");
        let file = std::fs::File::options().write(true).open(backup).unwrap();
        for [at, len] in dirty.iter().map(|range| range.map(|n| n << 16)) {
            let server = json!({"type": "unix", "path": socket});
            let nbd = json!({"driver": "nbd", "server": server, "export": second});
            let range = json!({"driver": "raw", "offset": at, "size": len, "file": nbd});
            let (from, to) = (format!("json:{range}"), part.to_str().unwrap());
            run("qemu-img", &["convert", "-O", "raw", &from, to]);
            let bytes = std::fs::read(&part).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at).unwrap();
        }
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", backup, url]);
        // QEMU finds the same bits: where they are set it sees no data.
        let image = format!(
            "driver=nbd,server.type=unix,server.path={socket},export={},x-dirty-bitmap={bitmap}",
            second.as_str().unwrap()
        );
        let map = run("qemu-img", &["map", "--output=json", "--image-opts", &image]).unwrap();
        let map: Value = serde_json::from_str(&map).unwrap();
        let set = map.as_array().unwrap().iter().filter(|e| e["data"] == false);
        assert_eq!(set.map(|e| e["length"].as_u64().unwrap()).sum::<u64>(), 11 << 16, "{map}");
    });
    // The disk itself changes: it has no bitmaps.
    with(&disk, &mut |url, _| {
        let Some(all) = run("nbdinfo", &["--json", url]) else { return };
        assert!(all.contains("base:allocation") && !all.contains("qemu:"), "{all}");
    });
}
