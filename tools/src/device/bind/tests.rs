//! Every refusal, and every step that may fail.

use nix::errno::Errno;

use super::*;
use crate::device::fake::Fake;
use crate::output::explain;

const A: &str = "0000:01:00.0";
const B: &str = "0000:01:00.1";

fn at(address: &str) -> Address {
    address.parse().unwrap()
}

/// An NVMe device of the kernel's, with a partition, in a group of its own.
fn fake() -> Fake {
    let fake = Fake::new();
    fake.nvme(A, 0).partition("nvme0n1", 1).group(7, &[A]);
    fake
}

fn no(result: anyhow::Result<Outcome>) -> String {
    explain(&result.unwrap_err())
}

/// `bind` refuses, and touches nothing.
#[track_caller]
fn refused(fake: &Fake, part: &str) {
    let text = no(to_vfio(&fake.host(), at(A)));
    assert!(text.contains(part), "{text}");
    assert_eq!(fake.writes(), [""; 0]);
}

#[test]
fn there_and_back() {
    let fake = fake();
    let outcome = to_vfio(&fake.host(), at(A)).unwrap();
    let (address, driver) = (A.to_owned(), "vfio-pci".to_owned());
    let previous_driver = Some("nvme".to_owned());
    let iommu_group = Some(7);
    assert_eq!(outcome, Outcome { address, driver, previous_driver, changed: true, iommu_group });
    assert_eq!(fake.driver_of(A).unwrap(), "vfio-pci");
    assert_eq!(fake.driver_override(A), "vfio-pci");
    assert!(!to_vfio(&fake.host(), at(A)).unwrap().changed, "a second time changes nothing");
    let outcome = to_kernel(&fake.host(), at(A)).unwrap();
    assert_eq!((outcome.driver.as_str(), outcome.changed), ("nvme", true));
    assert_eq!(fake.driver_of(A).unwrap(), "nvme");
    assert_eq!(fake.driver_override(A), "(null)");
    assert!(!to_kernel(&fake.host(), at(A)).unwrap().changed);
    assert_eq!(
        fake.writes(),
        [
            "driver_override=vfio-pci",
            "unbind=0000:01:00.0",
            "drivers_probe=0000:01:00.0",
            "driver_override=",
            "unbind=0000:01:00.0",
            "drivers_probe=0000:01:00.0",
        ]
    );
}

#[test]
fn a_device_without_a_driver_is_taken_too() {
    let fake = Fake::new();
    fake.function(A).group(7, &[A]);
    assert_eq!(to_vfio(&fake.host(), at(A)).unwrap().previous_driver, None);
    assert_eq!(fake.driver_of(A).unwrap(), "vfio-pci");
}

#[test]
fn a_mounted_device() {
    let fake = fake();
    let number = fake.device_number("nvme0n1");
    fake.mount(&format!("36 35 {number} / /data rw - ext4 /dev/nvme0n1 rw"));
    refused(&fake, "0000:01:00.0 is in use: nvme0n1 mounted on /data");
}

#[test]
fn a_mounted_partition() {
    let fake = fake();
    let number = fake.device_number("nvme0n1p1");
    fake.mount(&format!("36 35 {number} / / rw - ext4 /dev/root rw"));
    refused(&fake, "nvme0n1p1 mounted on /");
}

#[test]
fn swap_lvm_md_and_open_devices() {
    let used: [fn(&Fake) -> &Fake; 5] = [
        |f| f.swap("/dev/nvme0n1p1 partition 1 2 3"),
        |f| f.holder("nvme0n1/nvme0n1p1", "dm-0").dm("dm-0", "vg-lv", "LVM-x"),
        |f| f.holder("nvme0n1", "md0"),
        |f| f.process(7, "dd", &["/dev/nvme0n1p1"]),
        |f| f.process(7, "nvme", &["/dev/nvme0"]),
    ];
    let parts = ["p1 is swap", "lvm vg-lv (dm-0)", "md md0", "open by dd (7)", "open by nvme (7)"];
    for (make, part) in used.into_iter().zip(parts) {
        let fake = fake();
        make(&fake);
        refused(&fake, part);
    }
}

#[test]
fn a_disk_that_cannot_be_claimed() {
    let fake = fake();
    fake.remove("dev/nvme0n1");
    refused(&fake, "to see that nobody uses it");
}

