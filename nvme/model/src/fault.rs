//! The fault list: what goes wrong, at which command, how often; and its text form.
//!
//! Owned by the controller, which asks it once per command (never when it is empty) and at each
//! change of CC.EN. The grammar is in the documentation of [`Faults`].

use std::fmt;
use std::str::FromStr;

use nvme_spec::{AdminOpcode, IoOpcode, Sqe, StatusCode};

/// A list of faults, parsed from text.
///
/// ```text
/// list   = rule { ";" rule }
/// rule   = action [ ":" filter { "," filter } ]
/// action = "status=" HEX      complete with this status (type and code, e.g. 281); no data moves
///        | "lost"             never completes and cannot be aborted; not carried out
///        | "lost=done"        the same, but carried out
///        | "delay=" N         completes N steps later; carried out then; can be aborted
///        | "delay=" N "us"    completes N microseconds later ("ms" also); needs a clock
///        | "dup"              its completion is posted twice
///        | "badcid" [ "=" N ] a completion with identifier N (default FFFEh) is posted before it
///        | "badsqid" [ "=" N ]its completion names submission queue N (default FFFEh)
///        | "cfs"              the controller fails (CSTS.CFS) instead of taking the command
///        | "gone"             surprise removal: registers read as ones from then on
///        | "resize=" N        the namespace has N blocks from then on, with a notice
///        | "remove"           the namespace is no longer active, with a notice
///        | "warn=" HEX        critical warning bits are raised, with a SMART event
///        | "noreset"          CC.EN=0 is ignored
///        | "stuck"            CC.EN=1 is accepted, but CSTS.RDY never follows
/// filter = "op=" OP           read write flush zeroes dsm: that command; io: any I/O command;
///                             admin: any admin command; identify abort create features log doorbells
///                             format: that kind of admin command; any: all. Default: io
///        | "lba=" N [ "-" M ] only if the command touches a block in N..=M (not for op=dsm)
///        | "ns=" N            only this namespace; the one to resize or remove (default 1)
///        | "nth=" N           from the Nth command on that passes the filters (default 1)
///        | "every=" N         of those, each Nth (default 1)
///        | "count=" N         at most N times
/// ```
///
/// Without `count` a rule applies to every command from the `nth` on, but `cfs`, `gone`, `resize`,
/// `remove` and `warn` happen once. Several rules may hit one command and add up (`badcid` and
/// `lost` together: only the wrong identifier is ever seen). For `noreset` and `stuck` the events
/// counted are resets and enables, and `op`, `lba`, `ns` are not allowed. Numbers are decimal, or
/// hexadecimal after `0x`.
///
/// ```
/// let faults: nvme_model::Faults = "status=281:op=read,lba=100-199,count=2;lost:op=write,nth=10"
///     .parse()
///     .unwrap();
/// assert_eq!(faults.len(), 2);
/// assert!("status=zz".parse::<nvme_model::Faults>().is_err());
/// ```
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Faults {
    rules: Vec<Rule>,
}

