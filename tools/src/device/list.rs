//! `polldisk device list`: every NVMe function of the host, without disturbing any.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::host::Host;
use super::uses::{Use, Uses, disks};
use crate::image::print::{self, Output, STDOUT};

/// List the NVMe devices of this host, which driver has each, and what uses it.
#[derive(Args)]
pub(crate) struct List {
    #[command(flatten)]
    output: Output,
}

/// A device. What only its driver knows is null where that is not the kernel's.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Device {
    address: String,
    vendor: String,
    device: String,
    model: Option<String>,
    serial: Option<String>,
    firmware: Option<String>,
    driver: Option<String>,
    iommu_group: Option<u32>,
    /// The group is made up by the kernel's no-IOMMU mode.
    no_iommu: bool,
    numa_node: Option<u32>,
    controller: Option<String>,
    namespaces: Option<Vec<Namespace>>,
    /// Null if it cannot be known.
    in_use_by: Option<Vec<Use>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Namespace {
    nsid: Option<u64>,
    name: String,
    size: Option<u64>,
    lba_size: Option<u64>,
}

/// Lists them.
pub(crate) fn run(host: &Host, args: &List) -> anyhow::Result<()> {
    let (devices, partial) = look(host)?;
    if partial {
        tell!("polldisk: not all processes can be looked into; run as root to see all users");
    }
    if args.output.is_json() {
        return print::json(&devices);
    }
    let mut out = print::out();
    table(&mut out, &devices).and_then(|()| out.flush()).context(STDOUT)
}

fn look(host: &Host) -> anyhow::Result<(Vec<Device>, bool)> {
    let functions = host.sysfs().nvme()?;
    let uses = Uses::look(host);
    let mut devices = Vec::new();
    for f in functions {
        let (controller, disks) = disks(host, &f);
        let of = |file: &str| {
            host.line(&host.pci(f.address, &format!("nvme/{}/{file}", controller.as_deref()?)))
        };
        let in_use_by = match f.driver.as_deref() {
            Some("nvme") => Some(uses.of_disks(controller.as_deref(), &disks)),
            Some(d) if d.ends_with("vfio-pci") => Some(uses.of_vfio(&f)),
            None => Some(Vec::new()),
            Some(_) => None,
        };
        let namespaces = controller.is_some().then(|| {
            let one = |d: super::uses::Disk| Namespace {
                nsid: d.nsid,
                name: d.name,
                size: d.size,
                lba_size: d.lba,
            };
            disks.into_iter().map(one).collect()
        });
        devices.push(Device {
            address: f.address.to_string(),
            vendor: format!("{:04x}", f.vendor),
            device: format!("{:04x}", f.device),
            model: of("model"),
            serial: of("serial"),
            firmware: of("firmware_rev"),
            driver: f.driver,
            iommu_group: f.group.map(|g| g.number),
            no_iommu: f.group.is_some_and(|g| g.no_iommu),
            numa_node: f.numa_node,
            controller,
            namespaces,
            in_use_by,
        });
    }
    Ok((devices, uses.partial))
}

const COLUMNS: [&str; 10] =
    ["ADDRESS", "MODEL", "SERIAL", "NS", "SIZE", "LBA", "DRIVER", "GROUP", "NUMA", "IN USE BY"];

