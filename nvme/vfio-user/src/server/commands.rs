//! What the server does for each command of its client.

use nix::errno::Errno;

use super::{Device, Fds, Server};
use crate::Error;
use crate::socket::{Message, send};
use crate::version;
use crate::wire::{
    self, Access, DeviceInfo, DmaMap, DmaUnmap, Header, Irq, IrqAction, IrqData, Kind, Region,
    SetIrqs, command, pci,
};

/// The body of an answer, and the descriptor that goes with it.
type Answer = Result<(Vec<u8>, Option<std::sync::Arc<dma::Region>>), Errno>;

impl<D: Device> Server<D> {
    /// Carries out a command and answers it. An error: the client is to be left.
    pub(super) fn handle(&mut self, message: Message) -> Result<(), Error> {
        let Message { header, body, fds } = message;
        if matches!(header.kind, Kind::Reply | Kind::Failed(_)) {
            return Error::protocol("an answer to nothing");
        }
        let greeted = self.bus.0.borrow().peer.as_ref().is_some_and(|p| p.greeted);
        let answer = match header.command {
            command::VERSION if !greeted => {
                let theirs = version::decode(&body)?;
                let answer = version::answer(&theirs);
                if let Some(peer) = &mut self.bus.0.borrow_mut().peer {
                    (peer.greeted, peer.max_data) = (true, theirs.max_data);
                }
                Ok((answer, None))
            }
            _ if !greeted => return Error::protocol("a command before the version"),
            _ => self.carry_out(header.command, &body, fds),
        };
        if header.kind == Kind::Posted {
            return Ok(());
        }
        let (kind, (body, region)) = match answer {
            Ok(answer) => (Kind::Reply, answer),
            Err(e) => (Kind::Failed(e as u32), (Vec::new(), None)),
        };
        let reply = Header::new(header.id, header.command, kind, body.len());
        let bytes = [&reply.encode()[..], &body].concat();
        let fd = region.as_ref().map(|r| r.fd());
        let state = self.bus.0.borrow();
        let Some(peer) = &state.peer else { return Ok(()) };
        let until = self.clock.now().saturating_add(state.patience);
        send(&peer.stream, &bytes, fd.as_slice(), &self.clock, until)
    }

    fn carry_out(&mut self, what: u16, body: &[u8], fds: Fds) -> Answer {
        let done = |()| (Vec::new(), None);
        match what {
            command::DMA_MAP => {
                let map = DmaMap::decode(body).ok_or(Errno::EINVAL)?;
                self.bus.0.borrow_mut().map(&map, fds).map(done)
            }
            command::DMA_UNMAP => {
                let unmap = DmaUnmap::decode(body).ok_or(Errno::EINVAL)?;
                let mut state = self.bus.0.borrow_mut();
                if unmap.all {
                    state.unmap_all();
                } else {
                    state.unmap(unmap.address, unmap.size)?;
                }
                Ok((unmap.encode(), None))
            }
            command::DEVICE_GET_INFO => {
                DeviceInfo::decode(body).ok_or(Errno::EINVAL)?;
                let (regions, irqs) = (pci::REGIONS, pci::IRQS);
                Ok((DeviceInfo { reset: true, pci: true, regions, irqs }.encode(), None))
            }
            command::DEVICE_GET_REGION_INFO => self.region_info(body),
            command::DEVICE_GET_REGION_IO_FDS => {
                // Nothing of this is offered: a shared page costs less.
                let (_, index) = wire::decode_io_fds_query(body).ok_or(Errno::EINVAL)?;
                if index >= pci::REGIONS {
                    return Err(Errno::EINVAL);
                }
                Ok((wire::encode_no_io_fds(index), None))
            }
            command::DEVICE_GET_IRQ_INFO => {
                let irq = Irq::decode(body).ok_or(Errno::EINVAL)?;
                if irq.index >= pci::IRQS {
                    return Err(Errno::EINVAL);
                }
                let count = if irq.index == pci::MSIX { self.device.vectors() } else { 0 };
                Ok((Irq { eventfd: count > 0, index: irq.index, count }.encode(), None))
            }
            command::DEVICE_SET_IRQS => self.set_irqs(body, fds).map(done),
            command::REGION_READ => {
                let (access, _) = Access::decode(body).ok_or(Errno::EINVAL)?;
                self.check(&access)?;
                let mut out = vec![0; Access::SIZE + access.count as usize];
                out[..Access::SIZE].copy_from_slice(&access.encode());
                self.device.read(access.region, access.offset, &mut out[Access::SIZE..]);
                Ok((out, None))
            }
            command::REGION_WRITE => {
                let (access, data) = Access::decode(body).ok_or(Errno::EINVAL)?;
                let writable = self.check(&access)?;
                if !writable || data.len() != access.count as usize {
                    return Err(Errno::EINVAL);
                }
                self.device.write(access.region, access.offset, data);
                Ok((access.encode().to_vec(), None))
            }
            command::DEVICE_RESET => {
                self.device.reset();
                Ok(done(()))
            }
            _ => Err(Errno::ENOTSUP),
        }
    }

    /// Whether the range lies in a region; and whether that may be written.
    fn check(&self, access: &Access) -> Result<bool, Errno> {
        if access.region >= pci::REGIONS {
            return Err(Errno::EINVAL);
        }
        let shape = self.device.shape(access.region);
        let end = access.offset.checked_add(u64::from(access.count)).ok_or(Errno::EINVAL)?;
        if end > shape.size { Err(Errno::EINVAL) } else { Ok(shape.write) }
    }

    fn region_info(&self, body: &[u8]) -> Answer {
        let (argsz, index) = wire::decode_region_query(body).ok_or(Errno::EINVAL)?;
        if index >= pci::REGIONS {
            return Err(Errno::EINVAL);
        }
        let shape = self.device.shape(index);
        let (memory, areas) = shape.shared.unzip();
        let region = Region {
            read: shape.size > 0,
            write: shape.size > 0 && shape.write,
            mmap: memory.is_some(),
            index,
            size: shape.size,
            offset: 0,
            areas: areas.unwrap_or_default(),
        };
        Ok((region.encode(argsz), memory))
    }

    fn set_irqs(&mut self, body: &[u8], fds: Fds) -> Result<(), Errno> {
        let set = SetIrqs::decode(body).ok_or(Errno::EINVAL)?;
        let (start, count) = (set.start as usize, set.count as usize);
        let vectors = if set.index == pci::MSIX { self.device.vectors() } else { 0 };
        // No overflow: `decode` checked it.
        if set.index >= pci::IRQS || set.start + set.count > vectors {
            return Err(Errno::EINVAL);
        }
        if set.action != IrqAction::Trigger {
            return Err(Errno::EINVAL);
        }
        let raise = |vector: usize| self.bus.raise(vector as u16);
        match set.data {
            IrqData::None if set.count == 0 => self.bus.0.borrow_mut().clear_vectors(),
            IrqData::None => (start..start + count).for_each(raise),
            IrqData::Bool(which) => {
                let chosen = which.iter().zip(start..).filter(|(b, _)| **b != 0);
                chosen.for_each(|(_, vector)| raise(vector));
            }
            IrqData::Eventfd => {
                let mut state = self.bus.0.borrow_mut();
                return match fds.len() {
                    0 => state.set_vectors(start, (0..count).map(|_| None)),
                    n if n == count => state.set_vectors(start, fds.into_iter().map(Some)),
                    _ => Err(Errno::EINVAL),
                };
            }
        }
        self.bus.tell();
        Ok(())
    }
}