/// When a delayed command is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Delay {
    Steps(u64),
    Nanos(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    Status(StatusCode),
    Lost { done: bool },
    Delay(Delay),
    Duplicate,
    BadCid(u16),
    BadSqid(u16),
    Fatal,
    Gone,
    Resize(u64),
    Remove,
    Warn(u8),
    NoReset,
    Stuck,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OpFilter {
    Any,
    Io,
    Admin,
    IoOp(IoOpcode),
    AdminOps(&'static [AdminOpcode]),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Rule {
    action: Action,
    op: OpFilter,
    lba: Option<(u64, u64)>,
    nsid: Option<u32>,
    nth: u64,
    every: u64,
    count: u64,
    /// Events that passed the filters.
    seen: u64,
    /// Times the rule took effect.
    fired: u64,
}

impl Rule {
    /// Counts an event that passed the filters; whether the rule takes effect on it.
    fn hit(&mut self) -> bool {
        self.seen += 1;
        if self.seen < self.nth
            || !(self.seen - self.nth).is_multiple_of(self.every)
            || self.fired >= self.count
        {
            return false;
        }
        self.fired += 1;
        true
    }

    fn matches(&self, admin: bool, sqe: &Sqe) -> bool {
        let op = match self.op {
            OpFilter::Any => true,
            OpFilter::Io => !admin,
            OpFilter::Admin => admin,
            OpFilter::IoOp(op) => !admin && sqe.opcode() == op.code(),
            OpFilter::AdminOps(ops) => admin && ops.iter().any(|op| op.code() == sqe.opcode()),
        };
        let target = matches!(self.action, Action::Resize(_) | Action::Remove);
        let ns = target || self.nsid.is_none_or(|n| n == sqe.nsid.get());
        op && ns && self.lba.is_none_or(|(first, last)| !admin && touches(sqe, first, last))
    }
}

/// Whether a command with an LBA range in its dwords touches a block in `first..=last`.
fn touches(sqe: &Sqe, first: u64, last: u64) -> bool {
    match IoOpcode::from_code(sqe.opcode()) {
        Some(IoOpcode::Read | IoOpcode::Write | IoOpcode::WriteZeroes) => {
            let end = sqe.slba().saturating_add(u64::from(sqe.block_count()) - 1);
            sqe.slba() <= last && first <= end
        }
        _ => false,
    }
}

/// What the fault list does to one command.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Effects {
    pub(crate) status: Option<StatusCode>,
    /// Never completes; `Some(true)`: but is carried out.
    pub(crate) lost: Option<bool>,
    pub(crate) delay: Option<Delay>,
    pub(crate) duplicate: bool,
    pub(crate) extra_cid: Option<u16>,
    pub(crate) sqid: Option<u16>,
    pub(crate) fatal: bool,
    pub(crate) gone: bool,
    pub(crate) resize: Option<(u32, u64)>,
    pub(crate) remove: Option<u32>,
    pub(crate) warn: u8,
    /// How many rules took effect.
    pub(crate) injected: u64,
}

impl Faults {
    /// A device without faults.
    pub fn none() -> Faults {
        Faults::default()
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there is no rule.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether any rule needs the time that is passed to a step.
    pub(crate) fn wants_time(&self) -> bool {
        self.rules.iter().any(|r| matches!(r.action, Action::Delay(Delay::Nanos(_))))
    }

    /// What happens to a command that was just fetched.
    pub(crate) fn command(&mut self, admin: bool, sqe: &Sqe) -> Effects {
        let mut e = Effects::default();
        for rule in &mut self.rules {
            if matches!(rule.action, Action::NoReset | Action::Stuck)
                || !rule.matches(admin, sqe)
                || !rule.hit()
            {
                continue;
            }
            e.injected += 1;
            let target = rule.nsid.unwrap_or(1);
            match rule.action {
                Action::Status(code) => e.status = Some(code),
                Action::Lost { done } => e.lost = Some(done),
                Action::Delay(delay) => e.delay = Some(delay),
                Action::Duplicate => e.duplicate = true,
                Action::BadCid(cid) => e.extra_cid = Some(cid),
                Action::BadSqid(sqid) => e.sqid = Some(sqid),
                Action::Fatal => e.fatal = true,
                Action::Gone => e.gone = true,
                Action::Resize(blocks) => e.resize = Some((target, blocks)),
                Action::Remove => e.remove = Some(target),
                Action::Warn(bits) => e.warn |= bits,
                Action::NoReset | Action::Stuck => {}
            }
        }
        e
    }

    fn event(&mut self, action: Action) -> bool {
        // Every rule counts the event, so no short cut.
        self.rules.iter_mut().filter(|r| r.action == action).fold(false, |hit, r| r.hit() | hit)
    }

    /// Whether a change of CC.EN to 0 is ignored.
    pub(crate) fn ignores_reset(&mut self) -> bool {
        self.event(Action::NoReset)
    }

    /// Whether the controller never gets ready after CC.EN was set.
    pub(crate) fn never_ready(&mut self) -> bool {
        self.event(Action::Stuck)
    }
}

/// A fault list that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FaultError {
    rule: String,
    problem: String,
}

impl fmt::Display for FaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault rule {:?}: {}", self.rule, self.problem)
    }
}

impl std::error::Error for FaultError {}

impl FromStr for Faults {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Faults, FaultError> {
        if text.trim().is_empty() {
            return Ok(Faults::none());
        }
        let rules = text.split(';').map(|rule| {
            let rule = rule.trim();
            parse_rule(rule).map_err(|problem| FaultError { rule: rule.to_owned(), problem })
        });
        Ok(Faults { rules: rules.collect::<Result<_, _>>()? })
    }
}

