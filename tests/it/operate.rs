//! What an operator does to a queue: the documentation of `Operate`, clause by clause.

use std::time::Duration;

use asyncproxy::queue::operate::{
    Action, BURIED, Counts, Filter, LastStatus, Operate, Position, Row, State,
};
use asyncproxy::queue::{Class, Decision, Fate, NewRow, Settlement};
use asyncproxy::settle::{Failure, Verdict};
use uuid::Uuid;

use crate::contract::{Bench, Dialect, LEASE, append_one, claim, request, row};

macro_rules! operate {
    ($($test:ident),+ $(,)?) => {
        operate!(@on sqlite, Bench::sqlite(true), $($test),+);
        operate!(@on postgres, Bench::postgres(true, false), $($test),+);
        operate!(@on pgbouncer, Bench::postgres(true, true), $($test),+);
    };
    (@on $kind:ident, $bench:expr, $($test:ident),+) => {
        mod $kind {
            use super::Bench;
            $(#[test]
            fn $test() {
                super::$test(&$bench);
            })+
        }
    };
}

operate!(
    rows_are_listed_as_they_are_in_pages,
    filters_let_through_what_they_name,
    a_retry_makes_waiting_rows_due,
    a_dead_letter_goes_back_and_begins_anew,
    what_cannot_be_read_stays_a_dead_letter,
    dropped_rows_are_gone,
    buried_rows_say_who_did_it,
    rows_that_are_being_sent_are_left_alone,
    nothing_is_claimed_while_paused,
    a_value_that_is_none_hides_no_row,
);

fn failed(status: Option<u16>) -> Failure {
    Failure {
        status,
        error: "because".into(),
    }
}

/// A row that waits for an hour, after an attempt that ended so.
fn waiting(target: &str, failure: Option<Failure>) -> NewRow {
    let mut request = request(b"waiting");
    request.target = target.into();
    NewRow {
        attempt: u32::from(failure.is_some()),
        fate: Fate::Due {
            after: Duration::from_secs(3600),
            failure,
        },
        ..row(request)
    }
}

fn dead(target: &str, failure: Failure) -> NewRow {
    NewRow {
        attempt: 3,
        fate: Fate::Dead(failure),
        ..waiting(target, None)
    }
}

fn append(store: &dyn Operate, row: NewRow) -> Uuid {
    let id = row.request.id;
    store.append(&[row]).unwrap();
    id
}

fn all(store: &dyn Operate) -> Vec<Row> {
    store.list(&Filter::default(), None, 500).unwrap()
}

fn ids(rows: &[Row]) -> Vec<Uuid> {
    rows.iter().map(|row| row.id).collect()
}

fn live(id: Uuid) -> Position {
    Position { is_dead: false, id }
}

fn buried(id: Uuid) -> Position {
    Position { is_dead: true, id }
}

fn rows_are_listed_as_they_are_in_pages(bench: &Bench) {
    let store = &*bench.operate();
    let first = append(store, waiting("/a", Some(failed(Some(503)))));
    let second = append_one(store);
    let third = append(store, dead("/c", failed(None)));
    assert_eq!(claim(store, 1).len(), 1);
    let rows = all(store);
    assert_eq!(ids(&rows), [first, second, third]);
    let states: Vec<State> = rows.iter().map(|row| row.state).collect();
    assert_eq!(states, [State::Waiting, State::Leased, State::Dead]);
    let (a, c) = (&rows[0], &rows[2]);
    assert_eq!(a.method.as_deref(), Some("POST"));
    assert_eq!(a.target.as_deref(), Some("/a"));
    assert_eq!(a.attempt, Some(1));
    assert_eq!(a.last_status, Some(503));
    assert_eq!(a.last_error.as_deref(), Some("because"));
    assert_eq!(
        a.headers.as_deref(),
        Some(&b"Content-Type: text/plain\r\n"[..])
    );
    assert_eq!(a.body_bytes, 7);
    assert!(a.received_at.is_some() && a.at > a.received_at.unwrap());
    assert_eq!((c.attempt, c.last_status), (Some(3), None));
    for row in &rows {
        assert_eq!(store.find(row.id).unwrap().as_ref(), Some(row));
        let body = store.body(row.position()).unwrap().unwrap();
        assert_eq!(body.len() as u64, row.body_bytes);
    }
    let mut paged = Vec::new();
    while let [row] = store
        .list(&Filter::default(), paged.last().map(Row::position), 1)
        .unwrap()
        .as_slice()
    {
        paged.push(row.clone());
    }
    assert_eq!(paged, rows);
    let nobody = Uuid::now_v7();
    assert_eq!(store.find(nobody).unwrap(), None);
    assert_eq!(store.body(live(nobody)).unwrap(), None);
    assert_eq!(store.body(buried(first)).unwrap(), None);
}

