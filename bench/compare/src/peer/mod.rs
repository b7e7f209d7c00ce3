//! Peers: how each is found, set up, started and ended.

pub(crate) mod drive;
pub(crate) mod fio;
mod nbdkit;
mod polldisk;
mod process;
pub mod qemu;
mod qemu_dp;
pub(crate) mod spdk;
mod tapdisk;

use std::path::{Path, PathBuf};

use bench::Error;

use crate::images::{Format, Images};
use crate::profiles::{Content, Disk};
use crate::results::{Frontend, PeerInfo};

pub use polldisk::Leaf;
pub use process::folders;
use process::output;
pub(crate) use process::{Process, connect, done_within, find};
use qemu::{Aio, Cache};

/// Who takes part.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Peer {
    /// This program.
    Polldisk,
    /// QEMU's daemon for images.
    Qsd,
    /// QEMU's NBD server.
    QemuNbd,
    /// nbdkit: its memory plugin is what NBD itself costs.
    Nbdkit,
    /// The datapath of SMAPIv1.
    Tapdisk,
    /// The datapath of SMAPIv3.
    QemuDp,
    /// Linux itself, asked by fio through io_uring.
    Fio,
    /// SPDK's driver, asked by its own tool.
    Spdk,
}

impl Peer {
    /// All of them.
    pub const ALL: [Peer; 8] = [
        Peer::Polldisk,
        Peer::Qsd,
        Peer::QemuNbd,
        Peer::Nbdkit,
        Peer::Tapdisk,
        Peer::QemuDp,
        Peer::Fio,
        Peer::Spdk,
    ];

    /// Its name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Polldisk => "polldisk",
            Peer::Qsd => "qemu-storage-daemon",
            Peer::QemuNbd => "qemu-nbd",
            Peer::Nbdkit => "nbdkit",
            Peer::Tapdisk => "tapdisk",
            Peer::QemuDp => "qemu-dp",
            Peer::Fio => "fio",
            Peer::Spdk => "spdk_nvme_perf",
        }
    }

    /// The peer of that name.
    ///
    /// # Errors
    /// Says which there are.
    pub fn from_name(name: &str) -> Result<Peer, String> {
        let known = || Peer::ALL.map(Peer::name).join(", ");
        let found = Peer::ALL.into_iter().find(|p| p.name() == name);
        found.ok_or_else(|| format!("unknown peer {name:?}; there are {}", known()))
    }

    /// Programs that it needs.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Peer::Polldisk => &[],
            Peer::Tapdisk => &["tap-ctl", "tapdisk"],
            Peer::Qsd | Peer::QemuNbd | Peer::Nbdkit | Peer::QemuDp | Peer::Fio | Peer::Spdk => {
                std::slice::from_ref(self.only_program())
            }
        }
    }

    fn only_program(self) -> &'static &'static str {
        match self {
            Peer::QemuNbd => &"qemu-nbd",
            Peer::Nbdkit => &"nbdkit",
            Peer::QemuDp => &"qemu-dp",
            Peer::Fio => &"fio",
            Peer::Spdk => &"spdk_nvme_perf",
            Peer::Polldisk | Peer::Tapdisk | Peer::Qsd => &"qemu-storage-daemon",
        }
    }

    /// Where it comes from.
    fn source(self) -> &'static str {
        match self {
            Peer::Polldisk => "this program",
            Peer::Qsd => {
                "on Debian: apt-get install qemu-utils, before Debian 13 qemu-system-common"
            }
            Peer::QemuNbd => "on Debian: apt-get install qemu-utils",
            Peer::Nbdkit => "on Debian: apt-get install nbdkit",
            Peer::Tapdisk => {
                "it is on hosts of XenServer and XCP-ng, else to be built from \
                 github.com/xapi-project/blktap"
            }
            Peer::QemuDp => "it is on hosts of XenServer and XCP-ng with SMAPIv3",
            Peer::Fio => "on Debian: apt-get install fio",
            Peer::Spdk => "to be built from github.com/spdk/spdk (build/bin/spdk_nvme_perf)",
        }
    }

    /// Looks for it on PATH.
    pub fn look(self, device: Option<&str>) -> PeerInfo {
        let name = self.name().to_owned();
        let absent =
            |why: String| PeerInfo { name: name.clone(), version: None, absent: Some(why) };
        if self == Peer::Polldisk {
            let version = Some(env!("CARGO_PKG_VERSION").to_owned());
            return PeerInfo { name, version, absent: None };
        }
        if let Some(missing) = self.programs().iter().find(|p| find(p).is_none()) {
            return absent(format!("{missing} is not on PATH ({})", self.source()));
        }
        if self == Peer::Spdk && device.is_none() {
            return absent("no device to ask: --device names its PCI address".into());
        }
        let version = match self {
            // It knows no such option, and would begin to work.
            Peer::Tapdisk | Peer::Spdk => None,
            _ => output(self.only_program(), &["--version"]).and_then(|text| version(&text)),
        };
        PeerInfo { name, version, absent: None }
    }
}

