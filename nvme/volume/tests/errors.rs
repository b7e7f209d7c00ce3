//! One write or flush that fails, at each place of each operation, done nevertheless or not. The
//! device works again afterwards: what is then opened is the old or the new state, on all devices.

mod rig;

use rig::{Fault, Memory, author, group, new_group};
use volume::{Error, Group, Id, Shape, Vg, probe};

const US: Option<&str> = Some("me");

fn add(vg: &mut Vg, n: u8) -> volume::Result<()> {
    let name = format!("v{n}");
    vg.create_lv(Id::from_noise([n; 32]), &name, 1, Shape::LINEAR, &author())
}

fn copies(devices: &[Memory]) -> Vec<Memory> {
    devices.iter().map(Memory::deep).collect()
}

/// Runs something on copies of the devices, with a fault at each place in turn until it no longer
/// gets there; then looks at what is left.
fn at_each_place(
    devices: &[Memory],
    run: impl Fn(Vec<Memory>) -> volume::Result<()>,
    look: impl Fn(Vec<Memory>, bool),
) -> u32 {
    let mut faults = 0;
    for (d, done) in (0..devices.len()).flat_map(|d| [(d, false), (d, true)]) {
        for after in 0.. {
            let some = copies(devices);
            some[d].set_fault(Some(Fault { after, done }));
            let good = run(some.clone()).is_ok();
            if !some[d].has_failed() {
                assert!(good);
                break;
            }
            faults += 1;
            look(some, good);
        }
    }
    faults
}

/// Opens the group; all devices have its state then.
fn opened(devices: Vec<Memory>) -> Vg {
    let group = Group::open(devices, US).unwrap();
    let vg = group.vg().clone();
    for mut device in group.into_devices() {
        assert_eq!(probe(&mut device).unwrap().unwrap().group.as_ref(), Some(&vg));
    }
    vg
}

#[test]
fn of_a_change() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "1", |vg| add(vg, 1)).unwrap();
    let was = g.vg().clone();
    let devices = g.into_devices();
    let run = |some: Vec<Memory>| {
        let mut g = Group::open(some.clone(), US)?;
        let changed = g.change(&author(), "2", |vg| add(vg, 2));
        if changed.is_err() {
            // Either the old state is in force, or nothing more is done before it is known.
            match g.change(&author(), "3", |vg| add(vg, 3)) {
                Ok(_) => assert_eq!(opened(some).lvs.len(), 2),
                Err(error) => assert!(error.to_string().contains("half way"), "{error}"),
            }
            assert!(g.vg().lv("v2").is_err());
        }
        changed.map(drop)
    };
    let faults = at_each_place(&devices, run, |left, good| {
        assert!(!good);
        let vg = opened(left);
        assert!(vg == was || vg.lvs.len() == 2);
    });
    // On each device: flush at opening; text, flush, header, flush.
    assert_eq!(faults, 2 * 2 * 5);
}

#[test]
fn of_a_repair() {
    let devices = group(2, 64 << 20).into_devices();
    let old = copies(&devices);
    let mut g = Group::open(devices, US).unwrap();
    g.change(&author(), "1", |vg| add(vg, 1)).unwrap();
    let newest = g.vg().clone();
    let devices = [g.into_devices().remove(0), old[1].deep()];
    let run = |some| Group::open(some, US).map(drop);
    let faults = at_each_place(&devices, run, |left, good| {
        assert!(!good);
        assert_eq!(opened(left), newest);
    });
    // On the first a flush; on the other: text, flush, header, flush.
    assert_eq!(faults, 2 * 5);
}

#[test]
fn of_making_and_removing_a_group() {
    let fresh = [Memory::new(64 << 20), Memory::new(64 << 20)];
    let none_or_whole = |left: Vec<Memory>, good: bool| {
        assert!(!good);
        match Group::open(left.clone(), US) {
            Ok(group) => assert_eq!(opened(left), *group.vg()),
            Err(Error::Refused(_)) => {
                Group::create(left, &new_group(), &author()).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    };
    let run = |some| Group::create(some, &new_group(), &author()).map(drop);
    assert!(at_each_place(&fresh, run, none_or_whole) >= 2 * 2 * 8);
    let devices = group(2, 64 << 20).into_devices();
    let run = |some| Group::open(some, US)?.remove().map(drop);
    assert_eq!(at_each_place(&devices, run, none_or_whole), 2 * 2 * 5);
}
