//! Pages of results that are as they should be, and of results that mean harm.

use std::collections::BTreeMap;

use bench::run::{Outcome, Percentiles, Server};

use super::*;
use crate::results::{Flame, Frontend, PeerInfo};

/// What would be markup if it were not escaped, in every place.
const EVIL: &str = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{7*7}}\u{202e}";

fn outcome(iops: f64, ns: u64) -> Outcome {
    let cdf = (1..=20).map(|i| (ns.saturating_mul(i) / 4, f64::from(i as u32) / 20.0)).collect();
    Outcome {
        seconds: 1.0,
        requests: iops as u64,
        bytes: 0,
        errors: 0,
        iops,
        latency_ns: Percentiles::default(),
        reads: None,
        writes: None,
        trims: None,
        flushes: None,
        cdf,
        windows: Vec::new(),
        steady: None,
        server: Server::default(),
        verified_bytes: 0,
    }
}

fn row(peer: &str, frontend: Frontend, variant: &str, (iops, ns, cpu): (f64, u64, f64)) -> Row {
    let own = peer == POLLDISK;
    Row {
        peer: peer.to_owned(),
        frontend,
        variant: variant.to_owned(),
        workload: "randread".to_owned(),
        block_size: 4096,
        depth: 1,
        iops,
        latency_ns: ns,
        cpu_us_per_io: Some(cpu),
        cpu_us_per_io_polling: own.then_some(cpu * 3.0),
        syscalls_per_io: Some(if own { 0.0 } else { 13.2 }),
        instructions_per_io: None,
        switches_per_io: None,
        ratio: (!own).then_some(cpu / 2.0),
        ratio_interval: (!own).then_some([cpu / 2.2, cpu / 1.8]),
        cpu_us_above_floor: None,
        percentiles_ns: Percentiles {
            p50: ns,
            p99: ns.saturating_mul(3),
            p99_9: ns.saturating_mul(9),
            ..Percentiles::default()
        },
        rounds: vec![outcome(iops, ns)],
        labels: BTreeMap::from([("cache".to_owned(), "3 MiB".to_owned())]),
        command: format!("polldisk bench run --peer {peer}"),
    }
}

fn comparison(profile: &str, results: Vec<Row>) -> Comparison {
    let peer = |name: &str, version: Option<&str>, absent: Option<&str>| PeerInfo {
        name: name.to_owned(),
        version: version.map(str::to_owned),
        absent: absent.map(str::to_owned),
    };
    Comparison {
        profile: profile.to_owned(),
        question: "How long does one wait?".to_owned(),
        quick: false,
        began: 1_795_750_000,
        command: format!("polldisk bench compare --profile {profile}"),
        host: Host {
            facts: vec![("CPU".to_owned(), "Xeon".to_owned())],
            processors: 2,
            cores: Some([0, 1]),
        },
        peers: vec![
            peer("polldisk", Some("0.1.0"), None),
            peer("tapdisk", None, Some("not on PATH; it is part of XCP-ng")),
        ],
        results,
        notes: vec!["steal was seen".to_owned()],
        flames: vec![Flame {
            peer: "qemu-storage-daemon".to_owned(),
            workload: "randread".to_owned(),
            folded: vec!["main;loop;ppoll 70".to_owned(), "main;loop;send 30".to_owned()],
        }],
    }
}

fn plain() -> Comparison {
    let rows = vec![
        row("qemu-storage-daemon", Frontend::Nbd, "", (5000.0, 190_000, 51.5)),
        row("polldisk", Frontend::Ring, "", (250_000.0, 4000, 2.0)),
        row("polldisk", Frontend::Nbd, "", (9000.0, 90_000, 40.0)),
    ];
    comparison("latency", rows)
}

/// A profile that varies the cache, for two sizes of disks.
fn swept() -> Comparison {
    let mut rows = Vec::new();
    for (i, size) in ["16", "8", "6.25", "3"].into_iter().enumerate() {
        let slow = 40_000.0 / (i + 1) as f64;
        let ours = format!("model, l2-cache {size} MiB, disk=128 GiB");
        let theirs = format!("aio=native, A: l2-cache {size} MiB, entries 64 KiB, disk=128 GiB");
        rows.push(row("qemu-dp", Frontend::Nbd, &theirs, (slow, 90_000, 11.0)));
        rows.push(row("polldisk", Frontend::Ring, &ours, (100_000.0, 9000, 0.5)));
    }
    rows.push(row("nbdkit", Frontend::Nbd, "memory, disk=128 GiB", (70_000.0, 20_000, 5.8)));
    rows.push(row("polldisk", Frontend::Ring, "model, disk=1 GiB", (100_000.0, 9000, 0.5)));
    for row in &mut rows {
        let disk = if row.variant.ends_with("1 GiB") { "1 GiB" } else { "128 GiB" };
        row.labels = BTreeMap::from([("disk".to_owned(), disk.to_owned())]);
    }
    comparison("l2-cache", rows)
}