/// The first words of the first line that has a digit.
fn version(text: &str) -> Option<String> {
    let line = text.lines().map(str::trim).find(|l| l.contains(|c: char| c.is_ascii_digit()))?;
    Some(line.chars().take(100).collect())
}

/// A peer, set up in one of its ways.
#[derive(Clone, PartialEq, Debug)]
pub enum Setup {
    /// polldisk.
    Polldisk(polldisk::Options),
    /// qemu-storage-daemon.
    Qsd(qemu::Options),
    /// qemu-nbd.
    QemuNbd(qemu::Options),
    /// qemu-dp.
    QemuDp(qemu::Options),
    /// nbdkit with its plugin `memory`.
    NbdkitMemory,
    /// nbdkit with its plugin `file`.
    NbdkitFile,
    /// tapdisk.
    Tapdisk,
    /// The kernel, on an image.
    Fio,
    /// The kernel's own NVMe driver, on a drive.
    FioDrive,
    /// SPDK.
    Spdk,
}

impl Setup {
    pub(crate) fn polldisk(frontend: Frontend, leaf: Leaf) -> Setup {
        Setup::Polldisk(polldisk::Options { frontend, leaf, budget: None })
    }

    pub(crate) fn qsd(aio: Aio) -> Setup {
        Setup::Qsd(qemu::Options { aio, ..qemu::Options::default() })
    }

    pub(crate) fn qemu_nbd(aio: Aio) -> Setup {
        Setup::QemuNbd(qemu::Options { aio, ..qemu::Options::default() })
    }

    pub(crate) fn qemu_dp() -> Setup {
        Setup::QemuDp(qemu::Options::default())
    }

    pub(crate) fn nbdkit_memory() -> Setup {
        Setup::NbdkitMemory
    }

    pub(crate) fn nbdkit_file() -> Setup {
        Setup::NbdkitFile
    }

    pub(crate) fn tapdisk() -> Setup {
        Setup::Tapdisk
    }

    pub(crate) fn fio() -> Setup {
        Setup::Fio
    }

    pub(crate) fn fio_drive() -> Setup {
        Setup::FioDrive
    }

    pub(crate) fn spdk() -> Setup {
        Setup::Spdk
    }

    fn qemu(mut self, change: impl FnOnce(&mut qemu::Options)) -> Setup {
        if let Setup::Qsd(o) | Setup::QemuNbd(o) | Setup::QemuDp(o) = &mut self {
            change(o);
        }
        self
    }

    /// With a thread of its own that polls.
    pub(crate) fn iothread(self) -> Setup {
        self.qemu(|o| o.iothread = true)
    }

    /// Past the host's page cache, or through it. Without it requests are made by threads: Linux' AIO
    /// would block.
    pub(crate) fn direct(self, direct: bool) -> Setup {
        self.qemu(|o| {
            o.direct = direct;
            if !direct {
                o.aio = Aio::Threads;
            }
        })
    }

    /// Ignoring flushes.
    pub(crate) fn no_flush(self, no_flush: bool) -> Setup {
        self.qemu(|o| o.no_flush = no_flush)
    }

    /// With so much for L2 tables; the study's letter for it.
    pub(crate) fn cache(self, letter: char, cache: Cache) -> Setup {
        self.qemu(|o| o.cache = Some((letter, cache)))
    }

    /// The same for polldisk.
    pub(crate) fn budget(mut self, bytes: u64) -> Setup {
        if let Setup::Polldisk(o) = &mut self {
            o.budget = Some(bytes);
        }
        self
    }

    /// Whose it is.
    pub fn peer(&self) -> Peer {
        match self {
            Setup::Polldisk(_) => Peer::Polldisk,
            Setup::Qsd(_) => Peer::Qsd,
            Setup::QemuNbd(_) => Peer::QemuNbd,
            Setup::QemuDp(_) => Peer::QemuDp,
            Setup::NbdkitMemory | Setup::NbdkitFile => Peer::Nbdkit,
            Setup::Tapdisk => Peer::Tapdisk,
            Setup::Fio | Setup::FioDrive => Peer::Fio,
            Setup::Spdk => Peer::Spdk,
        }
    }

    /// How it is asked.
    pub fn frontend(&self) -> Frontend {
        match self {
            Setup::Polldisk(o) => o.frontend,
            Setup::Fio => Frontend::Kernel,
            Setup::FioDrive | Setup::Spdk => Frontend::Device,
            _ => Frontend::Nbd,
        }
    }

