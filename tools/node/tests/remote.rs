//! The node `vfio-user:`: the driver in this process, the model behind a socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use block::Storage;
use node::{NodeSpec, OpenOptions, ServedModel, open_source};
use qcow::open::Format;

/// A model behind a socket.
struct Served {
    dir: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn start(nodes: &[&str]) -> Served {
        Served::within(tempfile::tempdir().unwrap(), nodes)
    }

    fn within(dir: tempfile::TempDir, nodes: &[&str]) -> Served {
        let nodes: Vec<NodeSpec> = nodes.iter().map(|n| NodeSpec::parse(n).unwrap()).collect();
        let model = ServedModel::open(&nodes, &OpenOptions::write(Format::Raw)).unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || model.serve(listener, &stopping).unwrap());
        Served { dir, stop, thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn node(&self, nsid: u32) -> String {
        format!("vfio-user:{}/{nsid}", self.socket().display())
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Passes messages on, but no descriptors: as if neither side could share memory.
fn without_sharing(served: &Served) -> String {
    let path = served.dir.path().join("relay");
    let listener = UnixListener::bind(&path).unwrap();
    let behind = served.socket();
    std::thread::spawn(move || {
        let client = listener.accept().unwrap().0;
        let server = UnixStream::connect(behind).unwrap();
        let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let up = std::thread::spawn(move || relay(&c, &s));
        relay(&server, &client);
        up.join().unwrap();
    });
    format!("vfio-user:{}/1", path.display())
}

fn relay(mut from: &UnixStream, mut to: &UnixStream) {
    let mut header = [0; 16];
    while from.read_exact(&mut header).is_ok() {
        let size = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        let mut body = vec![0; size - header.len()];
        if from.read_exact(&mut body).is_err() {
            break;
        }
        // In the answer to DEVICE_GET_REGION_INFO: nothing can be mapped, and no capabilities.
        if header[2..4] == [5, 0] && header[8] == 1 {
            body[4] &= 3;
        }
        if to.write_all(&[&header[..], &body].concat()).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn a_peer_that_shares_nothing_is_slow_and_right() {
    let served = Served::start(&["mem:16M"]);
    let mut source = writable(&without_sharing(&served));
    for (at, len) in [(0, 1 << 20), (5 << 20, 100 << 10), (512, 512)] {
        write_and_read(&mut source, at, len);
    }
    source.flush().unwrap();
    source.close().unwrap();
}

fn open(node: &str, options: &OpenOptions) -> Result<node::Source, String> {
    open_source(&NodeSpec::parse(node).unwrap(), options).map_err(|e| e.to_string())
}

fn writable(node: &str) -> node::Source {
    open(node, &OpenOptions::write(Format::Raw)).unwrap()
}

/// Bytes that tell where they belong.
fn pattern(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(|i| (i ^ i >> 9 ^ i >> 17) as u8).collect()
}

fn write_and_read(source: &mut node::Source, at: u64, len: usize) {
    source.write_at(at, &pattern(at, len)).unwrap();
    let mut back = vec![0; len];
    source.read_at(at, &mut back).unwrap();
    assert!(back == pattern(at, len), "wrong bytes at {at}");
}

#[test]
fn both_block_sizes_and_what_is_below_a_block() {
    for (nodes, lba) in [(["mem:16M"], 512), (["model:DIR/disk?lba=4096&size=16M&mdts=2"], 4096)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), [7; 8192]).unwrap();
        let nodes = nodes.map(|n| n.replace("DIR", dir.path().to_str().unwrap()));
        let served = Served::within(dir, &nodes.each_ref().map(String::as_str));
        let mut source = writable(&served.node(1));
        assert_eq!(source.len(), 16 << 20);
        for (at, len) in [(0, 1 << 20), (3 << 20, 3 << 20), (512, 512), (4096 * 5 + 512, 9 * 512)] {
            write_and_read(&mut source, at, len);
        }
        source.write_zeroes_at(0, 1 << 20).unwrap();
        let mut zeroes = vec![1; 1 << 20];
        source.read_at(0, &mut zeroes).unwrap();
        assert!(zeroes.iter().all(|&b| b == 0));
        source.flush().unwrap();
        source.close().unwrap();
        // The next client finds what the first wrote.
        let mut again = open(&served.node(1), &OpenOptions::read(Format::Raw)).unwrap();
        assert!(again.read_only() && again.write_at(0, &[0; 512]).is_err());
        let mut back = vec![0; 3 << 20];
        again.read_at(3 << 20, &mut back).unwrap();
        assert!(back == pattern(3 << 20, 3 << 20), "{lba}");
        again.close().unwrap();
    }
}

#[test]
fn namespaces_share_a_connection() {
    let served = Served::start(&["mem:4M", "mem:8M", "mem:12M"]);
    let mut two = writable(&served.node(2));
    let mut three = writable(&served.node(3));
    assert_eq!((two.len(), three.len()), (8 << 20, 12 << 20));
    two.write_at(0, &[2; 4096]).unwrap();
    three.write_at(0, &[3; 4096]).unwrap();
    let mut byte = [0; 512];
    two.read_at(0, &mut byte).unwrap();
    assert_eq!(byte[0], 2);
    let read = OpenOptions::read(Format::Raw);
    assert!(open(&served.node(2), &read).err().unwrap().contains("in use"));
    let missing = open(&served.node(4), &read).err().unwrap();
    assert!(missing.ends_with("the controller has no namespace 4; it has 1, 2, 3"), "{missing}");
    // Read by two is fine, and not written by a third while one of them is there.
    let one = open(&served.node(1), &read).unwrap();
    let other = open(&served.node(1), &read).unwrap();
    one.close().unwrap();
    assert!(open(&served.node(1), &OpenOptions::write(Format::Raw)).is_err());
    other.close().unwrap();
    writable(&served.node(1)).close().unwrap();
    two.close().unwrap();
    drop(three);
    // All of them are gone, and so is the connection: another can be made.
    let _other = UnixStream::connect(served.socket()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let second = open(&served.node(1), &read).err().unwrap();
    assert!(second.contains("one at a time"), "{second}");
}

#[test]
fn stripes_over_two_namespaces_of_one_server() {
    let served = Served::start(&["mem:4M", "mem:4M"]);
    let node = format!("stripe:64k,{},{}", served.node(1), served.node(2));
    let mut source = writable(&node);
    assert_eq!(source.len(), 8 << 20);
    write_and_read(&mut source, 0, 8 << 20);
    source.close().unwrap();
    let mut second = writable(&served.node(2));
    let mut bytes = vec![0; 4096];
    second.read_at(0, &mut bytes).unwrap();
    assert!(bytes == pattern(65536, 4096));
    second.close().unwrap();
}

#[test]
fn a_device_that_fails_is_reset_over_the_socket_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    // A fatal status, of which CC.EN=0 does not bring it back: only DEVICE_RESET does.
    let node = format!("model:{}?fault=cfs:op=write,nth=3;noreset:count=1", disk.display());
    let served = Served::within(dir, &[&node]);
    let mut source = writable(&served.node(1));
    for i in 0..8 {
        write_and_read(&mut source, i * 8192, 4096);
    }
    source.close().unwrap();
}

#[test]
fn a_server_that_goes_gives_errors_and_no_hang() {
    let mut served = Served::start(&["mem:8M"]);
    let mut source = writable(&served.node(1));
    write_and_read(&mut source, 0, 4096);
    served.stop();
    let error = source.write_at(0, &[1; 4096]).unwrap_err();
    assert_eq!(error.status, block::Status::Gone, "{error}");
    assert!(source.read_at(0, &mut [0; 4096]).is_err());
    assert!(source.flush().is_err());
    assert!(source.close().is_err(), "no shutdown in order");
    // A new server on the same socket is a new device.
    std::fs::remove_file(served.socket()).unwrap();
    let dir = std::mem::replace(&mut served.dir, tempfile::tempdir().unwrap());
    let served = Served::within(dir, &["mem:8M"]);
    let mut source = writable(&served.node(1));
    write_and_read(&mut source, 0, 4096);
    source.close().unwrap();
}

#[test]
fn what_cannot_be_opened_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let read = OpenOptions::read(Format::Raw);
    let at = |path: &Path| format!("vfio-user:{}/1", path.display());
    let nothing = open(&at(&dir.path().join("no")), &read).err().unwrap();
    assert!(nothing.contains("cannot connect"), "{nothing}");
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(open(&at(&file), &read).is_err());
    let model = |nodes: &[&str]| {
        let nodes: Vec<_> = nodes.iter().map(|n| NodeSpec::parse(n).unwrap()).collect();
        ServedModel::open(&nodes, &read).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let path = file.display().to_string();
    assert!(model(&[&path]).contains("only model: and mem: can be served"));
    let (a, b) = (format!("model:{path}?vwc=1"), format!("model:{path}?vwc=0"));
    assert!(model(&[&a, &b]).contains("must be the same"));
    assert!(model(&[]).contains("no node"));
}

#[test]
fn an_image_on_two_reactors() {
    let mut served = Served::start(&["mem:64M"]);
    let spec = NodeSpec::parse(&served.node(1)).unwrap();
    let mut bytes = open_source(&spec, &OpenOptions::write(Format::Raw)).unwrap();
    qcow::create::create(&mut bytes, "test", &qcow::create::CreateOptions::new(32 << 20)).unwrap();
    bytes.close().unwrap();
    let chain = node::open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap();
    let start = reactor::Start { cpu: None, policy: reactor::Policy::Adaptive };
    let options = node::DiskOptions { reactors: vec![start; 2], image: Default::default() };
    let parts = node::Parts::new(chain).unwrap();
    let disk = node::Disk::start(parts, options, reactor::Clock::real()).unwrap();
    let door = disk.door();
    let mut pool = dma::Pool::new(2, 65536).unwrap();
    let region = pool.region().clone();
    let mut portals = [(); 2].map(|()| door.open(1, vec![region.clone()]).unwrap());
    let (from, to) = (pool.take().unwrap().seg(), pool.take().unwrap().seg());
    let mut call = |by: usize, op, cluster: u64, seg| {
        let (flags, offset) = (block::Flags::NONE, cluster * 65536);
        let request =
            reactor::PortalRequest { id: 0, op, flags, offset, len: 65536, seg: Some(seg) };
        assert_eq!(portals[by].call(request), block::Status::Ok);
    };
    for cluster in 0..64 {
        let by = cluster as usize % 2;
        region.write_seg(&from, &[cluster as u8 + 1; 65536]);
        // An allocation, and then a hit, on one reactor; read on the other, twice.
        call(by, block::Op::Write, cluster, from);
        call(by, block::Op::Write, cluster, from);
        for _ in 0..2 {
            region.write_seg(&to, &[0; 65536]);
            call(1 - by, block::Op::Read, cluster, to);
            let mut data = vec![0; 65536];
            region.read_seg(&to, &mut data);
            assert!(data.iter().all(|&b| b == cluster as u8 + 1), "cluster {cluster}");
        }
    }
    drop(portals);
    disk.close().unwrap();
    served.stop();
}
