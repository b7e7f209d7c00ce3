//! The messages as bytes: what each holds, and how it is read from what a peer sent. Pure.
//!
//! Everything is little-endian here; the specification says the host's order, and polldisk runs on
//! x86-64 only. Names are those of the specification (section "Commands").

/// Size of the header that begins each message.
pub const HEADER: usize = 16;

/// Most bytes that one REGION_READ, REGION_WRITE, DMA_READ or DMA_WRITE moves: what a peer that
/// does not say otherwise must take (`max_data_xfer_size`).
pub const MAX_DATA: usize = 1 << 20;

/// No message is longer: a data transfer with its fixed part.
pub const MAX_MESSAGE: usize = HEADER + 16 + MAX_DATA;

/// Commands.
pub mod command {
    /// Version negotiation, the first message.
    pub const VERSION: u16 = 1;
    /// Memory that the server may reach.
    pub const DMA_MAP: u16 = 2;
    /// Memory that it may no longer reach.
    pub const DMA_UNMAP: u16 = 3;
    /// Number of regions and interrupt types.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// One region.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Descriptors that stand for writes to a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// One type of interrupts.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Who is told of interrupts.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// Server to client: reads memory.
    pub const DMA_READ: u16 = 11;
    /// Server to client: writes memory.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
}

/// Region indices of a PCI device, as in `<linux/vfio.h>`.
pub mod pci {
    /// BAR0; the others follow.
    pub const BAR0: u32 = 0;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// How many regions there are.
    pub const REGIONS: u32 = 9;
    /// Interrupts of type MSI-X.
    pub const MSIX: u32 = 2;
    /// How many types of interrupts there are.
    pub const IRQS: u32 = 5;
}

const TYPE: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// What begins each message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Chosen by who sends a command, and repeated in the reply.
    pub id: u16,
    /// See [`command`].
    pub command: u16,
    /// Bytes of the message, this header included.
    pub size: u32,
    /// What it is.
    pub kind: Kind,
}

/// What a message is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A command that is to be answered.
    Command,
    /// A command that is not.
    Posted,
    /// An answer.
    Reply,
    /// The answer that a command failed, with an errno (0 if it is not said).
    Failed(u32),
}

impl Header {
    /// The header of a message with `body` bytes after it, which are at most [`MAX_MESSAGE`].
    pub fn new(id: u16, command: u16, kind: Kind, body: usize) -> Header {
        Header { id, command, size: (HEADER + body) as u32, kind }
    }

    /// As it is sent.
    pub fn encode(&self) -> [u8; HEADER] {
        let (flags, error) = match self.kind {
            Kind::Command => (0, 0),
            Kind::Posted => (NO_REPLY, 0),
            Kind::Reply => (REPLY, 0),
            Kind::Failed(errno) => (REPLY | ERROR, errno),
        };
        let mut out = [0; HEADER];
        out[..2].copy_from_slice(&self.id.to_le_bytes());
        out[2..4].copy_from_slice(&self.command.to_le_bytes());
        out[4..8].copy_from_slice(&self.size.to_le_bytes());
        out[8..12].copy_from_slice(&flags.to_le_bytes());
        out[12..].copy_from_slice(&error.to_le_bytes());
        out
    }

    /// Reads one; `None` if its type is unknown or its size cannot be.
    pub fn decode(bytes: &[u8; HEADER]) -> Option<Header> {
        let mut r = Reader(bytes);
        let (id, command, size) = (r.u16()?, r.u16()?, r.u32()?);
        let (flags, error) = (r.u32()?, r.u32()?);
        let kind = match (flags & TYPE, flags & NO_REPLY != 0, flags & ERROR != 0) {
            (0, false, _) => Kind::Command,
            (0, true, _) => Kind::Posted,
            (REPLY, _, false) => Kind::Reply,
            (REPLY, _, true) => Kind::Failed(error),
            _ => return None,
        };
        let fits = (HEADER..=MAX_MESSAGE).contains(&(size as usize));
        fits.then_some(Header { id, command, size, kind })
    }

    /// Bytes that follow the header.
    pub fn body(&self) -> usize {
        (self.size as usize).saturating_sub(HEADER)
    }
}