fn filters_let_through_what_they_name(bench: &Bench) {
    let store = &*bench.operate();
    let a = append(store, waiting("/a%_", Some(failed(Some(503)))));
    let b = append(store, waiting("/b", Some(failed(None))));
    let c = append(store, waiting("/a", None));
    let d = append(store, dead("/a%", failed(Some(410))));
    let e = append(store, dead("/A", failed(None)));
    let old = if bench.dialect == crate::contract::Dialect::Sqlite {
        "received_at - 7200000"
    } else {
        "received_at - interval '2 hours'"
    };
    let sql = format!(
        "UPDATE proxy_requests SET received_at = {old} WHERE id = {}",
        bench.dialect.id(b)
    );
    (bench.sql)(&sql);
    let filter = Filter::default;
    let hour = Some(Duration::from_secs(3600));
    let path = |path: &str| Some(path.to_owned());
    for (filter, expected) in [
        (filter(), vec![a, b, c, d, e]),
        (
            Filter {
                state: Some(State::Waiting),
                ..filter()
            },
            vec![a, b, c],
        ),
        (
            Filter {
                state: Some(State::Leased),
                ..filter()
            },
            vec![],
        ),
        (
            Filter {
                state: Some(State::Dead),
                ..filter()
            },
            vec![d, e],
        ),
        (
            Filter {
                older_than: hour,
                ..filter()
            },
            vec![b],
        ),
        (
            Filter {
                newer_than: hour,
                ..filter()
            },
            vec![a, c, d, e],
        ),
        // Literally, whatever `%` and `_` mean elsewhere; with case.
        (
            Filter {
                path: path("/a"),
                ..filter()
            },
            vec![a, c, d],
        ),
        (
            Filter {
                path: path("/a%"),
                ..filter()
            },
            vec![a, d],
        ),
        (
            Filter {
                path: path("/a_"),
                ..filter()
            },
            vec![],
        ),
        (
            Filter {
                status: Some(LastStatus::Answered(503)),
                ..filter()
            },
            vec![a],
        ),
        (
            Filter {
                status: Some(LastStatus::Answered(410)),
                ..filter()
            },
            vec![d],
        ),
        (
            Filter {
                status: Some(LastStatus::NoAnswer),
                ..filter()
            },
            vec![b, e],
        ),
        (
            Filter {
                state: Some(State::Waiting),
                path: path("/a"),
                ..filter()
            },
            vec![a, c],
        ),
    ] {
        assert_eq!(
            ids(&store.list(&filter, None, 500).unwrap()),
            expected,
            "{filter:?}"
        );
        let counts = store.count(&filter).unwrap();
        assert_eq!(counts.leased, 0);
        assert_eq!(
            counts.waiting + counts.dead,
            expected.len() as u64,
            "{filter:?}"
        );
    }
}

fn a_retry_makes_waiting_rows_due(bench: &Bench) {
    let store = &*bench.operate();
    let id = append(store, waiting("/a", Some(failed(Some(503)))));
    assert!(claim(store, 1).is_empty());
    assert_eq!(store.apply(Action::Retry, &[live(id)]), Ok(1));
    let claimed = claim(store, 1);
    // The attempts made so far count.
    assert_eq!((claimed[0].request.id, claimed[0].attempt), (id, 2));
}

fn a_dead_letter_goes_back_and_begins_anew(bench: &Bench) {
    let store = &*bench.operate();
    let new = dead("/a", failed(Some(410)));
    let request = (*new.request).clone();
    let id = append(store, new);
    let before = store.find(id).unwrap().unwrap();
    assert_eq!(store.apply(Action::Retry, &[buried(id)]), Ok(1));
    let after = store.find(id).unwrap().unwrap();
    assert_eq!(after.state, State::Waiting);
    assert_eq!(after.attempt, Some(0));
    assert_eq!(after.received_at, before.received_at);
    assert_eq!(after.last_error, before.last_error);
    // Once more changes nothing.
    assert_eq!(store.apply(Action::Retry, &[buried(id)]), Ok(0));
    let claimed = claim(store, 10);
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].attempt, 1);
    assert_eq!(claimed[0].request.body, request.body);
    assert_eq!(claimed[0].request.target, request.target);
}

fn what_cannot_be_read_stays_a_dead_letter(bench: &Bench) {
    let store = &*bench.operate();
    let id = append(store, dead("/a", failed(None)));
    (bench.sql)("UPDATE proxy_dead_letters SET method = NULL");
    assert_eq!(store.apply(Action::Retry, &[buried(id)]), Ok(0));
    let row = store.find(id).unwrap().unwrap();
    assert_eq!((row.state, row.method), (State::Dead, None));
}