#[test]
fn a_group_with_others() {
    let fake = Fake::new();
    fake.nvme(A, 0).nvme(B, 1).function("0000:00:01.0").function("0000:01:00.2");
    fake.file("sys/bus/pci/devices/0000:00:01.0/class", "0x060400\n");
    fake.driver("0000:00:01.0", "pcieport").driver("0000:01:00.2", "pci-stub");
    fake.group(3, &[A, B, "0000:00:01.0", "0000:01:00.2"]);
    refused(&fake, "shares IOMMU group 3 with 0000:01:00.1 (driver nvme): ");
    // Once nobody has the other one, it is in nobody's way.
    fake.remove(&format!("sys/bus/pci/devices/{B}/driver"));
    to_vfio(&fake.host(), at(A)).unwrap();
    assert_eq!(fake.driver_of(A).unwrap(), "vfio-pci");
}

#[test]
fn without_an_iommu() {
    let fake = Fake::new();
    fake.nvme(A, 0);
    refused(&fake, "is in no IOMMU group");
    fake.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    // The kernel makes the group up only when the driver is there; here it does not, and the
    // device is put back.
    let text = no(to_vfio(&fake.host(), at(A)));
    assert!(
        text.starts_with("failed; 0000:01:00.0 is as it was (nvme): vfio-pci did not"),
        "{text}"
    );
    assert_eq!(
        (fake.driver_of(A).unwrap().as_str(), fake.driver_override(A).as_str()),
        ("nvme", "(null)")
    );
}

#[test]
fn the_driver_is_loaded_if_it_is_missing() {
    let fake = fake();
    fake.remove("sys/bus/pci/drivers/vfio-pci");
    refused(&fake, "cannot run `modprobe vfio-pci`");
    fake.modprobe("echo 'FATAL: Module vfio-pci not found' >&2; exit 1");
    refused(&fake, "not loaded: `modprobe vfio-pci` failed: FATAL: Module vfio-pci not found");
    fake.modprobe("exit 0");
    refused(&fake, "no driver vfio-pci even after");
    fake.modprobe("mkdir -p sys/bus/pci/drivers/$1; : > sys/bus/pci/drivers/$1/unbind");
    to_vfio(&fake.host(), at(A)).unwrap();
    assert_eq!(fake.driver_of(A).unwrap(), "vfio-pci");
}

#[test]
fn what_is_no_nvme_device_of_the_kernels() {
    let fake = fake();
    fake.file(&format!("sys/bus/pci/devices/{A}/class"), "0x020000\n");
    refused(&fake, "is no NVMe controller (class 020000)");
    for text in ["", "garbage", "0x", "0xfffffffff"] {
        fake.file(&format!("sys/bus/pci/devices/{A}/class"), text);
        let said = no(to_vfio(&fake.host(), at(A)));
        assert!(said.contains("class"), "{said}");
    }
    fake.file(&format!("sys/bus/pci/devices/{A}/class"), "0x010802\n");
    fake.remove(&format!("sys/bus/pci/devices/{A}/driver")).driver(A, "uio_pci_generic");
    refused(&fake, "the driver uio_pci_generic has");
    let text = no(to_kernel(&fake.host(), at(A)));
    assert!(text.contains("uio_pci_generic has 0000:01:00.0, not vfio-pci"), "{text}");
    let text = no(to_vfio(&fake.host(), at(B)));
    assert!(text.contains("no PCI function at 0000:01:00.1; NVMe controllers are at 0000:01:00.0"));
}

#[test]
fn what_others_want_of_it() {
    let fake = fake();
    fake.file(&format!("sys/bus/pci/devices/{A}/driver_override"), "pci-stub\n");
    refused(&fake, "somebody wants 0000:01:00.0 to have the driver pci-stub");
    assert!(no(to_kernel(&fake.host(), at(A))).contains("driver pci-stub"));
    fake.file(&format!("sys/bus/pci/devices/{A}/driver_override"), "");
    fake.file(&format!("sys/bus/pci/devices/{A}/sriov_numvfs"), "4\n");
    refused(&fake, "4 virtual functions");
    fake.file(&format!("sys/bus/pci/devices/{A}/sriov_numvfs"), "0\n");
    fake.remove(&format!("sys/bus/pci/devices/{A}/driver_override"));
    refused(&fake, "the kernel is too old");
}

/// Whatever step of `bind` fails, the device is with the kernel's driver afterwards.
#[test]
fn a_step_of_bind_fails() {
    for (file, errno, part) in [
        ("driver_override", Errno::EACCES, "driver_override: EACCES"),
        ("driver_override", Errno::ENOSPC, "cannot write"),
        ("nvme/unbind", Errno::EIO, "unbind"),
        ("drivers_probe", Errno::EINVAL, "vfio-pci did not take"),
    ] {
        let fake = fake();
        fake.fail(file, 0, errno);
        let text = no(to_vfio(&fake.host(), at(A)));
        assert!(text.starts_with("failed; 0000:01:00.0 is as it was (nvme): "), "{file}: {text}");
        assert!(text.contains(part.split(": ").next().unwrap()), "{file}: {text}");
        assert_eq!(fake.driver_of(A).unwrap(), "nvme", "{file}");
        assert_eq!(fake.driver_override(A), "(null)", "{file}");
    }
    let fake = fake();
    fake.fail("driver_override", 0, Errno::EACCES);
    assert!(no(to_vfio(&fake.host(), at(A))).ends_with("run as root"));
}