/// A profile that varies a label.
fn labelled() -> Comparison {
    let mut rows = Vec::new();
    for (devices, ours) in [("1", 100_000.0), ("2", 190_000.0), ("4", 360_000.0)] {
        for (peer, way, rate) in [("polldisk", "model", ours), ("qemu-dp", "aio=native", 40_000.0)]
        {
            let variant = format!("{way}, devices={devices}");
            let mut row = row(peer, Frontend::Nbd, &variant, (rate, 9000, 1.0));
            row.labels = BTreeMap::from([("devices".to_owned(), devices.to_owned())]);
            rows.push(row);
        }
    }
    comparison("raid0", rows)
}

fn html(comparisons: &[Comparison]) -> String {
    let profiles: Vec<Profile<'_>> =
        comparisons.iter().enumerate().map(|(n, c)| Profile::new(n, c).unwrap()).collect();
    page(&profiles).into_string()
}

#[test]
fn the_page_has_all_that_was_found() {
    let page = html(&[plain(), swept()]);
    for part in [
        "How long does one wait?",
        "shortened run",
        "Xeon",
        "generator on 0, server on 1",
        "not on PATH",
        "steal was seen",
        "polldisk bench compare --profile latency",
        "polldisk bench run --peer qemu-dp",
        "prefers-color-scheme:dark",
        "@media print",
        "name=\"viewport\"",
        "data:image/svg+xml;base64,",
        "2026-11-27",
    ] {
        assert_eq!(page.contains(part), part != "shortened run", "{part}");
    }
    // Four metrics, ratios and distributions of one workload; and of two disks, of which one has no peer.
    assert_eq!(page.matches("class=\"chart\"").count(), 6 + 11);
    // Every chart says what it shows, under an identifier that is its own.
    let titles: Vec<&str> =
        page.split("<title id=\"").skip(1).map(|t| t.split('"').next().unwrap()).collect();
    let mut once = titles.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!((titles.len(), once.len()), (17, 17));
    assert!(titles.iter().all(|id| page.contains(&format!("aria-labelledby=\"{id}\""))));
    let mut shortened = plain();
    shortened.quick = true;
    assert!(html(&[shortened]).contains("shortened run"));
}

#[test]
fn what_is_varied_becomes_lines() {
    let page = html(&[swept()]);
    for part in [
        "IOPS, by L2 cache; randread, 4 KiB, depth 1, disk 128 GiB: polldisk (ring, model) 100k at 3 MiB",
        "qemu-dp (NBD, aio=native, entries 64 KiB) 10k at 3 MiB, 13.3k at 6.25 MiB, 20k at 8 MiB, 40k at 16 MiB",
        "nbdkit (NBD, memory) 70k at default",
        // One value is no line.
        "IOPS; randread, 4 KiB, depth 1, disk 1 GiB: polldisk (ring, model) 100k<",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let page = html(&[labelled()]);
    let part = "IOPS, by devices; randread, 4 KiB, depth 1: polldisk (NBD, model) 100k at 1, 190k at 2, 360k at 4";
    assert!(page.contains(part));
}

#[test]
fn nothing_is_fetched_and_nothing_runs() {
    let page = html(&[plain(), swept()]);
    for part in [
        "<script",
        "<link",
        "@import",
        "url(",
        "http://",
        "https://",
        " src=\"http",
        "onload",
        "<iframe",
        "<object",
    ] {
        assert!(!page.contains(part), "{part}");
    }
}

#[test]
fn answers_come_from_the_figures() {
    let text = answer(&plain());
    assert!(text.starts_with("polldisk answers in 4 µs (ring) and 90 µs (NBD)"), "{text}");
    assert!(text.contains("qemu-storage-daemon (NBD), in 190 µs (randread, 4 KiB"), "{text}");
    assert!(text.contains("25.7 times as much in qemu-storage-daemon (NBD)."), "{text}");
    let text = answer(&swept());
    assert!(
        text.contains("the lowest IOPS are, of the highest, 100 % in polldisk (ring)"),
        "{text}"
    );
    assert!(text.contains("25 % in qemu-dp (NBD)"), "{text}");
    let text = answer(&labelled());
    assert!(
        text.starts_with("From devices 1 to 4, IOPS become 3.6 times as many in polldisk"),
        "{text}"
    );
    assert!(text.contains("1 times as many in qemu-dp (NBD)"), "{text}");
    let mut alone = plain();
    alone.results.retain(|r| r.peer == POLLDISK);
    assert_eq!(answer(&alone), "No peer took part that polldisk could be compared with.");
    alone.results.clear();
    assert_eq!(answer(&alone), "Nothing was measured.");
    let mut others = plain();
    others.results.retain(|r| r.peer != POLLDISK);
    assert!(answer(&others).starts_with("There are no figures of polldisk"));
}

/// Puts [`EVIL`] into every string.
fn evil() -> Comparison {
    let mut c = plain();
    let evil = || EVIL.to_owned();
    (c.profile, c.question, c.command) = (evil(), evil(), evil());
    c.host.facts.push((evil(), evil()));
    c.peers.push(PeerInfo { name: evil(), version: Some(evil()), absent: Some(evil()) });
    c.notes.push(evil());
    let mut bad = row(EVIL, Frontend::Nbd, EVIL, (5.0, 5, 5.0));
    (bad.workload, bad.command) = (evil(), evil());
    bad.labels.insert(evil(), evil());
    c.results.push(bad);
    c.flames.push(Flame {
        peer: evil(),
        workload: evil(),
        folded: vec![
            format!("{EVIL};b 5"),
            EVIL.to_owned(),
            String::new(),
            "a 99999999999999999999".into(),
            "a 3 5".into(),
        ],
    });
    c
}

#[test]
fn strings_from_outside_stay_text() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[evil(), evil()]).unwrap();
    let page = fs::read_to_string(dir.path().join("report.html")).unwrap();
    for part in ["<script", "<img src=x", "onerror=alert(1)>&amp;"] {
        assert!(!page.contains(part), "{part}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    for entry in fs::read_dir(dir.path().join(CHARTS)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)), "{name}");
        let svg = fs::read_to_string(&path).unwrap();
        assert!(!svg.contains("<script>alert") && !svg.contains("<img"), "{name}");
    }
    // What was written is read again as it was.
    let again = read(&dir.path().join("results.json")).unwrap();
    assert_eq!(again.len(), 2);
    assert_eq!(again[0].notes.last().unwrap(), EVIL);
}

