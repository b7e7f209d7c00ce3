//! JSON-RPC 2.0 on a unix socket, one JSON text a line: the server behind `--control`, and the
//! client of `polldisk ctl`. One thread a connection; nothing here is on a reactor.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use reactor::Wake;
use serde_json::{Value, json};

/// Longest request, in bytes.
const LINE: u64 = 1 << 20;

/// Longest answer: the disks of a large repository are some of them.
const ANSWER: u64 = 64 << 20;

/// A connection on which nothing is asked, or no answer taken, for so long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// Until connections are taken again after an error.
const RETRY: Duration = Duration::from_millis(100);

/// Connections at a time.
const CONNECTIONS: usize = 32;

/// Error codes of the specification, section 5.1.
const PARSE_ERROR: i64 = -32700;
const INVALID_REQUEST: i64 = -32600;
pub(crate) const METHOD_NOT_FOUND: i64 = -32601;
pub(crate) const INVALID_PARAMS: i64 = -32602;
/// Ours: what was asked for failed.
pub(crate) const FAILED: i64 = 1;

/// Why a call failed.
pub(crate) struct Failure {
    pub(crate) code: i64,
    pub(crate) message: String,
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Failure {
        Failure { code: FAILED, message: crate::output::explain(&e) }
    }
}

/// What answers calls, on the threads of the connections.
pub(crate) trait Service: Send + Sync + 'static {
    fn call(&self, method: &str, params: &Value) -> Result<Value, Failure>;
}

struct Shared {
    service: Box<dyn Service>,
    stop: AtomicBool,
    connections: AtomicUsize,
}

/// A running server.
pub(crate) struct Server {
    file: nbd::SocketFile,
    shared: Arc<Shared>,
    wake: Wake,
    thread: JoinHandle<()>,
}

impl Server {
    /// Listens on `path`, a socket of mode 0600.
    pub(crate) fn bind(path: &Path, service: Box<dyn Service>) -> anyhow::Result<Server> {
        let wake = Wake::new().context("cannot make a wake-up")?;
        let (listener, file) = nbd::listen_on(path)?;
        let (stop, connections) = (AtomicBool::new(false), AtomicUsize::new(0));
        let shared = Arc::new(Shared { service, stop, connections });
        let (s, w) = (shared.clone(), wake.clone());
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&s, &w, &listener))
            .inspect_err(|_| file.remove())
            .context("cannot start a thread")?;
        Ok(Server { file, shared, wake, thread })
    }

    /// Takes no calls any more; those that run go on.
    pub(crate) fn shutdown(self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake.about_to_sleep();
        self.wake.wake();
        if self.thread.join().is_err() {
            log::error!("the control thread panicked");
        }
        self.file.remove();
    }
}