/// Takes little-endian numbers off the front of what was received.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Puts words behind each other.
fn words<const N: usize>(words: [u32; N]) -> impl Iterator<Item = u8> {
    words.into_iter().flat_map(u32::to_le_bytes)
}

fn longs<const N: usize>(longs: [u64; N]) -> impl Iterator<Item = u8> {
    longs.into_iter().flat_map(u64::to_le_bytes)
}

/// DMA_MAP: memory that the server may reach at a bus address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaMap {
    /// It may read there.
    pub readable: bool,
    /// It may write there.
    pub writable: bool,
    /// Where the memory begins in the descriptor that comes along.
    pub offset: u64,
    /// Bus address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

impl DmaMap {
    const SIZE: usize = 32;

    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u32::from(self.readable) | u32::from(self.writable) << 1;
        words([Self::SIZE as u32, flags])
            .chain(longs([self.offset, self.address, self.size]))
            .collect()
    }

    /// Reads one; `None` if it is too short or names flags that are not known.
    pub fn decode(body: &[u8]) -> Option<DmaMap> {
        let mut r = Reader(body);
        let (argsz, flags) = (r.u32()?, r.u32()?);
        if (argsz as usize) < Self::SIZE || flags & !3 != 0 {
            return None;
        }
        let (offset, address, size) = (r.u64()?, r.u64()?, r.u64()?);
        let (readable, writable) = (flags & 1 != 0, flags & 2 != 0);
        Some(DmaMap { readable, writable, offset, address, size })
    }
}

/// DMA_UNMAP, in both directions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaUnmap {
    /// Everything, whatever address and size say.
    pub all: bool,
    /// Bus address as it was mapped.
    pub address: u64,
    /// Bytes as they were mapped.
    pub size: u64,
}

impl DmaUnmap {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        // VFIO_DMA_UNMAP_FLAG_ALL of <linux/vfio.h>.
        words([24, u32::from(self.all) << 1]).chain(longs([self.address, self.size])).collect()
    }

    /// Reads one; `None` if it is too short or names flags that are not known.
    pub fn decode(body: &[u8]) -> Option<DmaUnmap> {
        let mut r = Reader(body);
        let (_argsz, flags) = (r.u32()?, r.u32()?);
        let all = flags & 2 != 0;
        let (address, size) = (r.u64()?, r.u64()?);
        (flags & !2 == 0).then_some(DmaUnmap { all, address, size })
    }
}

/// The answer to DEVICE_GET_INFO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// DEVICE_RESET is possible.
    pub reset: bool,
    /// It is a PCI device.
    pub pci: bool,
    /// How many regions it has.
    pub regions: u32,
    /// How many types of interrupts.
    pub irqs: u32,
}

impl DeviceInfo {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let flags = u32::from(self.reset) | u32::from(self.pci) << 1;
        words([16, flags, self.regions, self.irqs]).collect()
    }

    /// Reads one; `None` if it is too short.
    pub fn decode(body: &[u8]) -> Option<DeviceInfo> {
        let mut r = Reader(body);
        let (_argsz, flags) = (r.u32()?, r.u32()?);
        let (regions, irqs) = (r.u32()?, r.u32()?);
        Some(DeviceInfo { reset: flags & 1 != 0, pci: flags & 2 != 0, regions, irqs })
    }
}

/// A part of a region that can be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// Where it begins in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// Most areas of a region that are looked at.
pub const MAX_AREAS: usize = 64;

/// The answer to DEVICE_GET_REGION_INFO.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Region {
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// Can be mapped by the descriptor that comes along: in the areas if there are any, else whole.
    pub mmap: bool,
    /// Which one it is.
    pub index: u32,
    /// Bytes; 0 if it is not there.
    pub size: u64,
    /// Where the region begins in the descriptor.
    pub offset: u64,
    /// The parts that can be mapped, at most [`MAX_AREAS`].
    pub areas: Vec<Area>,
}

const REGION: usize = 32;
const CAP_SPARSE_MMAP: u16 = 1;

