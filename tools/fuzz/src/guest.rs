//! [`image`]: a guest on a real image that was changed or not, through the real datapath, on a device
//! in memory.

use std::sync::Arc;

use block::{Flags, Layer, MemQueue, Op, Port, Status};
use dma::{Buf, Pool, Region};
use qcow::check::{Repair, Report};
use qcow::edit::SnapshotKey;
use qcow::format::Header;
use qcow::info::Info;
use qcow::open::{ChainOptions, Opened, Role};
use qcow::run::{Image, Options, Stack};
use qcow::{Chain, ChainReader};
use reactor::{Clock, Core, Portal, PortalFrontend, PortalRequest};

use crate::mutate::{Input, mutate};

/// Images by qemu-img, which mutation starts from.
const IMAGES: [&[u8]; 13] = [
    include_bytes!("../seeds/qcow2/plain.qcow2"),
    include_bytes!("../seeds/qcow2/v2.qcow2"),
    include_bytes!("../seeds/qcow2/bits1.qcow2"),
    include_bytes!("../seeds/qcow2/bits64.qcow2"),
    include_bytes!("../seeds/qcow2/zlib.qcow2"),
    include_bytes!("../seeds/qcow2/zstd.qcow2"),
    include_bytes!("../seeds/qcow2/lazy.qcow2"),
    include_bytes!("../seeds/qcow2/zeroes.qcow2"),
    include_bytes!("../seeds/qcow2/extended.qcow2"),
    include_bytes!("../seeds/qcow2/marked.qcow2"),
    include_bytes!("../seeds/qcow2/data.qcow2"),
    include_bytes!("../seeds/qcow2/raw.qcow2"),
    include_bytes!("../seeds/qcow2/snapshots.qcow2"),
];
/// Bytes of the device: little more than the images, so that it gets full.
const DEVICE: u64 = 512 << 10;
/// Largest disk whose contents are followed.
const FOLLOWED: u64 = 2 << 20;
/// Largest request.
const REQUEST: u64 = 32 << 10;
/// Requests in flight.
const DEPTH: u16 = 4;
/// Operations of one run.
const OPERATIONS: usize = 64;
/// Turns of the reactor in which any request of so small an image has ended long since.
const TURNS: usize = 50_000;

type FuzzCore = Core<MemQueue, Image, PortalFrontend>;

/// Input: the image, how many changes, the changes, then operations.
pub fn image(data: &[u8]) {
    let mut input = Input(data);
    let mut bytes = IMAGES[usize::from(input.byte()) % IMAGES.len()].to_vec();
    // Half of the runs are on valid images.
    let changes = input.byte();
    for _ in 0..if changes & 1 == 0 { 0 } else { changes >> 5 } {
        mutate(&mut bytes, &mut input);
    }
    let device = || MemQueue::new(DEVICE, 512).expect("memory");
    let devices = [device(), device()];
    let device = Device { image: devices[0].data().clone(), data: devices[1].data().clone() };
    device.image.write(0, &bytes);
    let before = check(&device);
    let clean = before.as_ref().is_some_and(|r| r.corruptions == 0 && r.check_errors == 0);
    let leaks = before.map_or(0, |r| r.leaks);
    let mut model = Model::read(&device, clean);
    let kept = if clean { snapshots(&device) } else { Vec::new() };
    let closed = serve(devices, &device, &mut input, &mut model);
    let Some(closed) = closed.filter(|_| clean) else { return };
    let after = check(&device).expect("an image that was open can be checked");
    assert!(
        after.corruptions == 0 && after.check_errors == 0,
        "writes made a clean image corrupt: {after:?}"
    );
    let now = snapshots(&device);
    for (n, kept) in kept.iter().enumerate().filter(|(_, kept)| kept.is_some()) {
        assert!(now.get(n) == Some(kept), "snapshot {n} changed");
    }
    // A device that got full may keep a close from giving everything back.
    if closed == Status::Ok {
        assert!(after.leaks <= leaks, "a clean close leaves leaks: {after:?}");
        model.compare_all(&device);
    }
}

/// The memory of an image and of its external data file.
struct Device {
    image: Arc<Region>,
    data: Arc<Region>,
}

/// Our checker's verdict.
fn check(device: &Device) -> Option<Report> {
    let mut storage = View(device.image.clone());
    qcow::check::run(&mut storage, "fuzz", Repair::None, &mut |_| {}).ok()
}

/// What the first internal snapshots show, where they can be read.
fn snapshots(device: &Device) -> Vec<Option<Vec<u8>>> {
    let info = open(device, false).and_then(|mut c| Info::of(&mut c.layers[0], None).ok());
    let list = info.map_or(Vec::new(), |info| info.snapshots);
    let show = |id: &str| {
        let mut chain = open(device, false)?;
        chain.show_snapshot(SnapshotKey::IdOrName(id)).ok()?;
        let mut reader = ChainReader::new(chain);
        let mut bytes = vec![0; reader.size().min(FOLLOWED) as usize];
        reader.read_at(0, &mut bytes).ok()?;
        Some(bytes)
    };
    list.iter().take(2).map(|s| show(&s.id)).collect()
}

