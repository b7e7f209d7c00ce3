//! What all commands share in talking to people: the log, and JSON on standard output.

use std::io::Write;

/// `eprintln!` for the case that nobody reads standard error any more: that one panics.
macro_rules! tell {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// Why nothing could be printed.
pub(crate) const STDOUT: &str = "cannot write to standard output";

/// Sends log lines to standard error: warnings and errors always, more with `-v`.
pub(crate) fn init_log(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    static LOG: Stderr = Stderr;
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(level);
    }
}

/// An error and its causes in one line. A cause that the text before it ends with is not said twice.
pub(crate) fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// A command line that says something impossible: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Says that the command line is wrong.
pub(crate) fn usage<T>(why: impl Into<String>) -> anyhow::Result<T> {
    Err(anyhow::Error::msg(Usage(why.into())))
}

/// The exit code for a command line that is wrong, which is said; any other error as it is.
pub(crate) fn usage_code(error: anyhow::Error) -> anyhow::Result<u8> {
    let usage = error.downcast::<Usage>()?;
    tell!("polldisk: {}", usage.0);
    Ok(2)
}

struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // Nobody can be told that standard error is gone.
        let _ = writeln!(
            std::io::stderr(),
            "polldisk: {}: {}",
            record.level().as_str().to_lowercase(),
            record.args()
        );
    }

    fn flush(&self) {}
}
