//! `Store::claim_probes`: which rows find out whether the destination works.

use std::collections::HashSet;
use std::time::Duration;

use asyncproxy::queue::{Claim, Class, NewRow, Probe, Spot, Store};
use uuid::Uuid;

use crate::contract::{Bench, LEASE, append_one, contract, counts, delivered, request, row};

contract!(
    a_probe_is_claimed_like_any_row,
    those_tried_least_come_first_at_either_end,
    what_is_excepted_is_left_out,
    probes_anywhere_are_of_all_rows,
    what_is_not_due_is_no_probe,
    probes_take_no_more_bytes_than_asked_but_always_one_row,
    a_probe_that_cannot_be_read_is_buried,
    without_rows_there_are_no_probes,
);

const SPOTS: [Spot; 3] = [Spot::Front, Spot::End, Spot::Anywhere];

fn probe(class: Class, spot: Spot, limit: usize) -> Probe<'static> {
    Probe {
        class,
        spot,
        limit,
        bytes_max: usize::MAX,
        except: &[],
    }
}

fn claim(store: &dyn Store, wanted: &Probe<'_>) -> Claim {
    store.claim_probes(wanted, LEASE).unwrap()
}

fn ids(claim: &Claim) -> Vec<Uuid> {
    claim.rows.iter().map(|row| row.request.id).collect()
}

/// Appends a row after so many attempts, later than those before.
fn append_tried(store: &dyn Store, attempt: u32) -> Uuid {
    std::thread::sleep(Duration::from_millis(2));
    let row = NewRow {
        attempt,
        ..row(request(b"tried"))
    };
    store.append(std::slice::from_ref(&row)).unwrap();
    row.request.id
}

fn a_probe_is_claimed_like_any_row(bench: &Bench) {
    let store = bench.open();
    for spot in SPOTS {
        let id = append_one(&*store);
        let claim = claim(&*store, &probe(Class::Fresh, spot, 4));
        assert_eq!((ids(&claim), claim.rows[0].attempt), (vec![id], 1));
        assert_eq!(counts(&*store), (0, 1, 0));
        let again = store.claim_probes(&probe(Class::Fresh, spot, 4), LEASE);
        assert!(ids(&again.unwrap()).is_empty());
        let settled = store.settle(&[delivered(&claim.rows[0])]).unwrap();
        assert_eq!(settled.delivered, 1);
    }
}

fn those_tried_least_come_first_at_either_end(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = [1, 0, 7, 0, 3, 1, 0, 1]
        .into_iter()
        .map(|attempt| append_tried(&*store, attempt))
        .collect();
    let claim = |class, spot, limit| {
        let mut ids = ids(&claim(&*store, &probe(class, spot, limit)));
        ids.sort_unstable();
        ids
    };
    assert_eq!(claim(Class::Fresh, Spot::Front, 2), [rows[1], rows[3]]);
    assert_eq!(claim(Class::Fresh, Spot::End, 2), [rows[6], rows[7]]);
    assert_eq!(claim(Class::Fresh, Spot::End, 1), [rows[5]]);
    assert_eq!(claim(Class::Fresh, Spot::Front, 5), [rows[0]]);
    assert_eq!(claim(Class::Retried, Spot::Front, 1), [rows[4]]);
    assert_eq!(claim(Class::Retried, Spot::End, 5), [rows[2]]);
}

fn what_is_excepted_is_left_out(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..6).map(|_| append_tried(&*store, 0)).collect();
    for (spot, expected) in [
        (Spot::Front, rows[1]),
        (Spot::End, rows[4]),
        (Spot::Anywhere, rows[2]),
    ] {
        let except: Vec<_> = rows
            .iter()
            .copied()
            .filter(|row| *row != expected)
            .collect();
        let wanted = Probe {
            except: &except,
            ..probe(Class::Fresh, spot, 6)
        };
        assert_eq!(ids(&claim(&*store, &wanted)), [expected], "{spot:?}");
    }
}

fn probes_anywhere_are_of_all_rows(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..300).map(|_| row(request(b"any"))).collect();
    store.append(&rows).unwrap();
    append_tried(&*store, 5);
    let mut claimed = HashSet::new();
    for _ in 0..6 {
        let claim = claim(&*store, &probe(Class::Fresh, Spot::Anywhere, 5));
        assert!(claim.rows.iter().all(|row| row.attempt == 1));
        claimed.extend(ids(&claim));
    }
    assert!(claimed.len() >= 20, "{}", claimed.len());
    // By chance alone all are at one end once in more than ten thousand million times.
    let places = rows.iter().enumerate();
    let places = places.filter(|(_, row)| claimed.contains(&row.request.id));
    let first = places.filter(|(place, _)| *place < 100).count();
    assert!((1..claimed.len()).contains(&first), "{first}");
}

fn what_is_not_due_is_no_probe(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    assert_eq!(
        store.claim(Class::Fresh, 1, 1, LEASE).unwrap().rows.len(),
        1
    );
    for class in [Class::Fresh, Class::Retried] {
        for spot in SPOTS {
            assert!(ids(&claim(&*store, &probe(class, spot, 3))).is_empty());
        }
    }
    append_one(&*store);
    let now = bench.dialect.now();
    (bench.sql)(&format!(
        "INSERT INTO proxy_pause (is_only, paused_at) VALUES ({now_key}, {now})",
        now_key = bench.dialect.yes()
    ));
    for spot in SPOTS {
        assert!(ids(&claim(&*store, &probe(Class::Fresh, spot, 3))).is_empty());
    }
}

fn probes_take_no_more_bytes_than_asked_but_always_one_row(bench: &Bench) {
    let store = bench.open();
    let rows: Vec<_> = (0..6).map(|_| row(request(&[b'x'; 1000]))).collect();
    store.append(&rows).unwrap();
    for (spot, bytes_max, expected) in [
        (Spot::Front, 0, 1),
        (Spot::End, 2 * rows[0].request.bytes(), 2),
        (Spot::Anywhere, 1, 1),
        (Spot::Front, usize::MAX, 2),
    ] {
        let wanted = Probe {
            bytes_max,
            ..probe(Class::Fresh, spot, 3)
        };
        let count = claim(&*store, &wanted).rows.len();
        assert_eq!(count, expected, "{spot:?}");
    }
}

fn a_probe_that_cannot_be_read_is_buried(bench: &Bench) {
    let store = bench.open();
    append_one(&*store);
    (bench.sql)("UPDATE proxy_requests SET method = 'not a token'");
    let claim = claim(&*store, &probe(Class::Fresh, Spot::End, 3));
    assert_eq!((claim.rows.len(), claim.unreadable), (0, 1));
    assert_eq!(counts(&*store), (0, 0, 1));
}

fn without_rows_there_are_no_probes(bench: &Bench) {
    let store = bench.open();
    for spot in SPOTS {
        let claim = claim(&*store, &probe(Class::Retried, spot, 3));
        assert_eq!((claim.rows.len(), claim.held_back), (0, None));
        assert_eq!(claim.unreadable, 0);
    }
}
