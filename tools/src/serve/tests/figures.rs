//! What is told of a guest's disk, against what the guest has done.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::*;
use crate::serve::figures::Figures;
use crate::serve::metrics::{Address, Listener, Server};

const VM: &str = "1b4e28ba-2fa1-41d2-883f-b9a761bde3fb";

#[test]
fn figures_are_those_of_the_guest() {
    let world = World::new();
    let ours = world.serve(2, Notify::Thread);
    let (path, nbd) = (world.image("a"), world.dir.path().join("nbd"));
    world.toolstack.write("/local/domain/7/vm", format!("/vm/{VM}")).unwrap();
    world.plug(7, "w", &json!({"name": "a \"b\"", "node": path, "nbd": nbd}).to_string());
    let mut guest = Guest::start(&world, 7, SETUP);
    for i in 0..20 {
        guest.write(i * 8, 5, 4096);
        guest.expect(i * 8, 5, 4096);
        guest.expect(i * 8, 5, 512);
    }
    let told = || ours.call("stats", json!({}));
    // Answers are there a moment before the turn ends that counts them.
    wait("all is counted", || told()["disks"][0]["in-flight"] == 0);
    let stats = told();
    let disk = &stats["disks"][0];
    for (key, expected) in [
        ("image", json!("a \"b\"")),
        ("vm", json!(VM)),
        ("vbd", json!("xvda")),
        ("frontend", json!("blkif")),
        ("reads", json!(40)),
        ("writes", json!(20)),
        ("read-bytes", json!(20 * 4608)),
        ("written-bytes", json!(20 * 4096)),
        ("errors", json!(0)),
    ] {
        assert_eq!(disk[key], expected, "{key}");
    }
    // One at a time, all are watched.
    let count = |kind: &str| -> u64 {
        let buckets = disk[kind]["buckets"].as_array().unwrap();
        buckets.iter().map(|b| b[1].as_u64().unwrap()).sum()
    };
    assert_eq!((count("read-latency"), count("write-latency")), (40, 20));
    let sums = ["read-latency", "write-latency"].map(|kind| disk[kind]["sum-ns"].as_u64().unwrap());
    assert_eq!(disk["in-flight-ns"], sums[0] + sums[1]);
    assert_eq!(stats["disks"][1]["frontend"], "nbd");
    assert!(stats["reactors"][0]["busy-ns"].as_u64().unwrap() > 0);
    assert_eq!(stats["devices"][0]["rings"][0]["reads"], 40);

    // The same for Prometheus.
    let socket = world.dir.path().join("metrics");
    let address: Address = format!("unix:{}", socket.display()).parse().unwrap();
    let (images, devices) = (ours.control.images.clone(), ours.control.devices.clone());
    let source = Box::new(move || Figures::of(&images, devices.as_deref()));
    let listener = Listener::bind(&address).unwrap();
    let server = Server::start(listener, Clock::real(), source).unwrap();
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    let labels = "image=\"a \\\"b\\\"\",frontend=\"blkif\",domid=\"7\",devid=\"51712\"";
    for line in [
        format!("\npolldisk_disk_reads_total{{{labels}}} 40\n"),
        format!("\npolldisk_disk_written_bytes_total{{{labels}}} 81920\n"),
        format!("\npolldisk_disk_write_latency_seconds_count{{{labels}}} 20\n"),
        format!("\npolldisk_vbd_info{{{labels},vbd=\"xvda\",vm=\"{VM}\"}} 1\n"),
    ] {
        assert!(page.contains(&line), "{line} is not in {page}");
    }
    server.shutdown();
    assert!(!socket.exists());

    // A guest that has gone has none.
    guest.say("6");
    world.reaches(7, "6");
    world.toolstack.rm(frontend(7)).unwrap();
    wait("the end of its figures", || told()["disks"].as_array().unwrap().is_empty());
    ours.stop();
}

/// A name that the toolstack gives, and UUIDs as they are while a guest migrates; what is none is not told.
#[test]
fn guests_and_disks_are_named_as_the_toolstack_has_it() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let (path, temporary) = (world.image("a"), "1b4e28ba-2fa1-41d2-883f-000000000001");
    world.toolstack.write(format!("/vm/{temporary}/final-uuid"), VM).unwrap();
    for (domid, vm, dev) in [
        (1, format!("/vm/{VM}"), "sda"),
        (2, format!("/vm/{temporary}"), "../x"),
        (3, "/vm/no uuid".to_owned(), "vm host\n"),
    ] {
        world.toolstack.write(format!("/local/domain/{domid}/vm"), vm).unwrap();
        world.toolstack.write(format!("{}/dev", backend(domid)), dev).unwrap();
        let wanted = json!({"name": format!("{domid}"), "node": path, "read-only": true});
        world.plug(domid, "r", &wanted.to_string());
    }
    for domid in 1..=3 {
        world.reaches(domid, "2");
    }
    let named = || -> Vec<(Value, Value)> {
        let stats = ours.call("stats", json!({}));
        let disks = stats["disks"].as_array().unwrap();
        disks.iter().map(|d| (d["vm"].clone(), d["vbd"].clone())).collect()
    };
    wait("all three", || named().len() == 3);
    let expected =
        [(json!(VM), json!("sda")), (json!(VM), json!("xvda")), (json!(null), json!("xvda"))];
    assert_eq!(named(), expected);
    ours.stop();
}
