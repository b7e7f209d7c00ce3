//! `polldisk device identify`: a controller and its namespaces, as the driver sees them.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use node::{Admin, DeviceSpec};
use nvme::{BlockFormat, ControllerInfo, Namespace};
use serde::Serialize;

use crate::image::print::{self, Output, STDOUT, bytes};

/// Tell what a controller is and which namespaces it has.
#[derive(Args)]
pub(crate) struct Identify {
    #[command(flatten)]
    output: Output,
    /// The device: an address, vfio:ADDRESS[/NSID], vfio-user:SOCKET/NSID or model:PATH; one namespace only if it names
    /// one.
    #[arg(value_name = "NODE", value_parser = super::device)]
    device: DeviceSpec,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    node: String,
    vendor: String,
    model: String,
    serial: String,
    firmware: String,
    nvme_version: String,
    /// Most bytes that the driver moves with one command.
    max_command_size: u32,
    volatile_cache: bool,
    cache_enabled: bool,
    write_zeroes: bool,
    deallocate: bool,
    format: bool,
    crypto_erase: bool,
    /// A format, or a secure erase, of one namespace is one of all.
    format_all: bool,
    erase_all: bool,
    namespaces: Vec<Space>,
    /// Namespaces that the driver does not use, each with why.
    refused: Vec<Refused>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Space {
    nsid: u32,
    size: u64,
    lba_size: u32,
    physical_block_size: u32,
    read_only: bool,
    discard_granularity: u32,
    nguid: Option<String>,
    eui64: Option<String>,
    formats: Vec<Format>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Refused {
    nsid: u32,
    why: String,
    formats: Vec<Format>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Format {
    index: u8,
    lba_size: u64,
    metadata: u16,
    /// 0 best, 3 degraded.
    performance: u8,
    in_use: bool,
}

impl From<BlockFormat> for Format {
    fn from(f: BlockFormat) -> Format {
        let BlockFormat { index, block_size, metadata, performance, in_use } = f;
        Format { index, lba_size: block_size, metadata, performance, in_use }
    }
}

/// Looks and prints.
pub(crate) fn run(args: &Identify) -> anyhow::Result<()> {
    let mut admin = Admin::open(&args.device, false, reactor::Clock::real())?;
    let report = look(&mut admin, &args.device);
    let closed = admin.close();
    let report = report?;
    // What it said counts, even if it has ended badly since.
    if args.output.is_json() {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        text(&mut out, &report).and_then(|()| out.flush()).context(STDOUT)?;
    }
    Ok(closed?)
}

fn look(admin: &mut Admin, device: &DeviceSpec) -> anyhow::Result<Report> {
    let wanted = |nsid: u32| device.nsid().is_none_or(|n| n == nsid);
    let namespaces: Vec<Namespace> =
        admin.namespaces().iter().filter(|n| wanted(n.nsid)).cloned().collect();
    let refused: Vec<nvme::Refused> =
        admin.refused().iter().filter(|r| wanted(r.nsid)).cloned().collect();
    if let Some(nsid) = device.nsid()
        && namespaces.is_empty()
        && refused.is_empty()
    {
        anyhow::bail!("{device}: the device has no namespace {nsid}");
    }
    let ControllerInfo { vendor, model, serial, firmware, version, .. } = admin.info()?.clone();
    let info = admin.info()?;
    let mut report = Report {
        node: device.to_string(),
        vendor: format!("{vendor:04x}"),
        model,
        serial,
        firmware,
        nvme_version: format!("{}.{}", version.major(), version.minor()),
        max_command_size: info.max_command,
        volatile_cache: info.volatile_cache,
        cache_enabled: info.cache_enabled,
        write_zeroes: info.oncs.write_zeroes() != 0,
        deallocate: info.oncs.dsm() != 0,
        format: info.oacs.format() != 0,
        crypto_erase: info.fna.crypto() != 0,
        format_all: info.fna.format_all() != 0,
        erase_all: info.fna.erase_all() != 0,
        namespaces: Vec::new(),
        refused: Vec::new(),
    };
    let mut formats = |nsid: u32| -> anyhow::Result<Vec<Format>> {
        Ok(admin.block_formats(nsid)?.into_iter().map(Format::from).collect())
    };
    for n in namespaces {
        let id = |bytes: &[u8]| {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            bytes.iter().any(|&b| b != 0).then_some(hex)
        };
        report.namespaces.push(Space {
            nsid: n.nsid,
            size: n.info.size,
            lba_size: n.info.block_size,
            physical_block_size: n.info.physical_block_size,
            read_only: n.info.read_only,
            discard_granularity: n.info.discard_granularity,
            nguid: id(&n.nguid),
            eui64: id(&n.eui64),
            formats: formats(n.nsid)?,
        });
    }
    for r in refused {
        report.refused.push(Refused { nsid: r.nsid, why: r.why, formats: formats(r.nsid)? });
    }
    Ok(report)
}

fn text(out: &mut impl Write, r: &Report) -> std::io::Result<()> {
    writeln!(out, "{} {:?} firmware {}, NVMe {}", r.model, r.serial, r.firmware, r.nvme_version)?;
    let cache = match (r.volatile_cache, r.cache_enabled) {
        (false, _) => "none",
        (true, false) => "off",
        (true, true) => "on",
    };
    writeln!(out, "largest command {}, volatile cache {cache}", bytes(r.max_command_size.into()))?;
    let abilities = [
        (r.write_zeroes, "write zeroes"),
        (r.deallocate, "deallocate"),
        (r.format, "format"),
        (r.format && r.crypto_erase, "cryptographic erase"),
        (r.format && r.format_all, "a format is one of all namespaces"),
        (r.format && r.erase_all, "a secure erase is one of all namespaces"),
    ];
    let has: Vec<&str> = abilities.iter().filter(|a| a.0).map(|a| a.1).collect();
    writeln!(out, "has: {}", if has.is_empty() { "none".to_owned() } else { has.join(", ") })?;
    for n in &r.namespaces {
        let read_only = if n.read_only { ", read only" } else { "" };
        writeln!(
            out,
            "namespace {}: {}, blocks of {}{read_only}",
            n.nsid,
            bytes(n.size),
            n.lba_size
        )?;
        formats(out, &n.formats)?;
    }
    for n in &r.refused {
        writeln!(out, "namespace {}: not used: {}", n.nsid, n.why)?;
        formats(out, &n.formats)?;
    }
    Ok(())
}

fn formats(out: &mut impl Write, list: &[Format]) -> std::io::Result<()> {
    for f in list {
        let metadata = match f.metadata {
            0 => String::new(),
            n => format!(" with {n} of metadata"),
        };
        let speed = ["best", "better", "good", "degraded"][usize::from(f.performance & 3)];
        let in_use = if f.in_use { ", in use" } else { "" };
        writeln!(
            out,
            "  format {}: {}{metadata}, {speed} performance{in_use}",
            f.index, f.lba_size
        )?;
    }
    Ok(())
}