/// What the disk holds, as far as it is known.
struct Model {
    bytes: Vec<u8>,
    /// By sector.
    known: Vec<bool>,
}

impl Model {
    /// Reads a disk as it is.
    fn read(device: &Device, clean: bool) -> Model {
        let mut model = Model { bytes: Vec::new(), known: Vec::new() };
        let chain = open(device, false).filter(|c| clean && c.size() <= FOLLOWED);
        let Some(chain) = chain else { return model };
        let mut reader = ChainReader::new(chain);
        model.bytes.resize(reader.size() as usize & !511, 0);
        for sector in model.bytes.chunks_mut(512).enumerate() {
            model.known.push(reader.read_at(sector.0 as u64 * 512, sector.1).is_ok());
        }
        model
    }

    fn forget(&mut self, offset: u64, len: u64) {
        let (from, to) = self.sectors(offset, len);
        self.known[from..to].fill(false);
    }

    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let (from, to) = self.sectors(offset, len);
        self.bytes[from * 512..to * 512].fill(byte);
        self.known[from..to].fill(true);
    }

    fn sectors(&self, offset: u64, len: u64) -> (usize, usize) {
        let count = self.known.len();
        let from = usize::try_from(offset / 512).unwrap_or(count).min(count);
        let to = usize::try_from(offset.saturating_add(len) / 512).unwrap_or(count).min(count);
        (from, to)
    }

    fn compare(&self, offset: u64, data: &[u8]) {
        let (from, to) = self.sectors(offset, data.len() as u64);
        for sector in from..to {
            let got = &data[sector * 512 - offset as usize..][..512];
            assert!(
                !self.known[sector] || got == &self.bytes[sector * 512..][..512],
                "sector {sector} reads as {:02x?}…, not {:02x?}…",
                &got[..8],
                &self.bytes[sector * 512..][..8]
            );
        }
    }

    /// Everything, through the reader that shares nothing with the datapath.
    fn compare_all(&self, device: &Device) {
        let chain = open(device, false).expect("an image that was open can be opened");
        let mut reader = ChainReader::new(chain);
        let mut sector = [0; 512];
        for at in (0..self.bytes.len() as u64).step_by(512) {
            if self.known[at as usize / 512] {
                reader.read_at(at, &mut sector).expect("what was read before still can be");
                self.compare(at, &sector);
            }
        }
    }
}

/// A view of the device's memory as a file: two can exist at a time.
#[derive(Clone)]
struct View(Arc<Region>);

impl block::Storage for View {
    fn len(&self) -> u64 {
        DEVICE
    }

    fn capacity(&self) -> u64 {
        DEVICE
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), block::StorageError> {
        self.inside("read", offset, into.len() as u64)?;
        self.0.read(offset as usize, into);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), block::StorageError> {
        self.inside("write", offset, from.len() as u64)?;
        self.0.write(offset as usize, from);
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), block::StorageError> {
        self.inside("write zeroes", offset, len)?;
        self.0.zero(offset as usize, len as usize);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), block::StorageError> {
        Ok(())
    }

    fn set_len(&mut self, _len: u64) -> Result<(), block::StorageError> {
        Ok(())
    }
}

impl View {
    fn inside(&self, what: &'static str, offset: u64, len: u64) -> Result<(), block::StorageError> {
        match offset.checked_add(len) {
            Some(end) if end <= DEVICE => Ok(()),
            _ => Err(block::StorageError { what, offset, len, status: Status::Invalid, detail: 0 }),
        }
    }
}

fn open(device: &Device, writable: bool) -> Option<Chain<View>> {
    let opened = |region: &Arc<Region>| {
        let storage = View(region.clone());
        Opened { storage, path: None, name: "fuzz".to_owned(), id: None }
    };
    let mut first = [0; 4096];
    device.image.read(0, &mut first);
    // The data file is there, a backing file is not.
    let top_only = !Header::parse(&first).is_ok_and(|h| h.has_data_file());
    let options = ChainOptions { writable, top_only, ..ChainOptions::default() };
    let chain = Chain::open(opened(&device.image), options, &mut |named| match named.role {
        Role::Data => Ok(opened(&device.data)),
        Role::Backing => Err(qcow::Error::refused("fuzz", "no backing file")),
    });
    chain.ok()
}

/// A request in flight.
struct Flying {
    op: Op,
    offset: u64,
    len: u64,
    fill: u8,
    buf: Option<Buf>,
    /// Another one in flight touches the same sectors, and one of the two changes them.
    disturbed: bool,
}