fn dropped_rows_are_gone(bench: &Bench) {
    let store = &*bench.operate();
    let kept = append_one(store);
    let rows = [
        live(append(store, waiting("/a", None))),
        buried(append(store, dead("/b", failed(None)))),
        live(Uuid::now_v7()),
    ];
    assert_eq!(store.apply(Action::Drop, &rows), Ok(2));
    assert_eq!(store.apply(Action::Drop, &rows), Ok(0));
    assert_eq!(store.apply(Action::Drop, &[]), Ok(0));
    assert_eq!(ids(&all(store)), [kept]);
}

fn buried_rows_say_who_did_it(bench: &Bench) {
    let store = &*bench.operate();
    let id = append(store, waiting("/a", Some(failed(Some(503)))));
    assert_eq!(store.apply(Action::Bury, &[live(id)]), Ok(1));
    let row = store.find(id).unwrap().unwrap();
    assert_eq!((row.state, row.attempt), (State::Dead, Some(1)));
    assert_eq!(row.last_error.as_deref(), Some(BURIED));
    assert_eq!(row.last_status, Some(503));
    // What is dead stays as it is.
    assert_eq!(store.apply(Action::Bury, &[buried(id), live(id)]), Ok(0));
    assert_eq!(
        store.count(&Filter::default()),
        Ok(Counts {
            dead: 1,
            ..Counts::default()
        })
    );
}

fn rows_that_are_being_sent_are_left_alone(bench: &Bench) {
    let store = &*bench.operate();
    let id = append_one(store);
    assert_eq!(claim(store, 1).len(), 1);
    for action in [Action::Retry, Action::Drop, Action::Bury] {
        assert_eq!(store.apply(action, &[live(id)]), Ok(0), "{action:?}");
    }
    let settled = store.settle(&[Settlement {
        id,
        attempt: 1,
        decision: Decision::Attempted(Verdict::Delivered),
    }]);
    assert_eq!(settled.unwrap().delivered, 1);
}

fn nothing_is_claimed_while_paused(bench: &Bench) {
    let (store, other) = (&*bench.operate(), &*bench.operate());
    let id = append_one(store);
    assert!(!store.sample().unwrap().is_paused);
    assert_eq!(store.is_paused(), Ok(false));
    assert_eq!(store.set_paused(true), Ok(true));
    assert_eq!(store.set_paused(true), Ok(false));
    assert!(other.sample().unwrap().is_paused);
    assert_eq!(other.is_paused(), Ok(true));
    for class in [Class::Fresh, Class::Retried] {
        let claim = other.claim(class, 10, usize::MAX, LEASE).unwrap();
        assert!(claim.rows.is_empty() && claim.held_back.is_none());
    }
    // All else goes on.
    append_one(store);
    assert_eq!(store.apply(Action::Retry, &[live(id)]), Ok(1));
    assert_eq!(store.set_paused(false), Ok(true));
    assert_eq!(store.set_paused(false), Ok(false));
    assert_eq!(claim(other, 10).len(), 2);
}

fn a_value_that_is_none_hides_no_row(bench: &Bench) {
    let store = bench.operate();
    let good = append_one(&*store);
    let failed = NewRow {
        attempt: 1,
        fate: Fate::Dead(failed(Some(500))),
        ..row(request(b"dead"))
    };
    let dead = failed.request.id;
    store.append(&[failed]).unwrap();
    match bench.dialect {
        Dialect::Sqlite => (bench.sql)(
            "UPDATE proxy_requests SET last_status = 1 << 40, last_error = CAST(x'ff41' AS TEXT),
                    target = CAST(x'ff' AS TEXT), attempt = 1 << 40, received_at = -1 << 62;
             UPDATE proxy_dead_letters SET last_status = 1 << 40, attempt = -1, died_at = 1 << 62;
             INSERT INTO proxy_dead_letters (id, died_at, last_error) VALUES (x'01', 1, 'x'), (NULL, 1, 'y')",
        ),
        Dialect::Postgres => (bench.sql)(
            "UPDATE proxy_requests SET last_status = 2147483647;
             UPDATE proxy_dead_letters SET last_status = -1, attempt = -1, died_at = 'infinity'",
        ),
    }
    let rows = store.list(&Filter::default(), None, 10).unwrap();
    let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
    assert_eq!(ids, [good, dead]);
    assert_eq!(store.find(good).unwrap().as_ref(), Some(&rows[0]));
    if bench.dialect == Dialect::Sqlite {
        assert_eq!((rows[0].last_status, rows[1].last_status), (None, None));
        assert_eq!((rows[0].attempt, rows[1].attempt), (None, None));
        assert_eq!(rows[0].last_error.as_deref(), Some("\u{fffd}A"));
        assert_eq!(rows[0].target, None);
    }
    let after = rows.last().map(Row::position);
    assert_eq!(store.list(&Filter::default(), after, 10).unwrap(), []);
}