fn parse_rule(text: &str) -> Result<Rule, String> {
    let (action, filters) = match text.split_once(':') {
        Some((action, filters)) => (action, Some(filters)),
        None => (text, None),
    };
    let action = parse_action(action.trim())?;
    let once = matches!(
        action,
        Action::Fatal | Action::Gone | Action::Resize(_) | Action::Remove | Action::Warn(_)
    );
    let mut rule = Rule {
        action,
        op: OpFilter::Io,
        lba: None,
        nsid: None,
        nth: 1,
        every: 1,
        count: if once { 1 } else { u64::MAX },
        seen: 0,
        fired: 0,
    };
    for filter in filters.iter().flat_map(|f| f.split(',')) {
        let filter = filter.trim();
        let (key, value) =
            filter.split_once('=').ok_or_else(|| format!("{filter:?} is not a KEY=VALUE"))?;
        let control = matches!(action, Action::NoReset | Action::Stuck);
        match key {
            "op" | "lba" | "ns" if control => {
                return Err(format!("{key:?} makes no sense for this action"));
            }
            "op" => rule.op = parse_op(value)?,
            "lba" => rule.lba = Some(parse_range(value)?),
            "ns" => {
                rule.nsid = Some(
                    u32::try_from(number(value)?)
                        .map_err(|_| format!("namespace {value} exceeds 32 bits"))?,
                );
            }
            "nth" => rule.nth = positive(key, value)?,
            "every" => rule.every = positive(key, value)?,
            "count" => rule.count = positive(key, value)?,
            _ => return Err(format!("{key:?} is not one of op, lba, ns, nth, every, count")),
        }
    }
    Ok(rule)
}

fn parse_action(text: &str) -> Result<Action, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let need = || value.ok_or_else(|| format!("{name:?} needs a value"));
    let id = |default: u16| match value {
        None => Ok(default),
        Some(v) => u16::try_from(number(v)?).map_err(|_| format!("{v} exceeds 16 bits")),
    };
    let plain = |action| match value {
        None => Ok(action),
        Some(_) => Err(format!("{name:?} takes no value")),
    };
    match name {
        "status" => {
            let v = need()?;
            let code = hex(v).filter(|&c| c <= 0x7ff && c != 0).ok_or_else(|| {
                format!("status {v:?} is not a hexadecimal number from 1 to 7ff (type and code)")
            })?;
            Ok(Action::Status(StatusCode(code as u16)))
        }
        "lost" => match value {
            None => Ok(Action::Lost { done: false }),
            Some("done") => Ok(Action::Lost { done: true }),
            Some(v) => Err(format!("\"lost\" takes \"done\" or nothing, not {v:?}")),
        },
        "delay" => parse_delay(need()?).map(Action::Delay),
        "dup" => plain(Action::Duplicate),
        "badcid" => id(0xfffe).map(Action::BadCid),
        "badsqid" => id(0xfffe).map(Action::BadSqid),
        "cfs" => plain(Action::Fatal),
        "gone" => plain(Action::Gone),
        "resize" => number(need()?).map(Action::Resize),
        "remove" => plain(Action::Remove),
        "warn" => {
            let v = need()?;
            let bits = hex(v).filter(|&b| b <= 0x1f && b != 0);
            let bits = bits.ok_or_else(|| format!("warning {v:?} is not hexadecimal, 1 to 1f"))?;
            Ok(Action::Warn(bits as u8))
        }
        "noreset" => plain(Action::NoReset),
        "stuck" => plain(Action::Stuck),
        _ => Err(format!(
            "{name:?} is not one of status, lost, delay, dup, badcid, badsqid, cfs, gone, resize, \
             remove, warn, noreset, stuck"
        )),
    }
}

fn parse_op(text: &str) -> Result<OpFilter, String> {
    use AdminOpcode as A;
    Ok(match text {
        "any" => OpFilter::Any,
        "io" => OpFilter::Io,
        "admin" => OpFilter::Admin,
        "read" => OpFilter::IoOp(IoOpcode::Read),
        "write" => OpFilter::IoOp(IoOpcode::Write),
        "flush" => OpFilter::IoOp(IoOpcode::Flush),
        "zeroes" => OpFilter::IoOp(IoOpcode::WriteZeroes),
        "dsm" => OpFilter::IoOp(IoOpcode::DatasetManagement),
        "identify" => OpFilter::AdminOps(&[A::Identify]),
        "abort" => OpFilter::AdminOps(&[A::Abort]),
        "create" => OpFilter::AdminOps(&[A::CreateIoCq, A::CreateIoSq]),
        "features" => OpFilter::AdminOps(&[A::SetFeatures, A::GetFeatures]),
        "log" => OpFilter::AdminOps(&[A::GetLogPage]),
        "doorbells" => OpFilter::AdminOps(&[A::DoorbellBufferConfig]),
        "format" => OpFilter::AdminOps(&[A::FormatNvm]),
        _ => {
            return Err(format!(
                "op {text:?} is not one of any, io, admin, read, write, flush, zeroes, dsm, \
                 identify, abort, create, features, log, doorbells, format"
            ));
        }
    })
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if first > last {
        return Err(format!("lba range {text:?} ends before it begins"));
    }
    Ok((first, last))
}

