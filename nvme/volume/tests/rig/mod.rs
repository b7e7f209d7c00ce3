//! Devices in memory, sparse, and groups on them.
#![allow(dead_code, reason = "each test uses a part")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::{Status, Storage, StorageError};
use volume::{Author, Group, Label, MetadataArea, NewGroup};

const PAGE: usize = 4096;

/// Memory as a device. Clones are the same bytes, like two openings of one drive.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pages: Rc<RefCell<BTreeMap<u64, Vec<u8>>>>,
    size: u64,
    changes: Rc<Cell<u64>>,
    discarded: Rc<Cell<u64>>,
    fault: Rc<Cell<Option<Fault>>>,
    read_only: bool,
}

/// One change or flush that will fail.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// After so many that succeed.
    pub(crate) after: u64,
    /// It was done nevertheless.
    pub(crate) done: bool,
}

impl Memory {
    pub(crate) fn new(size: u64) -> Memory {
        Memory {
            pages: Rc::default(),
            size,
            changes: Rc::default(),
            discarded: Rc::default(),
            fault: Rc::default(),
            read_only: false,
        }
    }

    /// How many writes there were.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.get()
    }

    /// How many bytes were discarded.
    pub(crate) fn discarded(&self) -> u64 {
        self.discarded.get()
    }

    /// A device of its own with the same contents.
    pub(crate) fn deep(&self) -> Memory {
        let pages = Rc::new(RefCell::new(self.pages.borrow().clone()));
        Memory { pages, ..Memory::new(self.size) }
    }

    /// Something will fail, once. `None`: not any more.
    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        self.fault.set(fault);
    }

    /// Whether it did.
    pub(crate) fn has_failed(&self) -> bool {
        self.fault.get().is_none()
    }

    /// Counts a change or flush; whether it fails, and is done nevertheless.
    fn fails(&self) -> Option<bool> {
        let fault = self.fault.get()?;
        let left = fault.after.checked_sub(1);
        self.fault.set(left.map(|after| Fault { after, ..fault }));
        left.is_none().then_some(fault.done)
    }

    /// The same device, which may only be read.
    pub(crate) fn to_read(&self) -> Memory {
        Memory { read_only: true, ..self.clone() }
    }

    /// A device of its own with the first bytes of this one.
    pub(crate) fn shorter(&self, size: u64) -> Memory {
        Memory { size, ..self.deep() }
    }

    fn inside(&self, what: &'static str, offset: u64, len: usize) -> Result<(), StorageError> {
        let len = len as u64;
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(StorageError { what, offset, len, status: Status::Invalid, detail: 0 }),
        }
    }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.size
    }

    fn capacity(&self) -> u64 {
        // As of a file, which could grow.
        1 << 50
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.inside("read", offset, into.len())?;
        let pages = self.pages.borrow();
        let mut at = 0;
        while at < into.len() {
            let (page, within) = split(offset + at as u64);
            let run = (PAGE - within).min(into.len() - at);
            match pages.get(&page) {
                Some(bytes) => into[at..at + run].copy_from_slice(&bytes[within..within + run]),
                None => into[at..at + run].fill(0),
            }
            at += run;
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.inside("write", offset, from.len())?;
        self.changes.set(self.changes.get() + 1);
        let fails = self.fails();
        let failed = failed("write", offset, from.len());
        if fails == Some(false) {
            return Err(failed);
        }
        let mut pages = self.pages.borrow_mut();
        let mut at = 0;
        while at < from.len() {
            let (page, within) = split(offset + at as u64);
            let run = (PAGE - within).min(from.len() - at);
            let bytes = pages.entry(page).or_insert_with(|| vec![0; PAGE]);
            bytes[within..within + run].copy_from_slice(&from[at..at + run]);
            at += run;
        }
        if fails.is_some() { Err(failed) } else { Ok(()) }
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.inside("write of zeroes", offset, len as usize)?;
        // Whole pages of zeroes are not kept.
        let whole =
            offset.next_multiple_of(PAGE as u64)..(offset + len) / PAGE as u64 * PAGE as u64;
        if whole.is_empty() {
            return self.write_at(offset, &vec![0; len as usize]);
        }
        self.write_at(offset, &vec![0; (whole.start - offset) as usize])?;
        self.write_at(whole.end, &vec![0; (offset + len - whole.end) as usize])?;
        let pages = split(whole.start).0..split(whole.end).0;
        self.pages.borrow_mut().retain(|page, _| !pages.contains(page));
        Ok(())
    }

    fn discard_at(&mut self, _offset: u64, len: u64) {
        self.discarded.set(self.discarded.get() + len);
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        if self.fails().is_some() { Err(failed("flush", 0, 0)) } else { Ok(()) }
    }

    fn set_len(&mut self, _len: u64) -> Result<(), StorageError> {
        Ok(())
    }
}

fn failed(what: &'static str, offset: u64, len: usize) -> StorageError {
    StorageError { what, offset, len: len as u64, status: Status::Medium, detail: 0 }
}

fn split(at: u64) -> (u64, usize) {
    (at / PAGE as u64, (at % PAGE as u64) as usize)
}

pub(crate) fn author() -> Author {
    Author { host: "here".to_owned(), time: 1_700_000_000 }
}

pub(crate) fn new_group() -> NewGroup {
    NewGroup {
        name: "vg-0".to_owned(),
        system_id: Some("me".to_owned()),
        tags: Vec::new(),
        extent: 4 << 20,
        metadata: volume::DEFAULT_METADATA,
    }
}

/// A group of the system `me` on so many devices, with extents of 4 MiB.
pub(crate) fn group(devices: usize, size: u64) -> Group<Memory> {
    let devices = (0..devices).map(|_| Memory::new(size)).collect();
    Group::create(devices, &new_group(), &author()).unwrap()
}

/// Puts a text with its zero byte in force on one device.
pub(crate) fn put(device: &mut Memory, text: &[u8]) {
    let place = Label::read(device).unwrap().unwrap().metadata[0];
    let mut area = MetadataArea::read(device, place).unwrap();
    let at = area.next(text).unwrap();
    area.put(device, &at, text).unwrap();
    area.live = Some(at);
    area.write(device).unwrap();
}
