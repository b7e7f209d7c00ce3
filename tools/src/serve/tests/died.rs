//! What a daemon that dies leaves to the next one.

use super::*;

/// What a daemon that is killed now would leave: the image, and what it keeps for the next one.
pub(super) struct Corpse(Vec<(PathBuf, Vec<u8>)>);

impl Corpse {
    pub(super) fn of(world: &World, image: &Path) -> Corpse {
        let kept = std::fs::read_dir(world.dir.path().join("state")).unwrap();
        let kept = kept.map(|e| e.unwrap().path()).filter(|path| path.is_file());
        let paths = kept.chain([image.to_owned()]);
        Corpse(paths.map(|p| (p.clone(), std::fs::read(&p).unwrap())).collect())
    }

    /// As if the one that has stopped by now had been killed then. The same files.
    pub(super) fn lie(&self, world: &World, domid: u16) {
        world.toolstack.rm(format!("{}/polldisk-handed-over", backend(domid))).unwrap();
        self.0.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    }
}

#[test]
fn what_was_answered_and_not_written_is_put_in_by_the_next_daemon() {
    let world = World::new();
    let path = world.image("a");
    let ours = world.serve(1, Notify::Thread);
    world.plug(9, "w", &node(&path));
    let mut guest = Guest::start(&world, 9, SETUP);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&world, &path);
    ours.stop();
    let journal = world.dir.path().join("state/image-9%2f51712");
    let entries = |bytes: &[u8]| [16, 24].map(|at| bytes[at]).into_iter().max();
    assert_eq!(entries(&corpse.0.iter().find(|f| f.0 == journal).unwrap().1), Some(1));
    corpse.lie(&world, 9);
    let ours = world.serve(1, Notify::Direct);
    guest.expect(64, 7, 4096);
    ours.stop();
    // The guest has closed the device meanwhile, and uses the rings no more: what it was told holds all
    // the same.
    corpse.lie(&world, 9);
    guest.say("5");
    let ours = world.serve(1, Notify::Direct);
    wait("the close", || ["5", "6"].contains(&&*world.state(9).unwrap()));
    ours.stop();
    let put_in = std::fs::read(&path).unwrap();
    assert!(put_in != corpse.0.iter().find(|f| f.0 == path).unwrap().1);
}

#[test]
fn a_journal_is_put_into_no_other_image() {
    let error = format!("/local/domain/0/error/backend/qdisk/9/{DEVID}/error");
    // Another file by that name; another image in that file; the journal is gone.
    for case in 0..3 {
        let world = World::new();
        let (path, other) = (world.image("a"), world.image("b"));
        let ours = world.serve(1, Notify::Thread);
        world.plug(9, "w", &node(&path));
        let mut guest = Guest::start(&world, 9, SETUP);
        guest.write(64, 7, 4096);
        let corpse = Corpse::of(&world, &path);
        ours.stop();
        corpse.lie(&world, 9);
        match case {
            0 => {
                // Even with the same bytes in it: it may be older.
                std::fs::copy(&path, &other).unwrap();
                std::fs::rename(&other, &path).unwrap();
            }
            1 => {
                let mut storage = node::HostStorage::open(&path, true).unwrap();
                qcow::edit::create_snapshot(&mut storage, "a", "new", Duration::ZERO).unwrap();
            }
            _ => std::fs::remove_file(world.dir.path().join("state/image-9%2f51712")).unwrap(),
        }
        let before = std::fs::read(&path).unwrap();
        let ours = world.serve(1, Notify::Direct);
        wait("the refusal", || world.read(&error).is_some());
        ours.stop();
        assert!(std::fs::read(&path).unwrap() == before, "case {case}");
    }
    // A device made anew has nothing to do with the journal of the last one, also if its daemon dies.
    let world = World::new();
    let (path, other) = (world.image("a"), world.image("b"));
    let ours = world.serve(1, Notify::Thread);
    world.plug(9, "w", &node(&path));
    let mut guest = Guest::start(&world, 9, SETUP);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&world, &path);
    ours.stop();
    corpse.lie(&world, 9);
    world.toolstack.rm(backend(9)).unwrap();
    world.toolstack.rm(frontend(9)).unwrap();
    let wanted = json!({"node": other.to_str().unwrap(), "read-only": true}).to_string();
    world.plug(9, "r", &wanted);
    let before = std::fs::read(&other).unwrap();
    let ours = world.serve(1, Notify::Thread);
    let mut guest = Guest::start(&world, 9, SETUP);
    guest.expect(64, 0, 4096);
    let corpse = Corpse::of(&world, &other);
    ours.stop();
    corpse.lie(&world, 9);
    let ours = world.serve(1, Notify::Thread);
    guest.expect(64, 0, 4096);
    ours.stop();
    assert!(std::fs::read(&other).unwrap() == before);
}
