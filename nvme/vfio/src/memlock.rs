//! RLIMIT_MEMLOCK: what a device may reach is locked, and the kernel counts it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one; `false` if they are the same already.
pub(crate) fn raise() -> bool {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, hard)) if soft < hard => setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).is_ok(),
        _ => false,
    }
}

/// What to say when `len` more bytes were refused while `mapped` were mapped already.
pub(crate) fn explain(len: u64, mapped: u64) -> String {
    let (limit, locked) = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((_, hard)) => (hard, locked().unwrap_or(mapped)),
        Err(_) => (0, mapped),
    };
    let need = locked.saturating_add(len);
    text(len, locked, limit, need)
}

fn text(len: u64, locked: u64, limit: u64, need: u64) -> String {
    format!(
        "{len} bytes for DMA cannot be locked in memory: {locked} are locked already and the limit \
         is {limit}; {need} bytes are needed. Raise it: run `ulimit -l {kib}` as root before, or \
         `LimitMEMLOCK={need}` in the service's unit, or `prlimit --memlock={need}:{need} COMMAND`",
        kib = need.div_ceil(1024)
    )
}

/// Bytes that this process has locked, as the kernel counts them.
fn locked() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Some((field("VmLck:")? + field("VmPin:").unwrap_or(0)) * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_the_number_and_the_command() {
        let text = text(8192, 4096, 65536, 12288);
        assert!(text.contains("12288 bytes are needed") && text.contains("ulimit -l 12"), "{text}");
        assert!(locked().is_some());
    }
}
