//! `polldisk device health`: the SMART / health log in words.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use node::{Admin, DeviceSpec};
use nvme_spec::{CriticalWarning, SmartLog};
use serde::Serialize;

use crate::image::print::{self, Output, STDOUT, bytes};

/// Tell how a drive is; exit code 1 if it warns.
#[derive(Args)]
pub(crate) struct Health {
    #[command(flatten)]
    output: Output,
    /// The device: an address, vfio:ADDRESS, vfio-user:SOCKET/NSID or model:PATH.
    #[arg(value_name = "NODE", value_parser = super::device)]
    device: DeviceSpec,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    node: String,
    model: String,
    serial: String,
    critical_warnings: Vec<String>,
    /// Degrees Celsius; null if the drive does not say.
    temperature: Option<i32>,
    sensors: Vec<i32>,
    /// Percent.
    available_spare: u8,
    spare_threshold: u8,
    /// Percent of the life that the maker expects; may exceed 100.
    percentage_used: u8,
    data_read_bytes: u64,
    data_written_bytes: u64,
    read_commands: u64,
    write_commands: u64,
    busy_minutes: u64,
    power_cycles: u64,
    power_on_hours: u64,
    unsafe_shutdowns: u64,
    media_errors: u64,
    error_log_entries: u64,
    warning_temperature_minutes: u32,
    critical_temperature_minutes: u32,
}

/// Reads the log and prints it.
pub(crate) fn run(args: &Health) -> anyhow::Result<u8> {
    let mut admin = Admin::open(&args.device, false, reactor::Clock::real())?;
    let read = admin.smart();
    let name = admin.info().map(|i| (i.model.clone(), i.serial.clone()));
    let closed = admin.close();
    let report = decode(args.device.to_string(), name?, &read?);
    if args.output.is_json() {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        text(&mut out, &report).and_then(|()| out.flush()).context(STDOUT)?;
    }
    closed?;
    Ok(u8::from(!report.critical_warnings.is_empty()))
}

/// Bits of the critical warning in words; such as are not known, too.
fn warnings(bits: u8) -> Vec<String> {
    let w = CriticalWarning(bits);
    let known = [
        (w.spare(), "the spare capacity is below its threshold"),
        (w.temperature(), "the temperature is outside its thresholds"),
        (w.reliability(), "the reliability is degraded by media or internal errors"),
        (w.read_only(), "the media are read only"),
        (w.backup(), "the backup of the volatile memory has failed"),
    ];
    let mut words: Vec<String> =
        known.iter().filter(|(set, _)| *set != 0).map(|(_, text)| (*text).to_owned()).collect();
    if bits & 0xe0 != 0 {
        words.push(format!("other warnings: {:#04x}", bits & 0xe0));
    }
    words
}

fn decode(node: String, (model, serial): (String, String), log: &SmartLog) -> Report {
    // 128 bits on the wire; a drive that counts so far lies.
    let count = |n: zerocopy::little_endian::U128| u64::try_from(n.get()).unwrap_or(u64::MAX);
    let units = |n| count(n).saturating_mul(512_000);
    let celsius = |kelvin: u16| (kelvin != 0).then(|| i32::from(kelvin) - 273);
    Report {
        node,
        model,
        serial,
        critical_warnings: warnings(log.critical_warning),
        temperature: celsius(log.temperature.get()),
        sensors: log.sensors.iter().filter_map(|s| celsius(s.get())).collect(),
        available_spare: log.available_spare,
        spare_threshold: log.spare_threshold,
        percentage_used: log.percentage_used,
        data_read_bytes: units(log.data_units_read),
        data_written_bytes: units(log.data_units_written),
        read_commands: count(log.host_reads),
        write_commands: count(log.host_writes),
        busy_minutes: count(log.busy_minutes),
        power_cycles: count(log.power_cycles),
        power_on_hours: count(log.power_on_hours),
        unsafe_shutdowns: count(log.unsafe_shutdowns),
        media_errors: count(log.media_errors),
        error_log_entries: count(log.error_log_entries),
        warning_temperature_minutes: log.warning_minutes.get(),
        critical_temperature_minutes: log.critical_minutes.get(),
    }
}

