//! [`Repository`]: an open one, what it says of itself, and the commit of a change.

use block::Storage;
use qcow::create::CreateOptions;
use qcow::edit::{BitmapAction, change_bitmap};
use volume::{Author, Group, HostIds, NewGroup, Run, Vg, View};

use crate::error::{Error, Result, refused};
use crate::fields::Fields;
use crate::state::{DESCRIPTION, Disk, NAME, Node, SR, STRIPES, State};

/// Bytes of an extent of the groups that are made here.
const EXTENT: u64 = 4 << 20;

/// What a new repository shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewRepository {
    /// Its UUID.
    pub id: String,
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// On how many devices each volume lies in stripes; 1: on one.
    pub stripes: u32,
    /// The system ID of this host, if it has one.
    pub system_id: Option<String>,
}

/// What a repository is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stat {
    /// Its UUID.
    pub id: String,
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// Name of the volume group.
    pub group: String,
    /// Bytes for volumes.
    pub total: u64,
    /// Bytes of that which no volume has.
    pub free: u64,
}

/// An open repository.
#[derive(Debug)]
pub struct Repository<S> {
    group: Group<S>,
    state: State,
    /// Extents that no volume has any more since they were last asked for.
    freed: Vec<Run>,
}

/// An image that is made with its volume.
pub(crate) struct NewImage {
    /// The volume.
    pub(crate) lv: String,
    pub(crate) options: CreateOptions,
    /// Name and granularity of a bitmap in it.
    pub(crate) bitmap: Option<(&'static str, u64)>,
}

/// Whose repository a device is a part of, if it is of one: the UUID.
///
/// # Errors
/// If it cannot be read, or what stands there is damaged.
pub fn probe(storage: &mut dyn Storage) -> Result<Option<String>> {
    let found = volume::probe(storage)?;
    let Some(vg) = found.and_then(|found| found.group) else { return Ok(None) };
    Ok(Fields::read(&vg.tags)?.get(SR).map(str::to_owned))
}

/// The group that stands on the first device.
fn found<S: Storage>(storages: &mut [S]) -> Result<Option<Vg>> {
    let Some(first) = storages.first_mut() else { return Ok(None) };
    Ok(volume::probe(first)?.and_then(|found| found.group))
}

impl<S: Storage> Repository<S> {
    /// Makes a repository on devices; what was on them is lost.
    ///
    /// # Errors
    /// As [`Group::create`]; if there are fewer devices than stripes.
    pub fn create(storages: Vec<S>, new: &NewRepository, author: &Author) -> Result<Repository<S>> {
        if new.stripes == 0 || new.stripes as usize > storages.len() {
            let (stripes, devices) = (new.stripes, storages.len());
            return refused(format!("{stripes} stripes on {devices} devices"));
        }
        let mut fields = Fields::default();
        fields.set(SR, &*new.id);
        fields.set(NAME, &*new.name);
        fields.set(DESCRIPTION, &*new.description);
        fields.set(STRIPES, new.stripes.to_string());
        let mut tags = Vec::new();
        fields.write(&mut tags)?;
        let group = NewGroup {
            name: format!("pd-{}", new.id),
            system_id: new.system_id.clone(),
            tags,
            extent: EXTENT,
            metadata: volume::DEFAULT_METADATA,
        };
        Repository::of(Group::create(storages, &group, author)?)
    }

    /// Opens the repository that is on these devices, all of them, for this host.
    ///
    /// # Errors
    /// As [`Group::open`]; if the group is no repository, or its tags contradict themselves.
    pub fn open(mut storages: Vec<S>, host: &HostIds) -> Result<Repository<S>> {
        let ours = found(&mut storages)?.and_then(|vg| host.matching(&vg).map(str::to_owned));
        Repository::of(Group::open(storages, ours.as_deref())?)
    }

    /// The same only to look, whoever may use it. The devices must be for reading only, so that nothing is
    /// repaired.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn look(mut storages: Vec<S>) -> Result<Repository<S>> {
        let owner = found(&mut storages)?.and_then(|vg| vg.system_id);
        Repository::of(Group::open(storages, owner.as_deref())?)
    }

    fn of(group: Group<S>) -> Result<Repository<S>> {
        let state = State::read(group.vg())?;
        Ok(Repository { group, state, freed: Vec::new() })
    }

