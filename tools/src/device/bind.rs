//! `polldisk device bind` and `unbind`: a function from the kernel's driver to vfio-pci, and back.
//!
//! The only thing that is left behind is the function's `driver_override` in sysfs, which ends with
//! the next boot. Each way reads back what came of it, and undoes what it did if that is not what
//! was wanted.

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Serialize;
use vfio::{Address, Function};

use super::claim::Claim;
use super::host::Host;
use super::uses::{Use, Uses, disks};
use crate::image::print::{self, Output};

const VFIO: &str = "vfio-pci";
const NVME: &str = "nvme";

/// Functions of a group with these drivers are in nobody's way: the kernel itself says so of them.
const HARMLESS: [&str; 3] = [VFIO, "pci-stub", "pcieport"];

/// Give a device to polldisk: from the kernel's nvme driver to vfio-pci.
#[derive(Args)]
pub(crate) struct Bind {
    /// Where the device is, as `device list` names it.
    address: Address,
    #[command(flatten)]
    output: Output,
}

/// Give a device back to the kernel.
#[derive(Args)]
pub(crate) struct Unbind {
    /// Where the device is.
    address: Address,
    #[command(flatten)]
    output: Output,
}

/// What came of it.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Outcome {
    address: String,
    driver: String,
    previous_driver: Option<String>,
    /// False: it had that driver already.
    changed: bool,
    iommu_group: Option<u32>,
}

/// Runs `bind`.
pub(crate) fn bind(host: &Host, args: &Bind) -> anyhow::Result<()> {
    report(&args.output, &to_vfio(host, args.address)?)
}

/// Runs `unbind`.
pub(crate) fn unbind(host: &Host, args: &Unbind) -> anyhow::Result<()> {
    report(&args.output, &to_kernel(host, args.address)?)
}

fn report(output: &Output, outcome: &Outcome) -> anyhow::Result<()> {
    if output.is_json() {
        return print::json(outcome);
    }
    let Outcome { address, driver, previous_driver, changed, .. } = outcome;
    let before = previous_driver.as_deref().unwrap_or("no driver");
    print::line(&match changed {
        true => format!("{address} has the driver {driver} now (before: {before})"),
        false => format!("{address} has the driver {driver} already"),
    })
}

/// The function, if it is one for these commands.
fn function(host: &Host, address: Address) -> anyhow::Result<Function> {
    let function = host.sysfs().function(address)?;
    let class = function.class;
    ensure!(function.is_nvme(), "{address} is no NVMe controller (class {class:06x})");
    Ok(function)
}

fn to_vfio(host: &Host, address: Address) -> anyhow::Result<Outcome> {
    let function = function(host, address)?;
    let mut outcome = Outcome {
        address: address.to_string(),
        driver: VFIO.to_owned(),
        previous_driver: function.driver.clone(),
        changed: false,
        iommu_group: function.group.map(|g| g.number),
    };
    match function.driver.as_deref() {
        Some(VFIO) => return Ok(outcome),
        Some(NVME) | None => {}
        Some(other) => bail!(
            "the driver {other} has {address}, not the kernel's nvme driver; give it back first"
        ),
    }
    let file = host.pci(address, "driver_override");
    let wanted = override_of(host, &file)?;
    match wanted.as_deref() {
        None | Some(VFIO) => {}
        Some(other) => bail!(
            "somebody wants {address} to have the driver {other}; if that is over: \
             echo > /{file}"
        ),
    }
    let vfs = host.number(&host.pci(address, "sriov_numvfs")).unwrap_or(0);
    ensure!(vfs == 0, "{vfs} virtual functions of {address} would go with it");
    check_group(host, &function)?;
    if !host.has("sys/bus/pci/drivers/vfio-pci") {
        host.load(VFIO).context("the kernel's driver vfio-pci is not loaded")?;
        ensure!(
            host.has("sys/bus/pci/drivers/vfio-pci"),
            "the kernel has no driver vfio-pci even after `modprobe vfio-pci`; it is part of \
             linux-modules-extra or the like on some distributions"
        );
    }
    let claim = {
        let (controller, disks) = disks(host, &function);
        refuse_used(address, &Uses::look(host).of_disks(controller.as_deref(), &disks))?;
        Claim::disks(host, &disks)?
    };
    let change = |claim| {
        host.write(&file, &format!("{VFIO}\n"))?;
        let now = override_of(host, &file)?;
        ensure!(now.as_deref() == Some(VFIO), "driver_override did not take vfio-pci");
        change_driver(host, address, function.driver.as_deref(), Some(claim))?;
        let driver = host.sysfs().function(address)?.driver;
        ensure!(
            driver.as_deref() == Some(VFIO),
            "vfio-pci did not take {address} (the kernel's log says why: dmesg | grep {address})"
        );
        Ok(())
    };
    if let Err(e) = change(claim) {
        let was = function.driver.as_deref();
        return Err(e.context(back_to(host, address, was, wanted.as_deref())));
    }
    outcome.changed = true;
    Ok(outcome)
}