/// A line for each namespace, or for a device of which none is known.
fn table(out: &mut impl Write, devices: &[Device]) -> std::io::Result<()> {
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    for d in devices {
        let text = |t: &Option<String>| t.clone().unwrap_or("?".to_owned());
        let number = |n: Option<u32>| n.map_or("-".to_owned(), |n| n.to_string());
        let uses = match &d.in_use_by {
            None => "?".to_owned(),
            Some(uses) if uses.is_empty() => "-".to_owned(),
            Some(uses) => uses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        };
        let mut row = [
            d.address.clone(),
            text(&d.model),
            text(&d.serial),
            "?".to_owned(),
            "?".to_owned(),
            "?".to_owned(),
            d.driver.clone().unwrap_or("-".to_owned()),
            number(d.iommu_group),
            number(d.numa_node),
            uses,
        ];
        let namespaces = d.namespaces.as_deref().unwrap_or_default();
        if d.namespaces.is_some() && namespaces.is_empty() {
            row[3..6].fill("-".to_owned());
        }
        let Some((first, more)) = namespaces.split_first() else {
            rows.push(row);
            continue;
        };
        let known = |n: Option<u64>| n.map_or("?".to_owned(), |n| n.to_string());
        let of = |n: &Namespace| {
            let size = n.size.map_or("?".to_owned(), print::bytes);
            [known(n.nsid), size, known(n.lba_size)]
        };
        row[3..6].clone_from_slice(&of(first));
        rows.push(row);
        for n in more {
            let mut row = [const { String::new() }; COLUMNS.len()];
            row[3..6].clone_from_slice(&of(n));
            rows.push(row);
        }
    }
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, &w)| format!("{cell:<w$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::fake::Fake;

    const A: &str = "0000:01:00.0";
    const B: &str = "0000:02:00.0";

    #[test]
    fn devices_of_the_kernel_and_of_vfio() {
        let fake = Fake::new();
        fake.nvme(A, 0).group(1, &[A]).partition("nvme0n1", 1);
        fake.multipath(A, "nvme0", "nvme0c0n2", "nvme0n2");
        fake.function(B).driver(B, "vfio-pci").group(2, &[B]);
        fake.file("sys/kernel/iommu_groups/2/name", "vfio-noiommu\n");
        fake.process(5, "qemu", &["/dev/vfio/noiommu-2"]);
        fake.function("0000:03:00.0").function("0000:04:00.0").driver("0000:04:00.0", "uio");
        let number = fake.device_number("nvme0n1p1");
        fake.mount(&format!("1 2 {number} / /boot rw - vfat /dev/nvme0n1p1 rw"));
        let (devices, partial) = look(&fake.host()).unwrap();
        assert!(!partial);
        let json = serde_json::to_value(&devices).unwrap();
        let a = &json[0];
        assert_eq!(a["address"], A);
        assert_eq!(
            (&a["model"], &a["serial"]),
            (&"INTEL SSDPE21K375GA".into(), &"PHKE0000".into())
        );
        assert_eq!((&a["driver"], &a["iommu-group"]), (&"nvme".into(), &1.into()));
        assert_eq!((&a["numa-node"], &a["vendor"]), (&1.into(), &"8086".into()));
        assert_eq!(a["namespaces"][0]["size"], 1 << 30);
        assert_eq!(a["namespaces"][1]["name"], "nvme0n2");
        assert_eq!(a["in-use-by"][0]["by"], "/boot");
        let b = &json[1];
        assert!(b["model"].is_null() && b["namespaces"].is_null());
        assert_eq!((&b["no-iommu"], &b["in-use-by"][0]["by"]), (&true.into(), &"qemu (5)".into()));
        assert!(json[2]["driver"].is_null() && json[2]["in-use-by"].as_array().unwrap().is_empty());
        assert!(json[3]["in-use-by"].is_null(), "nobody knows what another driver does with it");
        let mut text = Vec::new();
        table(&mut text, &devices).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert_eq!(lines[1][3..6], ["PHKE0000", "1", "1"], "{text}");
        assert!(text.contains("nvme0n1p1 mounted on /boot"), "{text}");
        assert_eq!(lines[2], ["2", "1", "GiB", "512"], "{text}");
        assert_eq!(lines[3][..5], [B, "?", "?", "?", "?"], "{text}");
    }

    #[test]
    fn odd_hosts() {
        let fake = Fake::new();
        assert!(look(&fake.host()).unwrap().0.is_empty());
        // A controller that is just going away, and one that says nonsense.
        fake.nvme(A, 0).remove("sys/block/nvme0n1");
        fake.file(&format!("sys/bus/pci/devices/{A}/nvme/nvme0/model"), "\x1b]0;x\x07\n");
        fake.file(&format!("sys/bus/pci/devices/{A}/nvme/nvme0/serial"), "");
        fake.file("sys/bus/pci/devices/garbage/class", "0x010802\n");
        let (devices, _) = look(&fake.host()).unwrap();
        assert_eq!(devices.len(), 1);
        assert_eq!(devices[0].model.as_deref(), Some("?]0;x?"));
        assert_eq!(devices[0].serial, None);
        assert_eq!(devices[0].namespaces.as_ref().unwrap()[0].size, None);
        fake.file(&format!("sys/bus/pci/devices/{A}/vendor"), "what?\n");
        let e = look(&fake.host()).unwrap_err().to_string();
        assert!(e.contains("vendor") && e.contains("is no number"), "{e}");
        fake.remove("sys/bus/pci/devices");
        assert!(look(&fake.host()).unwrap_err().to_string().contains("sys/bus/pci/devices"));
    }
}
