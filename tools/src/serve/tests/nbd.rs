//! An image that is served over NBD besides.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::*;

/// A guest's firmware reads by NBD what its driver has written, and the other way round.
#[test]
fn one_image_for_a_device_and_for_nbd() {
    let world = World::new();
    let ours = world.serve(2, Notify::Thread);
    let (path, socket) = (world.image("a"), world.dir.path().join("nbd"));
    let wanted = |socket: &Path| json!({"name": "disk", "node": path, "nbd": socket});
    let refused = ours.control.call("attach", &wanted(Path::new("/no/such/folder/nbd")));
    assert!(refused.is_err());
    ours.call("attach", wanted(&socket));
    world.plug(1, "w", "disk");
    let mut guest = Guest::start(&world, 1, SETUP);
    let mut firmware = Firmware::connect(&socket);
    guest.write(8, 3, 4096);
    assert_eq!(firmware.read(4096, 4096), [3; 4096]);
    firmware.write(8192, &[4; 512]);
    guest.expect(16, 4, 512);
    // It stays for as long as a client does.
    guest.say("6");
    world.reaches(1, "6");
    world.toolstack.rm(frontend(1)).unwrap();
    let list = || ours.call("list", json!({}))["images"][0].clone();
    wait("the end of the device", || list()["used-by"].is_null());
    assert_eq!(list()["nbd-clients"], 1);
    let refused = ours.control.call("detach", &json!({"name": "disk"})).err().unwrap();
    assert!(refused.message.contains("NBD client"), "{}", refused.message);
    drop(firmware);
    wait("detach", || ours.control.call("detach", &json!({"name": "disk"})).is_ok());
    assert!(!socket.exists());
    // An end of the daemon does not wait for clients that do nothing.
    ours.call("attach", wanted(&socket));
    let mut firmware = Firmware::connect(&socket);
    assert_eq!(firmware.read(8192, 512), [4; 512]);
    ours.stop();
}

/// A device of libxl's, which names a script and a target.
#[test]
fn a_device_with_a_script() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let (path, socket) = (world.image("a"), world.dir.path().join("nbd"));
    let plug = |domid: u16, target: &str| {
        let be = backend(domid);
        let write = |key: &str, value: &str| world.toolstack.write(format!("{be}/{key}"), value);
        write("script", "/etc/xen/scripts/block-polldisk").unwrap();
        write("params", target).unwrap();
        world.plug(domid, "w", "nothing that is looked at");
    };
    // What is wrong is told when the script is run, in state 2.
    plug(1, "/no/such/file");
    world.reaches(1, "2");
    let said = world.read(&format!("{}/hotplug-error", backend(1))).unwrap();
    assert!(said.contains("No such file"), "{said}");
    assert_eq!(world.read(&format!("{}/hotplug-status", backend(1))), None);
    let node = path.to_str().unwrap();
    plug(2, &json!({"node": node, "nbd": socket}).to_string());
    let mut guest = Guest::start(&world, 2, SETUP);
    guest.write(8, 3, 4096);
    let emulated = world.read(&format!("{}/physical-device-path", backend(2))).unwrap();
    assert_eq!(emulated, format!("nbd:unix:{}", socket.display()));
    assert_eq!(Firmware::connect(&socket).read(4096, 4096), [3; 4096]);
    // The guest's next domain may be there before the former one has let go of the image.
    plug(3, node);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(world.state(3).as_deref(), Some("1"));
    world.toolstack.write(format!("{}/online", backend(2)), "0").unwrap();
    guest.say("6");
    let mut guest = Guest::start(&world, 3, SETUP);
    guest.expect(8, 3, 4096);
    ours.stop();
}

/// An NBD client of the simplest kind.
struct Firmware(UnixStream);

impl Firmware {
    fn connect(socket: &Path) -> Firmware {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Flags, and the option that asks for the default export.
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        Firmware(stream)
    }

    fn ask(&mut self, command: u16, offset: u64, len: usize, data: &[u8]) {
        let command = command.to_be_bytes();
        let mut request = [&[0x25, 0x60, 0x95, 0x13, 0, 0], &command[..], &[7; 8]].concat();
        request.extend(offset.to_be_bytes());
        request.extend((len as u32).to_be_bytes());
        request.extend(data);
        self.0.write_all(&request).unwrap();
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7]);
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.ask(0, offset, len, &[]);
        let mut data = vec![0; len];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(1, offset, data.len(), data);
    }
}
