//! `polldisk volume import`.

use std::process::Command;

use serde_json::{Value, json};

use super::{Host, POLLDISK, SR, device};

/// Runs the program; what it said on its output, or of an error.
fn polldisk(host: &Host, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(POLLDISK);
    command.env("POLLDISK_SOCKET", host.dir.path().join("run/control.sock"));
    let out = command.current_dir(host.dir.path()).args(args).output().unwrap();
    match out.status.success() {
        true => Ok(String::from_utf8(out.stdout).unwrap()),
        false => Err(String::from_utf8(out.stderr).unwrap()),
    }
}

#[test]
fn images_become_disks() {
    let Some(host) = Host::new() else { return };
    let at = |name: &str| host.dir.path().join(name);
    let config = device(&at("disk"));
    host.ok(
        "SR.create",
        json!({"uuid": SR, "configuration": config, "name": "", "description": ""}),
    );
    host.ok("SR.attach", json!({"configuration": config}));
    let ok = |args: &[&str]| polldisk(&host, args).unwrap();
    // No whole number of clusters; data, zeroes and holes.
    let mut bytes = vec![0; (5 << 20) + 512];
    for (n, chunk) in bytes.chunks_mut(4096).enumerate().filter(|(n, _)| n % 7 < 3 && n % 300 < 200)
    {
        chunk.fill(n as u8 | 1);
    }
    std::fs::write(at("raw"), &bytes).unwrap();
    ok(&["image", "convert", "-f", "raw", "-c", "raw", "one.qcow2"]);
    ok(&["image", "convert", "-f", "raw", "-O", "vhd", "raw", "one.vhd"]);
    ok(&["image", "create", "-b", "one.qcow2", "-F", "qcow2", "overlay.qcow2"]);
    let import = |args: &[&str]| {
        let all = [&["volume", "import", "--json", "--sr", SR], args].concat();
        let said = polldisk(&host, &all)?;
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["virtual-size"], bytes.len());
        assert!(said["data-bytes"].as_u64().unwrap() < 4 << 20, "{said}");
        Ok::<_, String>(said["key"].as_str().unwrap().to_owned())
    };
    let keys = [
        import(&["one.qcow2"]),
        import(&["-f", "raw", "raw"]),
        import(&["-f", "vhd", "--name", "old one", "one.vhd"]),
        import(&["--allow-backing", ".", "overlay.qcow2"]),
    ];
    let keys = keys.map(Result::unwrap);
    let named = host.ok("Volume.stat", json!({"sr": SR, "key": keys[2]}));
    assert_eq!((&named["name"], &named["virtual_size"]), (&json!("old one"), &json!(6 << 20)));

    // What names other files is refused, and half a disk is none.
    let refused = import(&["overlay.qcow2"]).unwrap_err();
    assert!(refused.contains("--allow-backing"), "{refused}");
    let mut broken = std::fs::read(at("one.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(broken[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // An entry in the middle: far behind the file's end.
    broken[l2 + 8 * 40..][..8].copy_from_slice(&(1u64 << 63 | 1 << 40).to_be_bytes());
    std::fs::write(at("broken.qcow2"), broken).unwrap();
    let failed = import(&["broken.qcow2"]).unwrap_err();
    assert!(failed.contains("nothing was imported"), "{failed}");
    let other = polldisk(&host, &["volume", "import", "--sr", "none", "one.qcow2"]).unwrap_err();
    assert!(other.contains("Sr_not_attached"), "{other}");
    assert_eq!(host.ok("SR.ls", json!({"sr": SR})).as_array().unwrap().len(), keys.len());

    // Without the daemon.
    host.ok("SR.detach", json!({"sr": SR}));
    let list: Value = serde_json::from_str(&ok(&["volume", "list", "--json", "disk"])).unwrap();
    let volumes = list["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), keys.len());
    for volume in volumes {
        let node = format!("vol:pd-{SR}/{}@disk", volume["name"].as_str().unwrap());
        ok(&["image", "check", &node]);
        ok(&["image", "convert", "-O", "raw", &node, "back"]);
        let back = std::fs::read(at("back")).unwrap();
        assert!(back[..bytes.len()] == bytes && back[bytes.len()..].iter().all(|&b| b == 0));
    }
}
