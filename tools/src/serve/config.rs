//! The configuration file of `polldisk serve`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use node::Notify;
use reactor::{Policy, Start};
use serde::Deserialize;

use super::metrics::Address;
use super::mirrors::Reach;
use super::rrd;

/// What the file says; everything has a default.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Config {
    /// The control socket.
    pub(crate) control: PathBuf,
    /// A folder in memory, for what the next daemon needs if this one dies.
    pub(crate) state: PathBuf,
    /// Processors to run on, a reactor on each; without any there is one, wherever it is put.
    pub(crate) cores: Vec<usize>,
    /// What a reactor does when idle: `poll` or `adaptive`.
    policy: String,
    /// Memory for an image's map, as in "128M".
    l2_cache: String,
    /// Folders that backing and data files must be in; any if there are none.
    pub(crate) allow_backing: Vec<PathBuf>,
    /// Whether guests' devices are looked for in xenstore.
    pub(crate) xen: bool,
    /// The kind of backend whose devices are looked at.
    pub(crate) backend: String,
    /// Who tells guests that there are responses: a `thread`, one that never sleeps (`spinning`), so
    /// that reactors make no system call for it, or the reactors (`direct`).
    notify: String,
    /// Bytes a second that are moved to merge what is left of deleted snapshots, as in "100M".
    coalesce_rate: String,
    /// Where Prometheus gets figures: `unix:/PATH` or an address of the loopback; nowhere if empty.
    metrics: String,
    /// Where disks may be mirrored to beside sockets of this host: `tls:FOLDER` with certificates, or
    /// `plain`; nowhere if empty.
    mirror: String,
    /// The file by which the toolstack's rrdd gets figures; none if empty.
    pub(crate) rrd: PathBuf,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            control: "/run/polldisk/control.sock".into(),
            state: "/run/polldisk/state".into(),
            cores: Vec::new(),
            policy: "adaptive".into(),
            l2_cache: "128M".into(),
            allow_backing: Vec::new(),
            xen: true,
            backend: "qdisk".into(),
            notify: "thread".into(),
            coalesce_rate: "100M".into(),
            metrics: String::new(),
            mirror: String::new(),
            rrd: PathBuf::new(),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Config> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Config::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> anyhow::Result<Config> {
        let mut config: Config = toml::from_str(text)?;
        config.policy()?;
        config.l2_cache()?;
        config.notify()?;
        config.coalesce_rate()?;
        config.metrics()?;
        config.mirror()?;
        config.rrd()?;
        if config.backend.is_empty() || !config.backend.bytes().all(|b| b.is_ascii_alphanumeric()) {
            bail!("backend: {:?} is no kind of backend, as qdisk is", config.backend);
        }
        let again = |&(i, c): &(usize, &usize)| config.cores[..i].contains(c);
        if let Some((_, c)) = config.cores.iter().enumerate().find(again) {
            bail!("cores: processor {c} is named twice");
        }
        if config.cores.len() > node::MOST_REACTORS {
            bail!("cores: at most {} reactors serve together", node::MOST_REACTORS);
        }
        for dir in &mut config.allow_backing {
            let found = dir.canonicalize();
            *dir = found.with_context(|| format!("allow-backing: {}", dir.display()))?;
        }
        Ok(config)
    }

    /// What reactors do when idle.
    pub(crate) fn policy(&self) -> anyhow::Result<Policy> {
        self.policy.parse().map_err(|e| anyhow::anyhow!("policy: {e}"))
    }

    pub(crate) fn l2_cache(&self) -> anyhow::Result<u64> {
        node::parse_size(&self.l2_cache).context("l2-cache: a size like \"128M\" is needed")
    }

    pub(crate) fn coalesce_rate(&self) -> anyhow::Result<u64> {
        let rate = node::parse_size(&self.coalesce_rate).filter(|&rate| rate > 0);
        rate.context("coalesce-rate: a size like \"100M\" is needed")
    }

    pub(crate) fn notify(&self) -> anyhow::Result<Notify> {
        match self.notify.as_str() {
            "thread" => Ok(Notify::Thread),
            "spinning" => Ok(Notify::Spinning),
            "direct" => Ok(Notify::Direct),
            other => bail!("notify: {other:?}; there are thread, spinning and direct"),
        }
    }

    /// Where Prometheus gets figures.
    pub(crate) fn metrics(&self) -> anyhow::Result<Option<Address>> {
        match self.metrics.as_str() {
            "" => Ok(None),
            address => address.parse().map(Some),
        }
    }

    /// Where disks may be mirrored to; certificates are read for it.
    pub(crate) fn mirror(&self) -> anyhow::Result<Reach> {
        Reach::parse(&self.mirror).context("mirror")
    }

    /// Where rrdd gets figures.
    pub(crate) fn rrd(&self) -> anyhow::Result<Option<&Path>> {
        if self.rrd.as_os_str().is_empty() {
            return Ok(None);
        }
        rrd::check(&self.rrd)?;
        Ok(Some(&self.rrd))
    }

    /// How to start the reactors.
    pub(crate) fn starts(&self) -> anyhow::Result<Vec<Start>> {
        let policy = self.policy()?;
        let start = |&cpu: &usize| Start { cpu: Some(cpu), policy };
        Ok(match self.cores.is_empty() {
            true => vec![Start { cpu: None, policy }],
            false => self.cores.iter().map(start).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.starts().unwrap().len(), 1);
        assert_eq!(config.l2_cache().unwrap(), 128 << 20);
        assert_eq!((config.metrics().unwrap(), config.rrd().unwrap()), (None, None));
    }

    #[test]
    fn the_file_that_is_installed_says_the_defaults() {
        let text = include_str!("../../dist/polldisk.toml");
        assert_eq!(Config::parse(text).unwrap(), Config::default());
        // Its settings, which have no space after the sign.
        let settings = text.lines().filter_map(|line| line.strip_prefix('#'));
        let settings: Vec<_> = settings.filter(|line| !line.starts_with(' ')).collect();
        assert_eq!(Config::parse(&settings.join("\n")).unwrap(), Config::default());
        assert_eq!(settings.len(), 11, "a setting is missing: {settings:?}");
    }

    #[test]
    fn all_of_it_can_be_said() {
        let config = Config::parse(
            "control = '/x'\ncores = [0, 1]\npolicy = 'poll'\nl2-cache = '1G'\n\
             allow-backing = ['/']\nxen = false\nbackend = 'vbd'\nnotify = 'direct'\n\
             metrics = 'unix:/m'\nrrd = '/dev/shm/metrics/polldisk'\n",
        );
        let config = config.unwrap();
        assert_eq!((config.starts().unwrap().len(), config.xen), (2, false));
        assert_eq!(config.notify().unwrap(), Notify::Direct);
        assert_eq!(config.metrics().unwrap(), Some(Address::Unix("/m".into())));
        assert_eq!(config.rrd().unwrap(), Some(Path::new("/dev/shm/metrics/polldisk")));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, what) in [
            ("polcy = 'poll'", "polcy"),
            ("policy = 'pol'", "policy"),
            ("l2-cache = 'much'", "l2-cache"),
            ("notify = 'mail'", "notify"),
            ("metrics = '0.0.0.0:80'", "loopback"),
            ("metrics = '/run/x'", "neither"),
            ("mirror = 'yes'", "mirror: \"yes\" is neither"),
            ("mirror = 'tls:/no/such/folder'", "ca-cert.pem"),
            ("rrd = 'polldisk'", "absolute"),
            ("rrd = '/dev/shm/metrics/a b'", "letters"),
            ("backend = '../x'", "backend"),
            ("cores = [1, 1]", "cores"),
            ("cores = 'all'", "cores"),
            ("allow-backing = ['/no/such/folder']", "allow-backing"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
