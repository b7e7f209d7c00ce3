//! Processors for threads that poll: isolated, at full speed, with a clock that costs no system
//! call. None of it is needed for `vfio:` to work. `bench doctor` looks at the same, and more.

use compare::doctor::{Check, State, processors};

use super::Finding;
use crate::device::host::Host;

pub(super) fn look(host: &Host, found: &mut Vec<Finding>) {
    found.extend(processors(host).into_iter().map(finding));
}

fn finding(check: Check) -> Finding {
    match (check.state, check.advice) {
        (State::Warn, Some(advice)) => {
            Finding::warning(check.name, format!("{}: {}", check.found, check.why), advice)
        }
        _ => Finding::ok(check.name, check.found),
    }
}
