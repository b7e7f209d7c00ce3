//! Scenarios of [`crate::path`] that measure the driver alone: one thread loads devices, or a stripe
//! of them, through their leaf queues, with the devices stepped in between.

use std::path::Path;

use node::{NodeSpec, OpenOptions, Parts};
use qcow::open::Format;
use reactor::Clock;

use crate::Error;
use crate::device::Load;
use crate::path::Totals;
use crate::rig::STRIPE;

/// Empty devices of 16 MiB.
pub(crate) fn devices(count: u8, scratch: &Path) -> Result<Vec<NodeSpec>, Error> {
    let device = |i: u8| {
        let path = scratch.join(format!("device{i}"));
        let file = std::fs::File::create(&path).and_then(|f| f.set_len(16 << 20));
        file.map_err(Error::other)?;
        Ok(NodeSpec::Model(node::ModelSpec::new(path)))
    };
    (0..count).map(device).collect()
}

/// What is driven.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum How {
    /// Devices, each through its queue.
    Apart,
    /// A stripe of devices.
    Striped,
    /// One device, through several queues.
    OneDevice,
}

/// One thread drives devices through their leaf queues, as deep each as asked.
pub(crate) fn drive(
    count: u8,
    how: How,
    depth: usize,
    requests: u64,
    scratch: &Path,
    run: &mut Totals,
) -> Result<u64, Error> {
    let mut nodes = devices(if how == How::OneDevice { 1 } else { count }, scratch)?;
    if how == How::Striped {
        nodes = vec![NodeSpec::Stripe(STRIPE, nodes)];
    }
    let (mut leaves, mut rests) = (Vec::new(), Vec::new());
    for spec in &nodes {
        let chain = node::open_chain(spec, &OpenOptions::read(Format::Raw))?;
        let (leaf, unit, rest) = Parts::new(chain)?.into_leaf();
        leaves.push((leaf, unit));
        rests.push(rest);
    }
    if how == How::OneDevice {
        let model = rests[0].models().next().ok_or_else(|| Error::other("there is no model"))?;
        for _ in 1..count {
            leaves.push((model.another_queue()?, 0));
        }
    }
    let mut steppers: Vec<_> = rests.iter_mut().flat_map(node::Rest::models).collect();
    let mut models: Vec<_> = steppers.iter_mut().filter_map(|m| m.take_device()).collect();
    let clock = Clock::real();
    let mut loads: Vec<Load<'_>> = leaves
        .iter_mut()
        .map(|(leaf, unit)| Load::new(leaf, *unit, depth, false))
        .collect::<Result<_, _>>()?;
    let mut done = 0;
    while done < requests {
        let now = clock.now();
        let n = run.measure(&clock, || measured_load(&mut loads, now))?;
        done += n as u64;
        for model in &mut models {
            while model.step(clock.now()) {}
        }
        run.turns += 1;
    }
    for (model, device) in steppers.into_iter().zip(models) {
        model.give_device(device)?;
    }
    for load in &mut loads {
        load.drain(&clock)?;
    }
    drop(loads);
    drop(leaves);
    for rest in rests {
        rest.finish_leaf()?;
    }
    Ok(done)
}

#[inline(never)]
fn measured_load(loads: &mut [Load<'_>], now: u64) -> Result<usize, Error> {
    let mut done = 0;
    for load in loads {
        done += load.poll(now, None)?;
        load.submit(now);
    }
    Ok(done)
}