/// Runs the guest; how the close ended, if the image could be opened.
fn serve(
    devices: [MemQueue; 2],
    device: &Device,
    input: &mut Input<'_>,
    model: &mut Model,
) -> Option<Status> {
    let mut chain = open(device, true)?;
    let count = chain.layers[0].storages().count();
    let ports = [0, 1].map(|leaf| Port { leaf, unit: 0 });
    let stack = Stack::new(&mut chain, &ports[..count]).ok()?;
    let mut core = FuzzCore::new(Clock::virtual_clock().0).expect("memory");
    for queue in devices {
        core.add_leaf(queue).expect("nothing was registered before");
    }
    let durable_bitmaps = input.byte() & 1 != 0;
    let options = Options { slots: DEPTH, l2_cache: 1 << 20, durable_bitmaps };
    core.add_image(|owner, leaves| Image::attach(stack, owner, leaves, options)).ok()?;
    let size = Layer::<MemQueue>::info(core.image(0).expect("the image")).size;
    let mut pool = Pool::new(u32::from(DEPTH), REQUEST as u32).expect("memory");
    let (mut portal, end) =
        Portal::new(DEPTH, vec![pool.region().clone()], core.wake()).expect("memory");
    core.add_frontend(0, |owner, _| Ok::<_, String>(end(owner))).expect("a place");
    let mut flying: Vec<Option<Flying>> = (0..DEPTH).map(|_| None).collect();
    for _ in 0..OPERATIONS {
        if input.is_empty() {
            break;
        }
        let kind = input.byte();
        if portal.room() == 0 || kind & 0x80 != 0 {
            settle(&mut core, &mut portal, &mut pool, &mut flying, model);
        }
        let (op, flags) = match kind % 8 {
            0 | 1 => (Op::Read, Flags::NONE),
            2 | 3 => (Op::Write, Flags::NONE),
            4 => (Op::Write, Flags::FUA),
            5 => (Op::WriteZeroes, if kind & 8 == 0 { Flags::NONE } else { Flags::NO_UNMAP }),
            6 => (Op::Discard, Flags::NONE),
            _ => (Op::Flush, Flags::NONE),
        };
        let (mut offset, mut len) = (0, 0);
        if op != Op::Flush {
            offset = input.below(size / 512) * 512;
            len = (u64::from(input.byte() % 64) + 1) * 512;
            // Now and then past the end, which must be refused.
            if kind & 0x40 == 0 {
                len = len.min(size.saturating_sub(offset)).max(512);
            }
        }
        send(&mut portal, &mut pool, &mut flying, (op, flags, offset, len, input.byte()));
    }
    settle(&mut core, &mut portal, &mut pool, &mut flying, model);
    drop(portal);
    Layer::<MemQueue>::close(core.image(0).expect("the image"));
    for _ in 0..TURNS {
        core.turn();
        if let Some((_, status)) = core.remove_closed_image(0) {
            return Some(status);
        }
    }
    panic!("the close never ended");
}

fn send(
    portal: &mut Portal,
    pool: &mut Pool,
    flying: &mut [Option<Flying>],
    (op, flags, offset, len, fill): (Op, Flags, u64, u64, u8),
) {
    let buf = matches!(op, Op::Read | Op::Write).then(|| pool.take().expect("a buffer"));
    let seg = buf.as_ref().and_then(|b| b.head(len as u32));
    if let Some(seg) = &seg {
        let byte = if op == Op::Write { fill } else { !fill };
        pool.region().write_seg(seg, &vec![byte; len as usize]);
    }
    let mut disturbed = false;
    for other in flying.iter_mut().flatten() {
        let meet = offset < other.offset + other.len && other.offset < offset + len;
        if meet && (op != Op::Read || other.op != Op::Read) {
            disturbed = true;
            other.disturbed = true;
        }
    }
    let at = flying.iter().position(Option::is_none).expect("there was room");
    flying[at] = Some(Flying { op, offset, len, fill, buf, disturbed });
    let request = PortalRequest { id: at as u64, op, flags, offset, len, seg };
    portal.send(request).expect("there was room");
}

/// Turns until everything was answered, and compares.
fn settle(
    core: &mut FuzzCore,
    portal: &mut Portal,
    pool: &mut Pool,
    flying: &mut [Option<Flying>],
    model: &mut Model,
) {
    let mut turns = 0;
    // First what reads saw, then what writes did: they were sent before any answer.
    let mut answers = Vec::new();
    while portal.in_flight() > 0 {
        turns += 1;
        assert!(turns < TURNS, "a request was never answered");
        core.turn();
        while let Some(reply) = portal.receive() {
            let done = flying[reply.id as usize].take().expect("an answer to a request");
            answers.push((done, reply.status));
        }
    }
    for (done, status) in &answers {
        if done.op == Op::Read && *status == Status::Ok && !done.disturbed {
            let mut data = vec![0; done.len as usize];
            if let Some(seg) = done.buf.as_ref().and_then(|b| b.head(done.len as u32)) {
                pool.region().read_seg(&seg, &mut data);
            }
            model.compare(done.offset, &data);
        }
    }
    for (done, status) in answers {
        if let Some(buf) = done.buf {
            pool.give(buf);
        }
        match (done.op, status) {
            (Op::Read | Op::Flush, _) => {}
            (Op::Write, Status::Ok) if !done.disturbed => {
                model.fill(done.offset, done.len, done.fill);
            }
            (Op::WriteZeroes, Status::Ok) if !done.disturbed => {
                model.fill(done.offset, done.len, 0)
            }
            // Refused before anything was done.
            (_, Status::Invalid | Status::ReadOnly) => {}
            _ => model.forget(done.offset, done.len),
        }
    }
}