impl Region {
    /// As it is sent to a client that takes `argsz` bytes: without the areas if that is too little.
    pub fn encode(&self, argsz: u32) -> Vec<u8> {
        let areas = if self.areas.is_empty() { 0 } else { 16 + 16 * self.areas.len() };
        let full = (REGION + areas) as u32;
        let caps = areas > 0 && full <= argsz;
        let flags = u32::from(self.read)
            | u32::from(self.write) << 1
            | u32::from(self.mmap) << 2
            | u32::from(areas > 0) << 3;
        let cap_offset = if caps { REGION as u32 } else { 0 };
        let mut out: Vec<u8> = words([full, flags, self.index, cap_offset])
            .chain(longs([self.size, self.offset]))
            .collect();
        if caps {
            out.extend(words([u32::from(CAP_SPARSE_MMAP) | 1 << 16, 0]));
            out.extend(words([self.areas.len() as u32, 0]));
            out.extend(self.areas.iter().flat_map(|a| longs([a.offset, a.size])));
        }
        out
    }

    /// Reads one, with the bytes that the whole answer takes (ask again if they are more than were
    /// offered). `None` if it contradicts itself: areas outside the region, capabilities outside
    /// the message or in a circle, too many areas.
    pub fn decode(body: &[u8]) -> Option<(Region, u32)> {
        let mut r = Reader(body);
        let (argsz, flags) = (r.u32()?, r.u32()?);
        let (index, mut at) = (r.u32()?, r.u32()?);
        let (size, offset) = (r.u64()?, r.u64()?);
        let mut areas = Vec::new();
        if flags & 8 == 0 {
            at = 0;
        }
        while at != 0 {
            let mut cap = Reader(body.get(at as usize..)?);
            let (id, _version, next) = (cap.u16()?, cap.u16()?, cap.u32()?);
            if id == CAP_SPARSE_MMAP {
                let (count, _) = (cap.u32()? as usize, cap.u32()?);
                if count + areas.len() > MAX_AREAS {
                    return None;
                }
                for _ in 0..count {
                    let area = Area { offset: cap.u64()?, size: cap.u64()? };
                    let end = area.offset.checked_add(area.size)?;
                    if end > size {
                        return None;
                    }
                    areas.push(area);
                }
            }
            // Forward only, so that it ends.
            if next != 0 && next <= at {
                return None;
            }
            at = next;
        }
        let (read, write, mmap) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        Some((Region { read, write, mmap, index, size, offset, areas }, argsz))
    }
}

/// What the client says in DEVICE_GET_REGION_INFO: the bytes that it takes, and which region.
pub fn decode_region_query(body: &[u8]) -> Option<(u32, u32)> {
    let mut r = Reader(body);
    let (argsz, _flags, index) = (r.u32()?, r.u32()?, r.u32()?);
    ((argsz as usize) >= REGION).then_some((argsz, index))
}

/// What the client says in DEVICE_GET_REGION_INFO.
pub fn encode_region_query(argsz: u32, index: u32) -> Vec<u8> {
    words([argsz, 0, index, 0]).chain(longs([0, 0])).collect()
}

/// What the client says in DEVICE_GET_REGION_IO_FDS: the bytes that it takes, and which region.
pub fn decode_io_fds_query(body: &[u8]) -> Option<(u32, u32)> {
    let mut r = Reader(body);
    let (argsz, flags, index, _count) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    (argsz >= 16 && flags == 0).then_some((argsz, index))
}

/// The answer to DEVICE_GET_REGION_IO_FDS that there are none.
pub fn encode_no_io_fds(index: u32) -> Vec<u8> {
    words([16, 0, index, 0]).collect()
}

/// DEVICE_GET_IRQ_INFO, in both directions: a type of interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Irq {
    /// An eventfd can be told of each.
    pub eventfd: bool,
    /// Which type it is.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

impl Irq {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        words([16, u32::from(self.eventfd), self.index, self.count]).collect()
    }

    /// Reads one; `None` if it is too short.
    pub fn decode(body: &[u8]) -> Option<Irq> {
        let mut r = Reader(body);
        let (argsz, flags, index, count) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        (argsz >= 16).then_some(Irq { eventfd: flags & 1 != 0, index, count })
    }
}