fn parse_delay(text: &str) -> Result<Delay, String> {
    let scaled = |digits: &str, unit: u64| {
        number(digits)?.checked_mul(unit).map(Delay::Nanos).ok_or(format!("{text:?} is too long"))
    };
    if let Some(us) = text.strip_suffix("us") {
        scaled(us, 1_000)
    } else if let Some(ms) = text.strip_suffix("ms") {
        scaled(ms, 1_000_000)
    } else {
        Ok(Delay::Steps(number(text)?))
    }
}

fn positive(key: &str, text: &str) -> Result<u64, String> {
    match number(text)? {
        0 => Err(format!("{key} counts from 1")),
        n => Ok(n),
    }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(_) => hex(text),
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    };
    parsed.ok_or_else(|| format!("{text:?} is not a number"))
}

/// A hexadecimal number, with or without `0x`. A sign is refused, which the standard parser takes.
fn hex(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Faults {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    fn reads(faults: &mut Faults, lba: u64, n: usize) -> Vec<bool> {
        let sqe = Sqe::read(1, 1, lba, 7, 0);
        (0..n).map(|_| faults.command(false, &sqe).status.is_some()).collect()
    }

    #[test]
    fn counting() {
        let mut f = parse("status=281:op=read,nth=2,every=2,count=2");
        assert_eq!(reads(&mut f, 0, 8), [false, true, false, true, false, false, false, false]);
        let mut f = parse("status=0x281");
        assert_eq!(reads(&mut f, 0, 2), [true, true]);
    }

    #[test]
    fn filters() {
        let mut f = parse("status=281:op=read,lba=100-0x70,ns=1");
        assert_eq!(reads(&mut f, 92, 1), [false]);
        assert_eq!(reads(&mut f, 93, 1), [true]);
        assert_eq!(reads(&mut f, 112, 1), [true]);
        assert_eq!(reads(&mut f, 113, 1), [false]);
        assert!(f.command(false, &Sqe::read(1, 2, 100, 0, 0)).status.is_none());
        assert!(f.command(false, &Sqe::write(1, 1, 100, 0, 0)).status.is_none());
        assert!(f.command(false, &Sqe::read(1, 1, u64::MAX, 7, 0)).status.is_none());
        let mut f = parse("lost:op=create");
        assert!(f.command(true, &Sqe::create_io_cq(0, 1, 2, 0, None)).lost.is_some());
        // Opcode 5 is Compare in the I/O set.
        assert!(f.command(false, &Sqe::new(5, 0, 1)).lost.is_none());
        assert!(f.command(true, &Sqe::delete_io_cq(0, 1)).lost.is_none());
    }

    #[test]
    fn rules_add_up() {
        let mut f = parse(" badcid=7 ; lost=done ; dup;badsqid;delay=20us;warn=4;cfs:nth=2");
        assert!(f.wants_time());
        let e = f.command(false, &Sqe::flush(1, 1));
        assert_eq!(
            (e.extra_cid, e.lost, e.duplicate, e.sqid, e.delay, e.warn, e.fatal, e.injected),
            (Some(7), Some(true), true, Some(0xfffe), Some(Delay::Nanos(20_000)), 4, false, 6)
        );
        let e = f.command(false, &Sqe::flush(1, 1));
        assert!(e.fatal && e.warn == 0);
        assert!(!f.command(false, &Sqe::flush(1, 1)).fatal);
    }

    #[test]
    fn control_events() {
        let mut f = parse("noreset:count=1;stuck:nth=2");
        assert!(f.ignores_reset() && !f.ignores_reset());
        assert!(!f.never_ready() && f.never_ready() && f.never_ready());
        assert_eq!(f.command(false, &Sqe::flush(1, 1)).injected, 0);
    }

    #[test]
    fn errors_name_the_rule_and_the_problem() {
        for (text, part) in [
            ("status", "needs a value"),
            ("status=800", "1 to 7ff"),
            ("status=0", "1 to 7ff"),
            ("status=+1", "1 to 7ff"),
            ("lost=maybe", "maybe"),
            ("explode", "not one of"),
            ("dup=1", "takes no value"),
            ("dup:op=erase", "erase"),
            ("dup:lba=9-3", "before it begins"),
            ("dup:lba=x", "not a number"),
            ("dup:nth=0", "counts from 1"),
            ("dup:color=red", "color"),
            ("dup:op", "KEY=VALUE"),
            ("dup:", "KEY=VALUE"),
            ("dup;", "not one of"),
            ("noreset:op=read", "makes no sense"),
            ("delay=99999999999999999999", "not a number"),
            ("delay=18446744073709551615ms", "too long"),
            ("badcid=65536", "16 bits"),
            ("dup:ns=4294967296", "32 bits"),
            ("warn=20", "1 to 1f"),
            ("resize=0x", "not a number"),
        ] {
            let error = text.parse::<Faults>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(parse("").is_empty());
        assert!(parse("  ").is_empty());
    }
}