fn text(out: &mut impl Write, r: &Report) -> std::io::Result<()> {
    writeln!(out, "{} {:?}", r.model, r.serial)?;
    for warning in &r.critical_warnings {
        writeln!(out, "CRITICAL: {warning}")?;
    }
    if r.critical_warnings.is_empty() {
        writeln!(out, "no critical warning")?;
    }
    let degrees = |t: i32| format!("{t} °C");
    let sensors: Vec<String> = r.sensors.iter().map(|&t| degrees(t)).collect();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<22}{value}");
    line("temperature", r.temperature.map_or("?".to_owned(), degrees))?;
    if !sensors.is_empty() {
        line("sensors", sensors.join(", "))?;
    }
    let spare = format!("{} % (threshold {} %)", r.available_spare, r.spare_threshold);
    line("available spare", spare)?;
    line("life used", format!("{} %", r.percentage_used))?;
    line("data read", bytes(r.data_read_bytes))?;
    line("data written", bytes(r.data_written_bytes))?;
    for (name, value) in [
        ("read commands", r.read_commands),
        ("write commands", r.write_commands),
        ("busy minutes", r.busy_minutes),
        ("power cycles", r.power_cycles),
        ("power-on hours", r.power_on_hours),
        ("unsafe shutdowns", r.unsafe_shutdowns),
        ("media errors", r.media_errors),
        ("error log entries", r.error_log_entries),
        ("minutes too warm", r.warning_temperature_minutes.into()),
        ("minutes far too warm", r.critical_temperature_minutes.into()),
    ] {
        line(name, value.to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    fn report(patch: impl FnOnce(&mut [u8])) -> Report {
        let mut bytes = [0u8; 512];
        patch(&mut bytes);
        let name = ("m".to_owned(), "s".to_owned());
        decode("n".to_owned(), name, &SmartLog::read_from_bytes(&bytes).unwrap())
    }

    #[test]
    fn a_log_in_words() {
        let r = report(|b| {
            b[0] = 0b1000_1010;
            b[1..3].copy_from_slice(&310u16.to_le_bytes());
            b[3..6].copy_from_slice(&[97, 10, 120]);
            b[32] = 3;
            b[48] = 2;
            b[112] = 9;
            b[144] = 4;
            b[200..202].copy_from_slice(&263u16.to_le_bytes());
        });
        let said = [
            "the temperature is outside its thresholds",
            "the media are read only",
            "other warnings: 0x80",
        ];
        assert_eq!(r.critical_warnings, said);
        assert_eq!((r.temperature, r.sensors.as_slice()), (Some(37), [-10].as_slice()));
        assert_eq!((r.available_spare, r.spare_threshold, r.percentage_used), (97, 10, 120));
        assert_eq!((r.data_read_bytes, r.data_written_bytes), (1_536_000, 1_024_000));
        assert_eq!((r.power_cycles, r.unsafe_shutdowns), (9, 4));
        let mut out = Vec::new();
        text(&mut out, &r).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("CRITICAL: the media are read only\n"), "{text}");
        assert!(text.contains("temperature           37 °C\n"), "{text}");
    }

    #[test]
    fn absurd_numbers_do_not_wrap() {
        let r = report(|b| b.fill(0xff));
        assert_eq!((r.data_read_bytes, r.power_cycles), (u64::MAX, u64::MAX));
        assert_eq!(r.temperature, Some(65262));
        assert_eq!(report(|_| ()).temperature, None);
        assert!(report(|_| ()).critical_warnings.is_empty());
        assert_eq!(warnings(0xff).len(), 6);
    }
}
