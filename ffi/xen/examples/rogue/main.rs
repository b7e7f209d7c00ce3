//! A guest's frontend that is not to be trusted: in a guest of Xen without a disk driver, as root, with
//! the modules xen-gntalloc and xen-evtchn. It does to the backend of the guest's one disk, whose contents
//! it ruins, all that a frontend can do, and fails if the backend does not answer each trick as it should,
//! or does not serve it in order afterwards.
//!
//! `rogue GROUP`, a group being one of those in [`GROUPS`]; a line for each trick. The backend must offer
//! what `polldisk serve` does, and say its errors in its words.

mod device;
#[path = "../loopback/guest.rs"]
mod guest;
mod keys;
mod requests;
mod ring;
mod storms;

use std::process::ExitCode;

use device::Device;
use guest::{DOM0, Granted};
use ring::{READ, WRITE, direct};

pub(crate) const PAGE: usize = 4096;
pub(crate) const OKAY: i16 = 0;
pub(crate) const ERROR: i16 = -1;
pub(crate) const UNSUPPORTED: i16 = -2;

pub(crate) type Fault = Box<dyn std::error::Error>;
pub(crate) type Outcome = Result<(), Fault>;
pub(crate) type Trick = (&'static str, fn(&Device) -> Outcome);

/// As `assert!`, but an error.
#[macro_export]
macro_rules! hold {
    ($that:expr) => {
        if !$that {
            return Err(concat!(stringify!($that), " does not hold").into());
        }
    };
}

/// As `assert_eq!`, but an error.
#[macro_export]
macro_rules! equal {
    ($is:expr, $right:expr) => {
        let (is, right) = (&$is, &$right);
        if is != right {
            let what = stringify!($is);
            return Err(format!("{what} is {is:?}, not {right:?}").into());
        }
    };
}

/// All that is tried, in groups that can be run alone. After `vanish` the toolstack has to make the
/// device anew; `flood` ends with its guest.
const GROUPS: [(&str, &[Trick]); 7] = [
    ("keys", &keys::TRICKS),
    ("requests", &requests::TRICKS),
    ("ring", &storms::RING),
    ("grants", &requests::GRANTS),
    ("storms", &storms::STORMS),
    ("vanish", &[("vanish", storms::vanish)]),
    ("flood", &[("flood", storms::flood)]),
];

fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let Some((_, tricks)) = GROUPS.iter().find(|(group, _)| *group == name) else {
        eprintln!("rogue: no group {name}");
        return ExitCode::FAILURE;
    };
    let device = match Device::find() {
        Ok(device) => device,
        Err(e) => {
            println!("FAIL: {e}");
            return ExitCode::FAILURE;
        }
    };
    let mut good = true;
    for (trick, play) in *tricks {
        match play(&device) {
            Ok(()) => println!("ok {trick}"),
            Err(e) => {
                good = false;
                println!("FAIL {trick}: {e}");
            }
        }
        let there = *trick != "vanish";
        if there && let Err(e) = device.rewind().and_then(|()| serves(&device)) {
            println!("FAIL after {trick}: {e}");
            return ExitCode::FAILURE;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A frontend in order is served: what it writes it reads.
fn serves(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let data = Granted::new(DOM0, 2, true)?;
    let (from, to) = (data.grefs[0], data.grefs[1]);
    for at in 0..PAGE {
        data.set(at, at as u8 ^ 0x5a);
    }
    equal!(ring.ask(direct(WRITE, 1, 8, &[(from, 0, 7)]))?.2, OKAY);
    equal!(ring.ask(direct(READ, 1, 8, &[(to, 0, 7)]))?.2, OKAY);
    hold!((0..PAGE).all(|at| data.get(PAGE + at) == data.get(at)));
    device.rewind()
}
