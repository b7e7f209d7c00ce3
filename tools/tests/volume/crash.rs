//! Killed in the middle: the old state or the new one.

#![expect(clippy::disallowed_methods, reason = "a test's patience is no hot path")]

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use super::*;

/// Runs a command and kills it after so many microseconds. Whether it was killed.
fn killed(env: &Env, line: &str, after: u64) -> bool {
    let mut command = env.command(line);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_micros(after));
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{line}: {status}");
    status.signal().is_some()
}

/// Names and sizes of all volumes.
fn volumes(env: &Env) -> Vec<(String, u64)> {
    let list = env.run("list --json a b").json();
    let of = |v: &Value| (v["name"].as_str().unwrap().to_owned(), v["size"].as_u64().unwrap());
    list["volumes"].as_array().unwrap().iter().map(of).collect()
}

/// How many times each command is killed, all over the time that it takes.
const KILLS: u32 = 30;

#[test]
fn a_kill_leaves_the_old_or_the_new_state() {
    let env = Env::group();
    env.run("create vg/v --size 4M a b").ok();
    let v = |size: u64| Some(("v".to_owned(), size * MIB));
    let w = |size: u64| Some(("w".to_owned(), size * MIB));
    // The command, what it makes of what, and what undoes it.
    let steps = [
        ("create vg/w --size 8M --stripes 2 a b", "w", None, w(8), &["remove vg/w a b"][..]),
        (
            "extend vg/v --size 12M a b",
            "v",
            v(4),
            v(12),
            &["remove vg/v a b", "create vg/v --size 4M a b"],
        ),
        ("remove vg/v a b", "v", v(4), None, &["create vg/v --size 4M a b"]),
    ];
    for (line, name, old, new, undo) in steps {
        let undo = || undo.iter().for_each(|line| drop(env.run(line).ok()));
        let state = || volumes(&env).into_iter().find(|v| v.0 == name);
        let began = Instant::now();
        env.run(line).ok();
        let whole = began.elapsed().as_micros() as u64;
        assert_eq!(state(), new);
        undo();
        let (mut kills, mut olds, mut news) = (0, 0, 0);
        for n in 1..=KILLS {
            let was_killed = killed(&env, line, whole * u64::from(n) / u64::from(KILLS));
            kills += u32::from(was_killed);
            let now = state();
            assert!(now == old || now == new, "{line}: {old:?} has become {now:?}");
            if now == new {
                news += 1;
                undo();
            } else {
                olds += 1;
                assert!(was_killed, "{line}: ended well and did nothing");
            }
        }
        println!("{line}: {kills} kills: {olds} times the old state, {news} times the new one");
        assert!(kills > 0 && olds > 0);
        // The next change repairs whatever was left.
        env.run("create vg/probe --size 4M a b").ok();
        env.run("remove vg/probe a b").ok();
        env.run("check a b").ok();
    }
}

#[test]
fn a_kill_while_a_group_is_made_leaves_one_or_none() {
    let env = Env::new();
    let mut after = 300;
    loop {
        env.disk("a", 64);
        env.disk("b", 64);
        let was_killed = killed(&env, "create-group vg a b", after);
        let list = env.run("list a b");
        if list.code == 0 {
            env.run("create vg/v --size 4M a b").ok();
            env.run("check a b").ok();
            break;
        }
        assert!(was_killed);
        // What is left is no obstacle once it is said that it may go.
        env.run("create-group vg a b --force").ok();
        env.run("check a b").ok();
        after = after * 5 / 4;
    }
}
