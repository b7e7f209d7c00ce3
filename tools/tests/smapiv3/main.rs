//! The toolstack's plugins: each method as xapi-storage-script runs it, on a repository in files, with a
//! daemon that the first call starts.

mod backup;
mod import;
mod mirror;
mod random;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");
const SR: &str = "7c1b6e3a-0f5d-4a47-9d0e-3b8c2f1a6d55";

/// Plugins and a daemon of a test's own.
struct Host {
    dir: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_daemon();
    }
}

impl Host {
    /// `None`, with the reason on the output: there is no Python, which the methods are written in.
    fn new() -> Option<Host> {
        if Command::new("python3").arg("--version").output().is_err() {
            println!("skipped: python3 is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for kind in ["volume", "datapath"] {
            std::fs::create_dir(dir.path().join(kind)).unwrap();
        }
        let host = Host { dir };
        let root = host.dir.path().to_str().unwrap();
        let out =
            Command::new(POLLDISK).args(["smapiv3", "install", "--root", root]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(host)
    }

    fn method(&self, name: &str) -> PathBuf {
        self.dir.path().join("volume/org.xen.xapi.storage.fast").join(name)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.method(name));
        command.arg("--json").env("POLLDISK_SOCKET", self.dir.path().join("run/control.sock"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a method as the toolstack does: it waits for the end of both outputs. What the method says,
    /// and whether it succeeded.
    fn call(&self, name: &str, mut args: Value) -> (bool, Value) {
        args["dbg"] = json!("a test");
        let mut child = self.command(name).spawn().unwrap();
        child.stdin.take().unwrap().write_all(args.to_string().as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let answer = serde_json::from_str(&text).unwrap_or_else(|e| {
            panic!("{name}: {e}: {text:?} {}", String::from_utf8_lossy(&out.stderr))
        });
        (out.status.success(), answer)
    }

    fn ok(&self, name: &str, args: Value) -> Value {
        let (success, answer) = self.call(name, args);
        assert!(success, "{name}: {answer}");
        answer
    }

    /// The same of the datapath's plugin.
    fn datapath(&self, name: &str, args: Value) -> Value {
        self.ok(&format!("../../datapath/fast/{name}"), args)
    }

    /// The code of the error, which has the form that is wanted.
    fn code(&self, name: &str, args: Value) -> String {
        let (success, answer) = self.call(name, args);
        assert!(!success, "{name}: {answer}");
        assert!(answer["params"].as_array().unwrap().iter().all(Value::is_string));
        assert!(answer["backtrace"]["files"].is_array() && answer["backtrace"]["lines"].is_array());
        assert!(answer["backtrace"]["error"].is_string());
        answer["code"].as_str().unwrap().to_owned()
    }

    /// The daemons that run now, by what they have been started with.
    fn daemons(&self) -> Vec<i32> {
        let config = self.dir.path().join("run/polldisk.toml");
        let config = config.to_str().unwrap();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|p| p.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            // Empty for one that has ended and that nobody has waited for.
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).split('\0').any(|argument| argument == config)
        })
        .collect()
    }

    /// Kills those that run now, and waits until they are gone.
    fn kill_daemon(&self) {
        let victims = self.daemons();
        for &pid in &victims {
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        while self.daemons().iter().any(|pid| victims.contains(pid)) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn device(path: &Path) -> Value {
    std::fs::File::create(path).unwrap().set_len(1 << 30).unwrap();
    json!({"device": path.to_str().unwrap(), "other": ""})
}

#[test]
fn a_repository_lives_its_life() {
    let Some(host) = Host::new() else { return };
    let query = host.ok("Plugin.query", json!({}));
    assert_eq!((&query["plugin"], &query["required_api_version"]), (&json!("fast"), &json!("5.0")));
    let config = device(&host.dir.path().join("disk"));
    assert_eq!(host.ok("SR.probe", json!({"configuration": config})), json!([]));
    let new = json!({"uuid": SR, "configuration": config, "name": "ours", "description": "d"});
    assert_eq!(host.ok("SR.create", new.clone()), config);
    assert_eq!(host.code("SR.create", new), "SR_BACKEND_FAILURE", "there is one");
    let probed = host.ok("SR.probe", json!({"configuration": config}));
    assert_eq!(probed[0]["configuration"]["sr_uuid"], SR);
    assert_eq!((&probed[0]["complete"], &probed[0]["sr"]["name"]), (&json!(true), &json!("ours")));

    assert_eq!(host.code("SR.stat", json!({"sr": SR})), "Sr_not_attached");
    for _ in 0..2 {
        assert_eq!(host.ok("SR.attach", json!({"configuration": config})), json!(SR));
    }
    let stat = host.ok("SR.stat", json!({"sr": SR}));
    assert_eq!(stat["health"], json!(["Healthy", ""]));
    assert_eq!(stat["free_space"], stat["total_space"]);
    assert_eq!(host.ok("SR.ls", json!({"sr": SR})), json!([]));
    host.ok("SR.set_name", json!({"sr": SR, "new_name": "fast ones"}));

    let new =
        json!({"sr": SR, "name": "root", "description": "", "size": 5_000_000, "sharable": false});
    let disk = host.ok("Volume.create", new);
    assert_eq!(disk["virtual_size"], 6 << 20, "rounded up");
    let key = disk["key"].as_str().unwrap();
    assert_eq!(disk["uri"], json!([format!("fast://{SR}/{key}")]));
    let of = |more: Value| {
        let mut args = json!({"sr": SR, "key": key});
        args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        args
    };
    let set = |k: &str, v: &str| host.ok("Volume.set", of(json!({"k": k, "v": v})));
    assert_eq!(set("vdi-type", "user"), Value::Null);
    set("empty", "");
    set("_sm_config_x", "{\"a\": \"ü\"}\n");
    set("gone", "1");
    host.ok("Volume.unset", of(json!({"k": "gone"})));
    host.ok("Volume.set_name", of(json!({"new_name": "a new name"})));
    let keys = json!({"vdi-type": "user", "empty": "", "_sm_config_x": "{\"a\": \"ü\"}\n"});
    let seen = host.ok("Volume.stat", of(json!({})));
    assert_eq!((&seen["keys"], &seen["name"]), (&keys, &json!("a new name")));
    assert_eq!(host.ok("SR.ls", json!({"sr": SR})), json!([seen]));

    assert_eq!(host.datapath("Plugin.query", json!({}))["plugin"], "fast");
    let domain = json!({"uri": format!("fast://{SR}/{key}"), "domain": "u0_vbd_0_xvda"});
    let answer = host.datapath("Datapath.attach", domain.clone());
    host.datapath("Datapath.activate", domain.clone());
    let nbd = answer["implementations"][1][1]["uri"].as_str().unwrap();
    let (socket, export) =
        nbd.strip_prefix("nbd:unix:").unwrap().split_once(":exportname=").unwrap();
    let url = format!("nbd+unix:///{export}?socket={socket}");
    match Command::new("qemu-io").args(["-f", "raw", &url, "-c", "write -P 7 1M 64k"]).output() {
        Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr)),
        Err(_) => println!("skipped: qemu-io is not installed"),
    }
    for method in ["Datapath.deactivate", "Datapath.deactivate", "Datapath.detach"] {
        assert_eq!(host.datapath(method, domain.clone()), Value::Null);
    }

    let snapshot = host.ok("Volume.snapshot", of(json!({})));
    assert_eq!((&snapshot["read_write"], &snapshot["keys"]), (&json!(false), &json!({})));
    let taken = snapshot["key"].as_str().unwrap();
    let copy = host.ok("Volume.clone", json!({"sr": SR, "key": taken}));
    assert_eq!(copy["read_write"], true);
    host.ok("Volume.revert", of(json!({"snapshot": taken})));
    assert_eq!(host.ok("SR.ls", json!({"sr": SR})).as_array().unwrap().len(), 3);

    // A backup's cycle, of which only the record of the last snapshot is left.
    assert!(query["features"].as_array().unwrap().contains(&json!("VDI_CONFIG_CBT")));
    assert_eq!(host.ok("Volume.enable_cbt", of(json!({}))), Value::Null);
    assert_eq!(host.ok("Volume.stat", of(json!({})))["cbt_enabled"], true);
    let first = host.ok("Volume.snapshot", of(json!({})))["key"].clone();
    let backup = |method: &str, key: &Value| host.ok(method, json!({"sr": SR, "key": key}));
    assert_eq!(backup("Volume.data_destroy", &first), Value::Null);
    host.ok("Volume.set", json!({"sr": SR, "key": first, "k": "vdi-type", "v": "cbt_metadata"}));
    let record = backup("Volume.stat", &first);
    assert_eq!(record["volume_type"], json!(["CBT_Metadata", null]));
    assert_eq!(record["keys"], json!({"vdi-type": "cbt_metadata"}));
    host.datapath("Datapath.activate", domain.clone());
    let wrote = Command::new("qemu-io")
        .args(["-f", "raw", &url, "-c", "write -P 7 2M 128k", "-c", "write -P 7 4097k 4k"])
        .output();
    host.datapath("Datapath.deactivate", domain.clone());
    let second = host.ok("Volume.snapshot", of(json!({})))["key"].clone();
    let args = json!({"sr": SR, "key": first, "key2": second, "offset": 0, "length": -1});
    let changed = host.ok("Volume.list_changed_blocks", args.clone());
    // Blocks 32, 33 and 64 of 96, the most significant bit of a byte first.
    let want = if wrote.is_ok() { "AAAAAMAAAACAAAAA" } else { "AAAAAAAAAAAAAAAA" };
    assert_eq!(changed, json!({"granularity": 65536, "bitmap": want}));
    host.kill_daemon();
    assert_eq!(host.ok("Volume.list_changed_blocks", args), changed);
    backup("Volume.destroy", &first);
    let again = json!({"sr": SR, "key": first, "key2": second, "offset": 0, "length": -1});
    assert_eq!(host.code("Volume.list_changed_blocks", again), "Volume_does_not_exist");
    let none = json!({"sr": SR, "key": taken, "key2": second, "offset": 0, "length": -1});
    assert_eq!(host.code("Volume.list_changed_blocks", none), "SR_BACKEND_FAILURE_460");
    backup("Volume.destroy", &second);
    assert_eq!(host.ok("Volume.disable_cbt", of(json!({}))), Value::Null);

    // Whatever becomes of the daemon, all of it is on the drive, and what was attached is.
    host.kill_daemon();
    assert_eq!(host.ok("SR.stat", json!({"sr": SR}))["name"], "fast ones");
    let again = host.ok("Volume.stat", of(json!({})));
    assert_eq!((&again["keys"], &again["name"]), (&seen["keys"], &seen["name"]));

    assert_eq!(host.code("SR.destroy", json!({"sr": SR})), "SR_BACKEND_FAILURE", "it has volumes");
    for disk in host.ok("SR.ls", json!({"sr": SR})).as_array().unwrap() {
        for _ in 0..2 {
            host.ok("Volume.destroy", json!({"sr": SR, "key": disk["key"]}));
        }
    }
    assert_eq!(host.code("Volume.stat", of(json!({}))), "Volume_does_not_exist");
    let stat = host.ok("SR.stat", json!({"sr": SR}));
    assert_eq!(stat["free_space"], stat["total_space"]);
    host.ok("SR.destroy", json!({"sr": SR}));
    assert_eq!(host.ok("SR.probe", json!({"configuration": config})), json!([]));
    for _ in 0..2 {
        host.ok("SR.detach", json!({"sr": SR}));
    }
}

/// A loop device, while it is needed.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// What the tools of LVM2 say, as this host; `None`: they are not there.
fn lvm(device: &str, args: &[&str]) -> Option<String> {
    let id = std::fs::read_to_string("/etc/machine-id").ok()?;
    let config = format!(
        "devices {{ filter=[\"a|^{device}$|\", \"r|.*|\"] use_devicesfile=0 \
         obtain_device_list_from_udev=0 external_device_info_source=\"none\" }} \
         global {{ system_id_source=\"lvmlocal\" }} local {{ system_id=\"{}\" }} \
         activation {{ udev_sync=0 udev_rules=0 }}",
        id.trim()
    );
    let out = Command::new("lvm").args(args).args(["--config", &config]).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    Some(text)
}

/// The administrator sees with LVM2's own tools which volume is which disk.
#[test]
fn lvm2_finds_nothing_wrong_and_shows_what_is_what() {
    let Some(host) = Host::new() else { return };
    let path = host.dir.path().join("disk");
    let config = device(&path);
    host.ok(
        "SR.create",
        json!({"uuid": SR, "configuration": config, "name": "ä", "description": ""}),
    );
    host.ok("SR.attach", json!({"configuration": config}));
    let new =
        json!({"sr": SR, "name": "root disk", "description": "", "size": 1, "sharable": false});
    let disk = host.ok("Volume.create", new);
    let of = json!({"sr": SR, "key": disk["key"], "k": "a{b}", "v": " = : # %"});
    host.ok("Volume.set", of.clone());
    host.ok("Volume.snapshot", of);
    host.ok("SR.detach", json!({"sr": SR}));
    let out = Command::new("losetup").args(["--find", "--show"]).arg(&path).output();
    let Some(out) = out.ok().filter(|out| out.status.success()) else {
        println!("skipped: no loop devices here");
        return;
    };
    let device = Loop(String::from_utf8(out.stdout).unwrap().trim().to_owned());
    let Some(_) = lvm(&device.0, &["vgck"]) else {
        println!("skipped: lvm is not installed (Debian: lvm2), or there is no /etc/machine-id");
        return;
    };
    let volumes = lvm(&device.0, &["lvs", "-o", "name,tags", "--noheadings"]).unwrap();
    assert_eq!(volumes.lines().count(), 2);
    let key = format!("pd:key={}", disk["key"].as_str().unwrap());
    for part in [&*key, "pd:name=root#20disk", "pd:k.a#7bb#7d=#20#3d#20#3a#20#23#20#25", "pd:ro=1"]
    {
        assert!(volumes.contains(part), "{part}: {volumes}");
    }
}

#[test]
fn calls_at_once_start_one_daemon_and_lose_nothing() {
    let Some(host) = Host::new() else { return };
    let config = device(&host.dir.path().join("disk"));
    let new = json!({"uuid": SR, "configuration": config, "name": "", "description": ""});
    host.ok("SR.create", new);
    host.kill_daemon();
    let new = json!({"sr": SR, "name": "n", "description": "", "size": 1, "sharable": false});
    let keys: Vec<String> = std::thread::scope(|scope| {
        let one = |_| {
            scope.spawn(|| {
                host.ok("SR.attach", json!({"configuration": config}));
                host.ok("Volume.create", new.clone())["key"].as_str().unwrap().to_owned()
            })
        };
        let threads: Vec<_> = (0..8).map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let all = host.ok("SR.ls", json!({"sr": SR}));
    assert_eq!(all.as_array().unwrap().len(), 8);
    assert!(keys.iter().all(|key| all.as_array().unwrap().iter().any(|disk| disk["key"] == **key)));
    assert_eq!(host.daemons().len(), 1);
}

#[test]
fn mistakes_have_the_form_that_the_toolstack_reads() {
    let Some(host) = Host::new() else { return };
    let none = json!({"sr": "no such one"});
    assert_eq!(host.code("SR.ls", none), "Sr_not_attached");
    assert_eq!(host.code("SR.attach", json!({"configuration": {}})), "SR_BACKEND_FAILURE");
    let missing = json!({"configuration": {"device": "/no/such/device"}});
    assert_eq!(host.code("SR.attach", missing), "SR_BACKEND_FAILURE");
    assert_eq!(host.code("SR.create", json!({"uuid": 5})), "SR_BACKEND_FAILURE");
    let mut child = host.command("SR.ls").spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"no JSON").unwrap();
    let out = child.wait_with_output().unwrap();
    let error: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), &error["code"]), (Some(1), &json!("SR_BACKEND_FAILURE")));
}