/// What was wanted for the next time the device is looked for is wanted again.
#[test]
fn a_step_of_bind_fails_where_vfio_pci_was_wanted_already() {
    let fake = fake();
    fake.file(&format!("sys/bus/pci/devices/{A}/driver_override"), "vfio-pci\n");
    fake.fail("nvme/unbind", 0, Errno::EIO);
    let text = no(to_vfio(&fake.host(), at(A)));
    assert!(text.starts_with("failed; 0000:01:00.0 is as it was (nvme): "), "{text}");
    assert_eq!(fake.driver_of(A).unwrap(), "nvme");
    assert_eq!(fake.driver_override(A), "vfio-pci");
}

#[test]
fn a_step_back_fails_too() {
    let fake = fake();
    fake.fail("drivers_probe", 0, Errno::EINVAL).fail("drivers_probe", 1, Errno::EINVAL);
    let text = no(to_vfio(&fake.host(), at(A)));
    assert!(text.contains("could not be put back to nvme (it has no driver)"), "{text}");
    assert!(text.contains("echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"), "{text}");
    // Both commands mend it.
    assert_eq!(to_kernel(&fake.host(), at(A)).unwrap().driver, "nvme");
}

#[test]
fn a_driver_that_refuses_the_device() {
    let fake = fake();
    fake.refusing("vfio-pci");
    assert!(no(to_vfio(&fake.host(), at(A))).contains("vfio-pci did not take"));
    assert_eq!(fake.driver_of(A).unwrap(), "nvme");
}

#[test]
fn unbind_refuses_a_group_in_use() {
    let fake = fake();
    to_vfio(&fake.host(), at(A)).unwrap();
    fake.process(99, "polldisk", &["/dev/vfio/7"]);
    let (before, text) = (fake.writes(), no(to_kernel(&fake.host(), at(A))));
    assert!(text.ends_with("is in use: vfio/7 open by polldisk (99)"), "{text}");
    assert_eq!((fake.writes(), fake.driver_of(A).unwrap().as_str()), (before, "vfio-pci"));
}

/// Whatever step of `unbind` fails, vfio-pci has the device afterwards.
#[test]
fn a_step_of_unbind_fails() {
    for (file, nth, errno, part) in [
        ("driver_override", 1, Errno::EIO, "cannot write"),
        ("vfio-pci/unbind", 0, Errno::EBUSY, "unbind"),
        ("drivers_probe", 1, Errno::EINVAL, "no driver of the kernel took"),
    ] {
        let fake = fake();
        to_vfio(&fake.host(), at(A)).unwrap();
        fake.fail(file, nth, errno);
        let text = no(to_kernel(&fake.host(), at(A)));
        assert!(text.starts_with("failed; 0000:01:00.0 is as it was (vfio-pci): "), "{text}");
        assert!(text.contains(part), "{file}: {text}");
        assert_eq!(fake.driver_of(A).unwrap(), "vfio-pci", "{file}");
        assert_eq!(fake.driver_override(A), "vfio-pci", "{file}");
    }
}

#[test]
fn unbind_loads_the_kernels_driver_or_touches_nothing() {
    let fake = fake();
    to_vfio(&fake.host(), at(A)).unwrap();
    fake.remove("sys/bus/pci/drivers/nvme");
    let before = fake.writes();
    assert!(no(to_kernel(&fake.host(), at(A))).contains("driver nvme is not loaded"));
    assert_eq!(fake.writes(), before);
    fake.modprobe("mkdir -p sys/bus/pci/drivers/$1; : > sys/bus/pci/drivers/$1/unbind");
    assert_eq!(to_kernel(&fake.host(), at(A)).unwrap().driver, "nvme");
}

#[test]
fn a_device_that_vanishes_meanwhile() {
    let fake = fake();
    // The folder goes with the driver: no panic, and the text says what is there.
    fake.fail("nvme/unbind", 0, Errno::ENODEV);
    let host = fake.host();
    std::fs::remove_file(fake.path("dev/nvme0n1")).unwrap();
    std::fs::remove_dir_all(fake.path("sys/block/nvme0n1")).unwrap();
    let text = no(to_vfio(&host, at(A)));
    assert!(text.contains("cannot open"), "{text}");
    fake.remove(&format!("sys/bus/pci/devices/{A}"));
    let text = no(to_vfio(&host, at(A)));
    assert!(text.contains("no NVMe controller at all"), "{text}");
}
