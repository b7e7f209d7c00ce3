//! Figures for Prometheus: an HTTP server that knows one page, on a unix socket or on this host's
//! loopback. [`http`] is the protocol, [`text`] the page.
//!
//! Who connects may be anybody on this host: so a connection has one deadline for all that happens on
//! it, a request has a largest size, and there are few connections at a time. None of them touches a reactor:
//! the counters are read from outside.

mod http;
mod text;

use std::fs::File;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::{Clock, Wake};

use super::figures::Source;

/// Connections at a time.
const CONNECTIONS: usize = 8;

/// Until connections are taken again after an error.
const RETRY: Duration = Duration::from_millis(100);

/// Where the figures are to be had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    /// Of this host's loopback.
    Loopback(SocketAddr),
}

impl std::str::FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Address> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                bail!("metrics: {text:?}: an absolute path is needed after unix:");
            }
            return Ok(Address::Unix(path.into()));
        }
        let Ok(address) = text.parse::<SocketAddr>() else {
            bail!(
                "metrics: {text:?} is neither unix:/PATH nor an address and a port of the loopback, as \
                 127.0.0.1:9825"
            );
        };
        let loopback = match address.ip() {
            IpAddr::V4(ip) => ip.is_loopback(),
            IpAddr::V6(ip) => ip.is_loopback(),
        };
        if !loopback || address.port() == 0 {
            bail!(
                "metrics: {text:?}: only this host's loopback can be listened on (127.0.0.1:PORT or \
                 [::1]:PORT): there is neither encryption nor a password. Let a proxy that has both stand \
                 before it"
            );
        }
        Ok(Address::Loopback(address))
    }
}

enum Socket {
    Unix(UnixListener, ::nbd::SocketFile),
    Tcp(TcpListener),
}

/// A socket that listens. Made before the daemon gives up the right to make sockets of a network.
pub(crate) struct Listener(Socket);

impl Listener {
    pub(crate) fn bind(address: &Address) -> anyhow::Result<Listener> {
        let socket = match address {
            Address::Unix(path) => {
                if let Some(dir) = path.parent() {
                    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
                }
                let (listener, file) = ::nbd::listen_on(path)?;
                Socket::Unix(listener, file)
            }
            Address::Loopback(address) => {
                let listener = TcpListener::bind(address);
                let listener = listener.with_context(|| format!("metrics: {address}"))?;
                listener.set_nonblocking(true).context("metrics")?;
                Socket::Tcp(listener)
            }
        };
        Ok(Listener(socket))
    }

    fn accept(&self) -> std::io::Result<OwnedFd> {
        Ok(match &self.0 {
            Socket::Unix(listener, _) => {
                let stream = listener.accept()?.0;
                stream.set_nonblocking(true)?;
                stream.into()
            }
            Socket::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nonblocking(true)?;
                stream.into()
            }
        })
    }

    fn wait(&self, wake: &Wake) {
        let fd = match &self.0 {
            Socket::Unix(listener, _) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        };
        let mut fds = [fd, wake.fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, PollTimeout::NONE);
    }
}

struct Shared {
    source: Source,
    clock: Clock,
    stop: AtomicBool,
    connections: AtomicUsize,
    turned_away: AtomicUsize,
}

/// A running server.
pub(crate) struct Server {
    shared: Arc<Shared>,
    wake: Wake,
    thread: JoinHandle<Listener>,
}

impl Server {
    pub(crate) fn start(
        listener: Listener,
        clock: Clock,
        source: Source,
    ) -> anyhow::Result<Server> {
        let wake = Wake::new().context("cannot make a wake-up")?;
        let shared = Arc::new(Shared {
            source,
            clock,
            stop: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
        });
        let (s, w) = (shared.clone(), wake.clone());
        let body = move || {
            accept(&s, &w, &listener);
            listener
        };
        let thread = std::thread::Builder::new().name("metrics".to_owned()).spawn(body);
        Ok(Server { shared, wake, thread: thread.context("cannot start a thread")? })
    }

    /// Takes no connections any more, and cuts off those that are there.
    pub(crate) fn shutdown(self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake.about_to_sleep();
        self.wake.wake();
        match self.thread.join() {
            Ok(Listener(Socket::Unix(_, file))) => file.remove(),
            Ok(Listener(Socket::Tcp(_))) => {}
            Err(_) => log::error!("the thread of the metrics panicked"),
        }
        while self.shared.connections.load(Ordering::Acquire) > 0 {
            std::thread::sleep(http::LOOK / 4);
        }
    }
}

fn accept(shared: &Arc<Shared>, wake: &Wake, listener: &Listener) {
    while !shared.stop.load(Ordering::Acquire) {
        listener.wait(wake);
        let stream = match listener.accept() {
            Ok(stream) => File::from(stream),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(e) => {
                // Too many open files, perhaps; it will not be better at once.
                log::warn!("metrics: cannot take a connection: {e}");
                std::thread::sleep(RETRY);
                continue;
            }
        };
        if shared.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
            shared.connections.fetch_sub(1, Ordering::AcqRel);
            // Anybody can bring this about, as often as they like.
            if shared.turned_away.fetch_add(1, Ordering::Relaxed).is_power_of_two() {
                log::warn!("metrics: {CONNECTIONS} connections are there; more are refused");
            }
            continue;
        }
        let s = shared.clone();
        let serve = move || {
            let page = || text::page(&(s.source)());
            if let Err(e) = http::serve(&stream, &s.clock, &s.stop, page) {
                log::debug!("metrics: {e}");
            }
            drop(stream);
            s.connections.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(e) = std::thread::Builder::new().name("metrics-client".to_owned()).spawn(serve) {
            log::warn!("metrics: cannot start a thread: {e}");
            shared.connections.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_listened_on() {
        for text in ["unix:/run/x", "127.0.0.1:9825", "127.9.9.9:1", "[::1]:9825"] {
            text.parse::<Address>().unwrap();
        }
        for (text, why) in [
            ("unix:run/x", "absolute"),
            ("0.0.0.0:9825", "loopback"),
            ("[::]:9825", "loopback"),
            ("192.168.0.1:80", "loopback"),
            ("[::ffff:127.0.0.1]:80", "loopback"),
            ("127.0.0.1:0", "loopback"),
            ("127.0.0.1", "neither"),
            ("localhost:9825", "neither"),
            ("/run/x", "neither"),
            ("", "neither"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