fn to_kernel(host: &Host, address: Address) -> anyhow::Result<Outcome> {
    let function = function(host, address)?;
    let file = host.pci(address, "driver_override");
    let wanted = override_of(host, &file)?;
    let mut outcome = Outcome {
        address: address.to_string(),
        driver: NVME.to_owned(),
        previous_driver: function.driver.clone(),
        changed: false,
        iommu_group: function.group.map(|g| g.number),
    };
    match (function.driver.as_deref(), wanted.as_deref()) {
        (Some(NVME), None) => return Ok(outcome),
        (Some(VFIO | NVME) | None, None | Some(VFIO)) => {}
        (_, Some(other)) if other != VFIO => bail!(
            "somebody wants {address} to have the driver {other}: that is not for this command"
        ),
        (other, _) => bail!("the driver {} has {address}, not vfio-pci", other.unwrap_or("?")),
    }
    if !host.has("sys/bus/pci/drivers/nvme") {
        host.load(NVME).context("the kernel's driver nvme is not loaded")?;
    }
    refuse_used(address, &Uses::look(host).of_vfio(&function))?;
    let claim = match function.driver.as_deref() {
        Some(VFIO) => Some(Claim::group(host, &function)?),
        _ => None,
    };
    let change = |claim| {
        host.write(&file, "\n")?;
        let now = override_of(host, &file)?;
        ensure!(now.is_none(), "driver_override could not be cleared");
        if function.driver.as_deref() != Some(NVME) {
            change_driver(host, address, function.driver.as_deref(), claim)?;
        }
        match host.sysfs().function(address)?.driver {
            Some(driver) if driver == VFIO => bail!(
                "vfio-pci took {address} again: its ids were written to new_id, or given to the \
                 module; remove them: echo {:04x} {:04x} > /sys/bus/pci/drivers/vfio-pci/remove_id",
                function.vendor,
                function.device
            ),
            Some(driver) => Ok(driver),
            None => bail!("no driver of the kernel took {address} (dmesg | grep {address})"),
        }
    };
    match change(claim) {
        Ok(driver) => {
            outcome.driver = driver;
            outcome.changed = true;
            Ok(outcome)
        }
        Err(e) => {
            let was = function.driver.as_deref();
            Err(e.context(back_to(host, address, was, wanted.as_deref())))
        }
    }
}

/// The driver that a function is meant for, if that was said.
fn override_of(host: &Host, file: &str) -> anyhow::Result<Option<String>> {
    ensure!(host.has(file), "there is no /{file}: the kernel is too old, or the device is gone");
    // Nothing at all is what some kernels show for no driver.
    Ok(host.line(file).filter(|t| t != "(null)"))
}

/// Takes a function from its driver, which ends the claim, and has the kernel look for one again.
fn change_driver(
    host: &Host,
    address: Address,
    from: Option<&str>,
    claim: Option<Claim>,
) -> anyhow::Result<()> {
    if let Some(driver) = from {
        host.write(&format!("sys/bus/pci/drivers/{driver}/unbind"), &address.to_string())?;
    }
    // Not later: an open disk would keep its name from being given to the next one.
    drop(claim);
    // An error here says that no driver took it: what counts is which one has it afterwards.
    if let Err(e) = host.write("sys/bus/pci/drivers_probe", &address.to_string()) {
        log::info!("{e}");
    }
    Ok(())
}

/// Puts a function back to what it was, and says how that went.
fn back_to(host: &Host, address: Address, driver: Option<&str>, wanted: Option<&str>) -> String {
    let file = host.pci(address, "driver_override");
    let restore = || {
        // First what brings the driver back, then what was wanted for the next time.
        let brings = driver.filter(|d| *d == VFIO);
        host.write(&file, &format!("{}\n", brings.unwrap_or_default()))?;
        let now = host.sysfs().function(address)?.driver;
        if now.as_deref() != driver {
            change_driver(host, address, now.as_deref(), None)?;
        }
        if brings != wanted {
            host.write(&file, &format!("{}\n", wanted.unwrap_or_default()))?;
        }
        let now = host.sysfs().function(address)?.driver;
        ensure!(now.as_deref() == driver, "it has {}", now.as_deref().unwrap_or("no driver"));
        Ok(())
    };
    let was = driver.unwrap_or("no driver");
    match restore() {
        Ok(()) => format!("failed; {address} is as it was ({was})"),
        Err(e) => format!(
            "failed, and {address} could not be put back to {was} ({e:#}); try: echo {} > /{file}; \
             echo {address} > /sys/bus/pci/drivers_probe",
            wanted.unwrap_or_default()
        ),
    }
}

/// Refuses a device that is used, and names all uses.
fn refuse_used(address: Address, uses: &[Use]) -> anyhow::Result<()> {
    if uses.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = uses.iter().map(ToString::to_string).collect();
    bail!("{address} is in use: {}", list.join("; "))
}

/// Refuses what could not be driven after the change: a function without an IOMMU, or one that
/// shares its group with functions that other drivers have.
fn check_group(host: &Host, function: &Function) -> anyhow::Result<()> {
    let address = function.address;
    let Some(group) = function.group else {
        let unsafe_mode = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
        if host.line(unsafe_mode).is_some_and(|v| v == "Y" || v == "1") {
            log::warn!("no IOMMU keeps {address} from memory: it can write anywhere");
            return Ok(());
        }
        bail!(
            "{address} is in no IOMMU group, so vfio-pci refuses it: switch the IOMMU on \
             (`polldisk device doctor` tells how)"
        );
    };
    let bridge = |a: Address| {
        host.line(&host.pci(a, "class")).is_some_and(|class| class.starts_with("0x06"))
    };
    let others: Vec<String> = host
        .sysfs()
        .members(group)
        .into_iter()
        .filter(|(a, _)| *a != address && !bridge(*a))
        .filter_map(|(a, driver)| Some((a, driver?)))
        .filter(|(_, driver)| !HARMLESS.contains(&driver.as_str()))
        .map(|(a, driver)| format!("{a} (driver {driver})"))
        .collect();
    ensure!(
        others.is_empty(),
        "{address} shares IOMMU group {} with {}: they cannot be kept apart, so those must be \
         without a driver or have vfio-pci first",
        group.number,
        others.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests;