fn accept(shared: &Arc<Shared>, wake: &Wake, listener: &UnixListener) {
    while !shared.stop.load(Ordering::Acquire) {
        let mut fds = [listener.as_fd(), wake.fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut fds, PollTimeout::NONE);
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(e) => {
                // Too many open files, perhaps; it will not be better at once.
                log::warn!("control: cannot take a connection: {e}");
                std::thread::sleep(RETRY);
                continue;
            }
        };
        if shared.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
            log::warn!("control: {CONNECTIONS} connections are there already; one more is refused");
            shared.connections.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let s = shared.clone();
        let serve = move || {
            if let Err(e) = serve(&s, &stream) {
                log::info!("control: {e:#}");
            }
            s.connections.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(e) = std::thread::Builder::new().name("control-client".to_owned()).spawn(serve) {
            log::warn!("control: cannot start a thread: {e}");
            shared.connections.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve(shared: &Shared, stream: &UnixStream) -> anyhow::Result<()> {
    let peer = getsockopt(stream, sockopt::PeerCredentials).context("who is it")?;
    let ours = nix::unistd::geteuid().as_raw();
    if peer.uid() != 0 && peer.uid() != ours {
        bail!("user {} is neither root nor ours: refused", peer.uid());
    }
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::new(stream);
    while !shared.stop.load(Ordering::Acquire) {
        let Some(line) = read_line(&mut reader, LINE)? else { return Ok(()) };
        let Some(answer) = answer(shared.service.as_ref(), &line) else { continue };
        write_line(stream, &answer)?;
    }
    Ok(())
}

/// The next line; `None` at the end.
fn read_line(reader: &mut BufReader<&UnixStream>, most: u64) -> anyhow::Result<Option<String>> {
    use std::io::Read as _;
    let mut line = String::new();
    let n = reader.take(most).read_line(&mut line)?;
    if n as u64 == most {
        bail!("a line of {most} bytes or more");
    }
    Ok((n > 0).then_some(line))
}

fn write_line(mut stream: &UnixStream, value: &Value) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    Ok(stream.write_all(&text)?)
}

/// The answer to one request; none to a notification.
fn answer(service: &dyn Service, line: &str) -> Option<Value> {
    let fail = |id: &Value, code: i64, message: &str| json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}});
    let request: Value = match serde_json::from_str(line) {
        Ok(v) => v,
        Err(e) => return Some(fail(&Value::Null, PARSE_ERROR, &format!("not JSON: {e}"))),
    };
    let id = request.get("id").cloned();
    let (version, method) = (request.get("jsonrpc"), request.get("method"));
    let (Some("2.0"), Some(method)) =
        (version.and_then(Value::as_str), method.and_then(Value::as_str))
    else {
        let id = id.unwrap_or(Value::Null);
        return Some(fail(&id, INVALID_REQUEST, "not a request of JSON-RPC 2.0"));
    };
    let params = request.get("params").unwrap_or(&Value::Null);
    let result = service.call(method, params);
    let id = id?;
    Some(match result {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err(e) => fail(&id, e.code, &e.message),
    })
}

/// A connection to a server.
pub(crate) struct Client {
    stream: UnixStream,
    next_id: u64,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> anyhow::Result<Client> {
        let stream = UnixStream::connect(path).with_context(|| {
            format!("{}: cannot connect (is the server running?)", path.display())
        })?;
        Ok(Client { stream, next_id: 1 })
    }

    /// Calls a method and waits for its result.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> anyhow::Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        write_line(&self.stream, &request)?;
        let line = read_line(&mut BufReader::new(&self.stream), ANSWER)?;
        let mut answer: Value = serde_json::from_str(&line.context("the server has gone")?)?;
        if let Some(e) = answer.get("error") {
            bail!("{}", e["message"].as_str().unwrap_or("an error without a message"));
        }
        Ok(answer["result"].take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn call(&self, method: &str, params: &Value) -> Result<Value, Failure> {
            match method {
                "echo" => Ok(params.clone()),
                m => Err(Failure { code: METHOD_NOT_FOUND, message: format!("no method {m:?}") }),
            }
        }
    }

    #[test]
    fn calls_are_answered_by_the_rules() {
        let ask = |line: &str| answer(&Echo, line);
        let good = ask(r#"{"jsonrpc":"2.0","id":7,"method":"echo","params":{"a":1}}"#).unwrap();
        assert_eq!(good, json!({"jsonrpc": "2.0", "id": 7, "result": {"a": 1}}));
        assert_eq!(ask(r#"{"jsonrpc":"2.0","method":"echo"}"#), None, "a notification");
        for (line, code) in [
            ("{", PARSE_ERROR),
            ("[]", INVALID_REQUEST),
            (r#"{"id":1,"method":"echo"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":5}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":"x"}"#, METHOD_NOT_FOUND),
        ] {
            assert_eq!(ask(line).unwrap()["error"]["code"], code, "{line}");
        }
    }

    #[test]
    fn a_server_serves_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = Server::bind(&path, Box::new(Echo)).unwrap();
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.call("echo", json!([1, 2])).unwrap(), json!([1, 2]));
        assert!(client.call("nothing", Value::Null).is_err());
        // A line without end is cut off, and others are served on.
        let mut rude = UnixStream::connect(&path).unwrap();
        let _ = rude.write_all(&vec![b' '; 2 << 20]);
        assert_eq!(client.call("echo", json!(3)).unwrap(), json!(3));
        server.shutdown();
        assert!(!path.exists());
    }
}
