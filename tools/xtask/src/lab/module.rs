//! Builds the kernel's module `vfio` once more, with support for devices without an IOMMU: Debian's
//! kernels leave that out. Only this module differs; the others are the kernel's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program, say};
use crate::tools;

/// Compiling a few files; the machine may be busy.
const COMPILE: Duration = Duration::from_secs(300);

/// The module for the kernel `release` (`6.1.0-56-cloud-amd64`), from the cache or built now.
pub(super) fn vfio_without_iommu(release: &str) -> Result<Vec<u8>> {
    let built = crate::cache().join("lab-vfio").join(format!("vfio-{release}.ko"));
    if !built.is_file() {
        build(release, &built).context("building the module vfio")?;
    }
    Ok(fs::read(built)?)
}

fn build(release: &str, to: &Path) -> Result<()> {
    tools::need(&["make", "gcc", "xz"])?;
    let headers = tools::unpack("kernel-headers", || {
        let package = format!("linux-headers-{release}");
        let mut packages = tools::depends(&package)?;
        packages.push(package);
        Ok(packages)
    })?;
    let series = series(release)?;
    let source = tools::unpack("kernel-source", || Ok(vec![format!("linux-source-{series}")]))?;
    let folder = to.with_extension("build");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    say("building the module vfio for devices without an IOMMU");
    let name = format!("linux-source-{series}");
    cmd::ok_within(
        program("tar", ["-xJf"])
            .arg(source.join(format!("usr/src/{name}.tar.xz")))
            .arg("-C")
            .arg(&folder)
            .args(["--strip-components=3", &format!("{name}/drivers/vfio")]),
        COMPILE,
    )?;
    let makefile = folder.join("Makefile");
    let lines = only_vfio(&fs::read_to_string(&makefile)?);
    fs::write(&makefile, format!("{lines}ccflags-y += -DCONFIG_VFIO_NOIOMMU=1\n"))?;
    let kernel = headers.join(format!("usr/src/linux-headers-{release}"));
    use_from(&kernel.join("Makefile"), &headers)?;
    cmd::ok_within(
        // The compiler's exact version does not matter to a module that is loaded in a lab.
        program("make", ["CC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES="])
            .arg("-C")
            .arg(&kernel)
            .arg(format!("M={}", folder.display()))
            .arg("modules"),
        COMPILE,
    )?;
    fs::rename(folder.join("vfio.ko"), to)?;
    fs::remove_dir_all(&folder)?;
    Ok(())
}

/// `6.1` for `6.1.0-56-cloud-amd64`.
fn series(release: &str) -> Result<String> {
    let mut numbers = release.split('.');
    match (numbers.next(), numbers.next()) {
        (Some(a), Some(b)) if !a.is_empty() && !b.is_empty() => Ok(format!("{a}.{b}")),
        _ => bail!("{release:?} is no kernel release"),
    }
}

/// The lines of the driver's Makefile that are about the module `vfio` itself.
fn only_vfio(makefile: &str) -> String {
    let other = |line: &&str| line.starts_with("obj-") && !line.ends_with(" vfio.o");
    makefile.lines().filter(|l| !other(l)).map(|line| format!("{line}\n")).collect()
}

/// The headers name each other by where they would be installed.
fn use_from(makefile: &PathBuf, root: &Path) -> Result<()> {
    let text = fs::read_to_string(makefile)?;
    let here = format!("include {}/usr/src/", root.display());
    if !text.contains(&here) {
        fs::write(makefile, text.replace("include /usr/src/", &here))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_module_is_built() {
        let makefile = "# x\nobj-$(CONFIG_VFIO) += vfio.o\n\nvfio-y += vfio_main.o \\\n\
                        \t  container.o\nvfio-$(CONFIG_A) += a.o\n\
                        obj-$(CONFIG_VFIO_IOMMU_TYPE1) += vfio_iommu_type1.o\nobj-$(CONFIG_P) += pci/\n";
        let kept = only_vfio(makefile);
        assert_eq!(kept, makefile.split("obj-$(CONFIG_VFIO_IOMMU").next().unwrap());
    }

    #[test]
    fn the_series_of_a_release() {
        assert_eq!(series("6.1.0-56-cloud-amd64").unwrap(), "6.1");
        assert!(series("6").is_err() && series("").is_err());
    }
}