/// What DEVICE_SET_IRQS does with each interrupt of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqData<'a> {
    /// Does the action to all.
    None,
    /// Does it to those whose byte is not 0.
    Bool(&'a [u8]),
    /// Tells the descriptors that come along, one for each; nobody if there are none.
    Eventfd,
}

/// The action of DEVICE_SET_IRQS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqAction {
    /// Hold back.
    Mask,
    /// Let through.
    Unmask,
    /// Raise, or say who is told.
    Trigger,
}

/// DEVICE_SET_IRQS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SetIrqs<'a> {
    /// How it is said which.
    pub data: IrqData<'a>,
    /// What to do.
    pub action: IrqAction,
    /// Type of interrupts.
    pub index: u32,
    /// The first.
    pub start: u32,
    /// How many.
    pub count: u32,
}

impl<'a> SetIrqs<'a> {
    const SIZE: usize = 20;

    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let (data, bools): (u32, &[u8]) = match self.data {
            IrqData::None => (1, &[]),
            IrqData::Bool(b) => (1 << 1, b),
            IrqData::Eventfd => (1 << 2, &[]),
        };
        let action = match self.action {
            IrqAction::Mask => 1 << 3,
            IrqAction::Unmask => 1 << 4,
            IrqAction::Trigger => 1 << 5,
        };
        let argsz = (Self::SIZE + bools.len()) as u32;
        let fixed = words([argsz, data | action, self.index, self.start, self.count]);
        fixed.chain(bools.iter().copied()).collect()
    }

    /// Reads one; `None` if it is too short, or does not say exactly one action in exactly one way.
    pub fn decode(body: &'a [u8]) -> Option<SetIrqs<'a>> {
        let mut r = Reader(body);
        let (_argsz, flags) = (r.u32()?, r.u32()?);
        let (index, start, count) = (r.u32()?, r.u32()?, r.u32()?);
        let data = match flags & 7 {
            1 => IrqData::None,
            2 => IrqData::Bool(body.get(Self::SIZE..)?.get(..count as usize)?),
            4 => IrqData::Eventfd,
            _ => return None,
        };
        let action = match flags >> 3 {
            1 => IrqAction::Mask,
            2 => IrqAction::Unmask,
            4 => IrqAction::Trigger,
            _ => return None,
        };
        start.checked_add(count)?;
        Some(SetIrqs { data, action, index, start, count })
    }
}

/// The fixed part of REGION_READ and REGION_WRITE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// Where in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

impl Access {
    /// Size of the fixed part.
    pub const SIZE: usize = 16;

    /// As it is sent; the data follows.
    pub fn encode(&self) -> [u8; Access::SIZE] {
        let mut out = [0; Access::SIZE];
        out[..8].copy_from_slice(&self.offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.region.to_le_bytes());
        out[12..].copy_from_slice(&self.count.to_le_bytes());
        out
    }

    /// Reads one, with the data after it. `None` if it is too short, or wants more than
    /// [`MAX_DATA`] bytes.
    pub fn decode(body: &[u8]) -> Option<(Access, &[u8])> {
        let mut r = Reader(body);
        let (offset, region, count) = (r.u64()?, r.u32()?, r.u32()?);
        ((count as usize) <= MAX_DATA).then_some((Access { offset, region, count }, r.0))
    }
}

/// The fixed part of DMA_READ and DMA_WRITE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dma {
    /// Bus address.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

impl Dma {
    /// Size of the fixed part.
    pub const SIZE: usize = 16;

    /// As it is sent; the data follows.
    pub fn encode(&self) -> [u8; Dma::SIZE] {
        let mut out = [0; Dma::SIZE];
        out[..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..].copy_from_slice(&self.count.to_le_bytes());
        out
    }

    /// Reads one, with the data after it. `None` if it is too short, or wants more than
    /// [`MAX_DATA`] bytes.
    pub fn decode(body: &[u8]) -> Option<(Dma, &[u8])> {
        let mut r = Reader(body);
        let (address, count) = (r.u64()?, r.u64()?);
        (count <= MAX_DATA as u64).then_some((Dma { address, count }, r.0))
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