#[test]
fn figures_that_cannot_be_are_left_out() {
    let mut c = swept();
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300, f64::MIN_POSITIVE];
    for value in odd {
        let mut bad = row("odd", Frontend::Kernel, "", (value, u64::MAX, value));
        bad.block_size = u32::MAX;
        bad.depth = u32::MAX;
        bad.ratio = Some(value);
        bad.ratio_interval = Some([value, f64::NAN]);
        bad.syscalls_per_io = Some(value);
        bad.rounds[0].cdf = vec![(u64::MAX, value), (0, 0.5), (5, 2.0)];
        bad.rounds[0].errors = u64::MAX;
        c.results.push(bad);
    }
    c.began = u64::MAX;
    let mut only = c.clone();
    only.results.retain(|r| r.peer == "odd");
    let page = html(&[c.clone(), only.clone()]);
    assert!(!page.contains("NaN") && !page.contains("inf<") && page.contains("class=\"chart\""));
    only.results.iter_mut().for_each(|r| r.peer = POLLDISK.to_owned());
    for c in [&c, &only] {
        assert!(!answer(c).contains("NaN"), "{}", answer(c));
    }
    assert!(crate::csv::csv(&[c]).is_ok());
}

#[test]
fn csv_has_a_line_for_each_row() {
    let text = String::from_utf8(crate::csv::csv(&[plain(), evil()]).unwrap()).unwrap();
    let mut reader = ::csv::Reader::from_reader(text.as_bytes());
    let head = reader.headers().unwrap().clone();
    let at = |name: &str| head.iter().position(|h| h == name).unwrap();
    let rows: Vec<_> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 3 + 4);
    assert_eq!((&rows[0][at("peer")], &rows[0][at("iops")]), ("qemu-storage-daemon", "5000"));
    assert_eq!((&rows[1][at("frontend")], &rows[1][at("labels")]), ("ring", "cache=3 MiB"));
    assert_eq!((&rows[0][at("instructions_per_io")], &rows[6][at("peer")]), ("", EVIL));
}

#[test]
fn files_that_are_no_results_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.json");
    assert!(read(&file).unwrap_err().to_string().contains("cannot read"));
    for text in ["", "{}", "[{}]", "[[[[", "{\"profile\":1}"] {
        fs::write(&file, text).unwrap();
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains("x.json") && error.contains("no results"), "{error}");
    }
    fs::File::create(&file).unwrap().set_len(MOST + 1).unwrap();
    assert!(read(&file).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn dates() {
    for (seconds, text) in [
        (0, "1970-01-01 00:00 UTC"),
        (951_782_400, "2000-02-29 00:00 UTC"),
        (951_868_799, "2000-02-29 23:59 UTC"),
        (4_107_542_400, "2100-03-01 00:00 UTC"),
        (1_795_750_000, "2026-11-27 03:26 UTC"),
        (1_798_761_599, "2026-12-31 23:59 UTC"),
    ] {
        assert_eq!(date(seconds), text);
    }
}
