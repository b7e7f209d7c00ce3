//! One call of a method: the daemon is asked, and started if it does not run.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{Kind, query};
use crate::ctl::DAEMON;
use crate::ctl::rpc::Client;

/// Most bytes of arguments.
const ARGUMENTS: u64 = 1 << 20;

/// The daemon answers within half a minute after it was started.
const LOOK: Duration = Duration::from_millis(20);
const LOOKS: u32 = 1500;

/// `polldisk smapiv3 call`: exit code 0 and the result, or 1 and the error, as JSON.
pub(super) fn run(kind: Kind, method: &str) -> anyhow::Result<u8> {
    let answered = match method {
        "Plugin.query" => Ok(query::answer(kind)),
        _ => ask(method),
    };
    let (text, code) = match answered {
        Ok(answer) => match answer.get("error").filter(|_| answer.get("result").is_none()) {
            Some(error) => (error.to_string(), 1),
            None => (answer.get("result").unwrap_or(&answer).to_string(), 0),
        },
        Err(e) => {
            let why = crate::output::explain(&e);
            let backtrace = json!({"error": why, "files": [], "lines": []});
            let params = ["polldisk".to_owned(), why];
            let error =
                json!({"code": "SR_BACKEND_FAILURE", "params": params, "backtrace": backtrace});
            (error.to_string(), 1)
        }
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("the answer")?;
    Ok(code)
}

fn ask(method: &str) -> anyhow::Result<Value> {
    let mut text = String::new();
    std::io::stdin().take(ARGUMENTS).read_to_string(&mut text).context("the arguments")?;
    let args: Value = serde_json::from_str(&text).context("the arguments are no JSON")?;
    daemon()?.call("smapiv3", json!({"method": method, "args": args}))
}

/// Connects to the daemon that the plugins talk to, which is started if nobody answers.
pub(crate) fn daemon() -> anyhow::Result<Client> {
    let socket = std::env::var_os("POLLDISK_SOCKET").map_or_else(|| DAEMON.into(), PathBuf::from);
    connect(&socket)
}

fn connect(socket: &Path) -> anyhow::Result<Client> {
    if let Ok(client) = Client::connect(socket) {
        return Ok(client);
    }
    let folder = socket.parent().context("POLLDISK_SOCKET has no folder")?;
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // Calls come at the same time: one of them starts it.
    let lock = folder.join("start.lock");
    let lock = std::fs::File::create(&lock).with_context(|| lock.display().to_string())?;
    lock.lock().context("waiting for another start")?;
    let mut started = start(socket, folder)?;
    for _ in 0..LOOKS {
        if let Ok(client) = Client::connect(socket) {
            return Ok(client);
        }
        if let Some(child) = &mut started
            && let Some(status) = child.try_wait().context("the daemon")?
        {
            bail!("the daemon ended at once ({status}): see {}", log_of(folder).display());
        }
        std::thread::sleep(LOOK);
    }
    bail!("{}: the daemon was started and does not answer: see its log", socket.display())
}

/// Where a daemon that is no service writes what it has to say.
fn log_of(folder: &Path) -> PathBuf {
    folder.join("polldisk.log")
}

/// Starts the daemon, as a service if there is one, if nobody did while we waited. Returns its process
/// if it is ours.
fn start(socket: &Path, folder: &Path) -> anyhow::Result<Option<Child>> {
    if Client::connect(socket).is_ok() {
        return Ok(None);
    }
    if socket == Path::new(DAEMON) && Path::new("/run/systemd/system").exists() {
        let status = Command::new("systemctl").args(["start", "polldisk.service"]).status();
        if status.is_ok_and(|status| status.success()) {
            return Ok(None);
        }
    }
    let config = folder.join("polldisk.toml");
    if !config.exists() {
        let xen = Path::new("/proc/xen/capabilities").exists();
        let (control, state) = (path(socket)?, path(&folder.join("state"))?);
        let text = format!("control = {control}\nstate = {state}\nxen = {xen}\n");
        std::fs::write(&config, text).with_context(|| config.display().to_string())?;
    }
    let log = std::fs::File::options().create(true).append(true).open(log_of(folder));
    let binary = std::env::current_exe().context("where this program is")?;
    // Nothing of ours is handed on but the log: who started us waits until our output is closed.
    Command::new(binary)
        .args(["serve", "--config"])
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.context("the daemon's log")?)
        .process_group(0)
        .spawn()
        .map(Some)
        .context("cannot start the daemon")
}

/// A path as a TOML string, which JSON's strings are.
fn path(path: &Path) -> anyhow::Result<String> {
    match path.to_str() {
        Some(text) => Ok(Value::from(text).to_string()),
        None => bail!("{}: not UTF-8", path.display()),
    }
}
