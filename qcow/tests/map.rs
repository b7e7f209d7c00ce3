//! The map as one thread sees it, and as a reader on another does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow::map::{Kind, Map, Pages, Word};

#[test]
fn words_keep_what_they_say() {
    let w = Word::mapped(200, 0x00ff_ffff_ffff_fe00, false);
    assert_eq!((w.kind(), w.layer(), w.host()), (Kind::Mapped, 200, 0x00ff_ffff_ffff_fe00));
    assert!(w.readable() && !w.writable_in_place(0) && !w.owned());
    let own = Word::mapped(0, 1 << 16, true);
    assert!(own.readable() && own.writable_in_place(0));
    assert!(own.continued_by(Word::mapped(0, 2 << 16, true), 1 << 16));
    assert!(!own.continued_by(Word::mapped(0, 2 << 16, false), 1 << 16));
    for w in [Word::hole(), Word::split(), Word::corrupt(), Word::compressed(3), Word::ABSENT] {
        assert!(!w.readable() && !w.writable_in_place(0));
    }
    assert_eq!(Word::zero(0, 512, true).host(), 512);
    assert_eq!(Word::compressed(3).layer(), 3);
}

#[test]
fn claims_exclude_each_other_and_show_the_old_mapping() {
    let map = Map::new(1000, 4, 1 << 20, 1).unwrap();
    let mut pages = Pages::new(&map);
    let old = Word::mapped(1, 512, false);
    assert!(pages.load(&map, 0, &[old; 16]));
    assert!(map.claim(3, map.lookup(3)));
    let seen = map.lookup(3);
    assert!(seen.claimed() && seen.readable() && !map.claim(3, seen));
    assert!(!map.lookup(3).writable_in_place(0));
    map.publish(3, Word::mapped(0, 1024, true));
    assert!(map.lookup(3).writable_in_place(0));
    assert_eq!(map.lookup(4), old);
    assert_eq!(map.lookup(16), Word::ABSENT);
    assert_eq!(map.lookup(u64::MAX), Word::ABSENT);
}

/// Fetching is a hint: of whatever cluster, it changes nothing.
#[test]
fn fetching_changes_nothing() {
    for budget in [0, 1 << 30] {
        let map = Map::new(100_000, 4, budget, 2).unwrap();
        let mut pages = Pages::new(&map);
        assert_eq!(map.is_far(), budget > 0);
        let word = Word::mapped(0, 512, true);
        assert!(pages.load(&map, 3, &[word; 16]));
        for cluster in [0, 47, 48, 63, 64, 99_999, 100_000, u64::MAX] {
            map.prefetch(std::iter::once(cluster));
            let expected = if (48..64).contains(&cluster) { word } else { Word::ABSENT };
            assert_eq!(map.lookup(cluster), expected, "{cluster}");
        }
    }
}

#[test]
fn where_all_pages_have_a_place_none_ever_goes() {
    // 160 clusters in pages of 16, the last of which is not full.
    let map = Map::new(154, 4, 10 * 16 * 8, 1).unwrap();
    let mut pages = Pages::new(&map);
    assert_eq!(map.page_count(), 10);
    let word = |cluster: u64| Word::mapped(0, (cluster + 1) * 512, true);
    for number in [7, 0, 9, 3, 1, 2, 8, 4, 6, 5] {
        let first = number * 16;
        let words: Vec<Word> = (first..(first + 16).min(154)).map(word).collect();
        assert_eq!(map.lookup(first), Word::ABSENT);
        // Not before it is loaded.
        assert!(!map.replace(first, Word::ABSENT, word(0)) && !map.claim(first, word(first)));
        pages.hold(&map, first);
        assert!(pages.load(&map, number, &words));
        pages.hold(&map, first);
        // It is there: loading it again changes nothing.
        assert!(pages.load(&map, number, &[Word::hole(); 16]));
        pages.release(&map, first);
    }
    for cluster in 0..200 {
        let expected = if cluster < 154 { word(cluster) } else { Word::ABSENT };
        assert_eq!(map.lookup(cluster), expected);
    }
    assert!(!pages.load(&map, 10, &[]));
    assert_eq!(map.lookup(u64::MAX), Word::ABSENT);
    assert!(map.claim(153, word(153)));
    map.publish(153, Word::hole());
    assert_eq!((map.lookup(153), map.lookup(152)), (Word::hole(), word(152)));
}

#[test]
fn the_oldest_page_goes_unless_held() {
    let map = Map::new(160, 4, 0, 2).unwrap();
    let mut pages = Pages::new(&map);
    let words = |n: u64| vec![Word::mapped(0, n * 512, true); 16];
    assert!(pages.load(&map, 0, &words(1)) && pages.load(&map, 1, &words(2)));
    pages.hold(&map, 5);
    assert!(pages.load(&map, 2, &words(3)));
    assert_eq!(map.lookup(5).host(), 512);
    assert_eq!(map.lookup(16), Word::ABSENT);
    assert_eq!(map.lookup(32).host(), 1536);
    pages.hold(&map, 32);
    assert!(!pages.load(&map, 3, &words(4)));
    pages.release(&map, 5);
    assert!(pages.load(&map, 3, &words(4)));
    assert_eq!(map.lookup(0), Word::ABSENT);
}

/// Readers must never see a word of another page than they asked for, however pages change
/// places under them.
#[test]
fn readers_survive_eviction() {
    let map = Arc::new(Map::new(64 * 16, 4, 0, 3).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (map, stop) = (map.clone(), stop.clone());
        std::thread::spawn(move || {
            let (mut hits, mut i) = (0u64, 0u64);
            while !stop.load(Ordering::Relaxed) {
                i = (i + 7) % (64 * 16);
                let w = map.lookup(i);
                if w != Word::ABSENT {
                    assert_eq!(w.host(), (i + 1) * 512, "a word of another page");
                    hits += 1;
                }
            }
            hits
        })
    };
    let mut pages = Pages::new(&map);
    for round in 0..200_000u64 {
        let n = (round * 13) % 64;
        let words: Vec<Word> =
            (0..16).map(|i| Word::mapped(0, (n * 16 + i + 1) * 512, true)).collect();
        assert!(pages.load(&map, n, &words));
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
}

#[test]
fn what_must_be_recorded_holds_up_writes_alone() {
    let w = Word::mapped(0, 1 << 16, true).unmarked();
    assert!(w.readable() && !w.writable_in_place(0) && w.owned() && w.host() == 1 << 16);
    assert!(w.marked().writable_in_place(0));
    let next = Word::mapped(0, 2 << 16, true);
    assert!(!w.continued_by(next, 1 << 16) && w.for_reads().continued_by(next, 1 << 16));
}