    /// In words, what sets it apart from its peer's other ways.
    pub fn variant(&self) -> String {
        match self {
            Setup::Polldisk(o) => o.to_string(),
            Setup::Qsd(o) | Setup::QemuNbd(o) | Setup::QemuDp(o) => o.to_string(),
            Setup::NbdkitMemory => "memory".into(),
            Setup::NbdkitFile => "file".into(),
            Setup::Tapdisk => "vhd".into(),
            Setup::Fio => "io_uring".into(),
            Setup::FioDrive => "device, kernel driver, io_uring".into(),
            Setup::Spdk => String::new(),
        }
    }

    /// Why it cannot serve such a disk, if it cannot.
    pub(crate) fn unable(&self, disk: &Disk, device: Option<&str>) -> Option<&'static str> {
        match self {
            Setup::Tapdisk if !matches!(disk.content, Content::Data | Content::Empty) => {
                Some("no VHD images are made with such content")
            }
            _ if self.frontend() == Frontend::Device && device.is_none() => {
                Some("no drive was named by --device")
            }
            _ => None,
        }
    }

    /// The format of the image that it serves.
    pub(crate) fn format(&self) -> Option<Format> {
        match self {
            Setup::Polldisk(o) if o.leaf == Leaf::Device => None,
            Setup::Polldisk(_) | Setup::Qsd(_) | Setup::QemuNbd(_) | Setup::QemuDp(_) => {
                Some(Format::Qcow2)
            }
            Setup::NbdkitFile | Setup::Fio => Some(Format::Raw),
            Setup::Tapdisk => Some(Format::Vhd),
            Setup::NbdkitMemory | Setup::FioDrive | Setup::Spdk => None,
        }
    }
}

/// Where servers are started.
pub(crate) struct Place<'a> {
    /// This program.
    pub(crate) program: &'a Path,
    /// A folder for sockets and logs.
    pub(crate) scratch: &'a Path,
    /// The processor to run on.
    pub(crate) core: Option<usize>,
}

impl Place<'_> {
    /// A socket; its path must be short.
    fn socket(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.sock"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.log"))
    }
}

/// The export's name, or the start of it where one server has several.
pub(crate) const EXPORT: &str = "bench";

/// Starts the server of a setup that is asked by NBD.
///
/// # Errors
/// If its images cannot be made, or it cannot be started.
pub(crate) fn start(
    setup: &Setup,
    disk: &Disk,
    images: &mut Images,
    place: &Place<'_>,
) -> Result<Box<dyn Process>, Error> {
    let paths = match (setup, setup.format()) {
        (Setup::Polldisk(_), _) | (_, None) => Vec::new(),
        (_, Some(format)) => images.of(disk, format)?,
    };
    let first =
        || paths.first().map(PathBuf::as_path).ok_or_else(|| Error::Other("no image".into()));
    match setup {
        Setup::Polldisk(o) => {
            let nodes = images.nodes(disk, o.leaf)?;
            let [node] = &nodes[..] else {
                return Err(Error::Other("polldisk nbd serves one disk".into()));
            };
            polldisk::start(o, node, place)
        }
        Setup::Qsd(o) => qemu::start_daemon(o, &paths, place),
        Setup::QemuNbd(o) => qemu::start_nbd(o, first()?, place),
        Setup::QemuDp(o) => qemu_dp::start(o, first()?, place),
        Setup::NbdkitMemory => nbdkit::start_memory(disk.size, place),
        Setup::NbdkitFile => nbdkit::start_file(first()?, place),
        Setup::Tapdisk => tapdisk::start(first()?, place),
        Setup::Fio | Setup::FioDrive | Setup::Spdk => {
            Err(Error::Other(format!("{} is no server", setup.peer().name())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_is_found_by_its_name_alone() {
        for peer in Peer::ALL {
            assert_eq!(Peer::from_name(peer.name()), Ok(peer));
        }
        let e = Peer::from_name("qemu").unwrap_err();
        assert!(e.contains("qemu-storage-daemon"), "{e}");
    }

    #[test]
    fn who_is_absent_says_what_to_do() {
        for peer in Peer::ALL {
            let info = peer.look(None);
            assert_eq!(info.name, peer.name());
            match &info.absent {
                Some(why) => {
                    assert!(info.version.is_none());
                    assert!(why.contains(peer.source()) || why.contains("--device"), "{why}");
                }
                None => assert_ne!(peer, Peer::Spdk, "without a device there is nothing to ask"),
            }
        }
    }

    #[test]
    fn versions_are_the_first_line_that_has_one() {
        assert_eq!(
            version("qemu-nbd 10.0.2 (Debian)\nCopyright").as_deref(),
            Some("qemu-nbd 10.0.2 (Debian)")
        );
        assert_eq!(version("nothing\n"), None);
    }
}
