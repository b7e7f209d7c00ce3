//! A daemon of a test's own, without Xen.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

pub(crate) const POLLDISK: &str = env!("CARGO_BIN_EXE_polldisk");

/// Killed in the end, if a test has failed.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    dir: PathBuf,
}

impl Daemon {
    pub(crate) fn start(dir: &Path, config: &str) -> Daemon {
        let mut file = std::fs::File::create(dir.join("polldisk.toml")).unwrap();
        writeln!(file, "control = '{}'\nxen = false\n{config}", dir.join("run/ctl").display())
            .unwrap();
        // Of a daemon before this.
        let _none = std::fs::remove_file(dir.join("notify"));
        let notify = UnixDatagram::bind(dir.join("notify")).unwrap();
        notify.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        let child = Command::new(POLLDISK)
            .args(["serve", "--config", "polldisk.toml"])
            .env("NOTIFY_SOCKET", dir.join("notify"))
            .current_dir(dir)
            .spawn()
            .unwrap();
        let mut text = [0; 64];
        let n = notify.recv(&mut text).expect("the daemon says that it is ready");
        assert_eq!(&text[..n], b"READY=1");
        Daemon { child, dir: dir.to_owned() }
    }

    pub(crate) fn ctl(&self, args: &[&str]) -> Output {
        let socket = self.dir.join("run/ctl");
        let mut command = Command::new(POLLDISK);
        command.args(["ctl", "--socket", socket.to_str().unwrap()]).args(args);
        command.current_dir(&self.dir).output().unwrap()
    }

    pub(crate) fn fine(&self, args: &[&str]) -> String {
        let out = self.ctl(args);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{args:?}: {text}");
        String::from_utf8(out.stdout).unwrap()
    }

    pub(crate) fn refused(&self, args: &[&str]) -> String {
        let out = self.ctl(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        String::from_utf8(out.stderr).unwrap()
    }

    pub(crate) fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}