    /// The devices, given back.
    pub fn into_devices(self) -> Vec<S> {
        self.group.into_devices()
    }

    /// The volume group.
    pub fn group(&self) -> &Group<S> {
        &self.group
    }

    /// What it is.
    pub fn stat(&self) -> Stat {
        let vg = self.group.vg();
        let extents: u64 = vg.pvs.iter().map(|pv| pv.pe_count).sum();
        Stat {
            id: self.state.id.clone(),
            name: self.state.name.clone(),
            description: self.state.description.clone(),
            group: vg.name.clone(),
            total: extents * vg.extent_bytes(),
            free: vg.free_extents() * vg.extent_bytes(),
        }
    }

    /// All disks and snapshots, with the nodes that they are.
    pub fn list(&self) -> impl Iterator<Item = (&Disk, &Node)> {
        self.state.nodes.values().filter_map(|node| Some((node.disk.as_ref()?, node)))
    }

    /// A disk or snapshot.
    ///
    /// # Errors
    /// If there is none.
    pub fn disk(&self, key: &str) -> Result<(&Disk, &Node)> {
        let node = self.state.of(key)?;
        let disk = node.disk.as_ref().ok_or_else(|| Error::NoDisk(key.to_owned()))?;
        Ok((disk, node))
    }

    /// What has to be opened for a disk: its node and those below it, in this order.
    ///
    /// # Errors
    /// If there is none.
    pub fn chain(&self, key: &str) -> Result<Vec<&Node>> {
        let lv = &self.state.of(key)?.lv;
        Ok(self.state.chain(lv).collect())
    }

    /// A node's image as storage.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn storage(&mut self, lv: &str) -> Result<View<'_, S>> {
        Ok(self.group.volume(lv)?)
    }

    /// Tells the devices that nobody needs the extents that were given back since this was last called.
    pub fn discard(&mut self) {
        let freed = std::mem::take(&mut self.freed);
        self.group.discard(&freed);
    }

    /// Whether there is any volume in the group, also somebody else's.
    pub fn has_volumes(&self) -> bool {
        !self.group.vg().lvs.is_empty()
    }

    /// Takes the repository off its devices, which are given back.
    ///
    /// # Errors
    /// If it has volumes, or a device fails.
    pub fn remove(self) -> Result<Vec<S>> {
        Ok(self.group.remove()?)
    }

    /// Changes what people read of it.
    ///
    /// # Errors
    /// If a text is too long, or a device fails.
    pub fn set_texts(
        &mut self,
        name: Option<&str>,
        description: Option<&str>,
        author: &Author,
    ) -> Result<()> {
        let mut fields = Fields::read(&self.group.vg().tags)?;
        for (field, text) in [(NAME, name), (DESCRIPTION, description)] {
            if let Some(text) = text {
                fields.set(field, text);
            }
        }
        self.commit(author, "texts of the repository", &[], |vg| fields.write(&mut vg.tags))
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// A change in one commit, with new images in new volumes.
    pub(crate) fn commit(
        &mut self,
        author: &Author,
        why: &str,
        images: &[NewImage],
        edit: impl FnOnce(&mut Vg) -> Result<()>,
    ) -> Result<()> {
        let mut failed = None;
        let prepared = self.group.prepare(author, &format!("polldisk: {why}"), |vg| {
            edit(vg).map_err(|error| {
                let text = error.to_string();
                failed = Some(error);
                volume::Error::Refused(text)
            })
        });
        let prepared = prepared.map_err(|error| failed.take().unwrap_or(Error::Group(error)))?;
        // Whatever was done must be something that can be opened again.
        let state = State::read(prepared.vg())?;
        for NewImage { lv, options, bitmap } in images {
            let mut storage = self.group.new_volume(&prepared, lv)?;
            qcow::create::create(&mut storage, lv, options)?;
            if let Some((name, granularity)) = bitmap {
                let granularity = Some(*granularity);
                let actions = [BitmapAction::Add { granularity }, BitmapAction::Disable];
                change_bitmap::<View<'_, S>>(&mut storage, lv, name, &actions, None)?;
            }
        }
        self.freed.append(&mut self.group.commit(prepared)?);
        self.state = state;
        Ok(())
    }
}
