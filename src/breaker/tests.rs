use super::*;

const FAILURES: u32 = 3;
/// Different requests that have to fail with that.
const DIFFERENT: u128 = 60;

fn down() -> Outcome {
    Outcome::Unreachable("refused".into())
}

fn answered(status: u16, retry_after: Option<u64>) -> Outcome {
    Outcome::Answered {
        status,
        retry_after: retry_after.map(Duration::from_secs),
    }
}

fn hung() -> Outcome {
    Outcome::Unanswered("timeout".into())
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// Makes an attempt with the request of this number, which must be granted.
fn attempt_with(
    breaker: &mut Breaker,
    number: u128,
    outcome: &Outcome,
    now: Instant,
) -> Option<Change> {
    match breaker.permit(now) {
        Permit::Granted(era) => breaker.note(era, id(number), outcome, now),
        Permit::Denied(_) => panic!("denied"),
    }
}

/// The same with one and the same request.
fn attempt(breaker: &mut Breaker, outcome: &Outcome, now: Instant) -> Option<Change> {
    attempt_with(breaker, 0, outcome, now)
}

fn opened(now: Instant) -> Breaker {
    let mut breaker = Breaker::new(FAILURES);
    for _ in 0..2 {
        assert_eq!(attempt(&mut breaker, &down(), now), None);
    }
    assert_eq!(attempt(&mut breaker, &down(), now), Some(Change::Opened));
    breaker
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// As after so many different requests with this outcome.
fn opened_by_requests(outcome: &Outcome, now: Instant) -> Breaker {
    let mut breaker = Breaker::new(FAILURES);
    for number in 1..DIFFERENT {
        let change = attempt_with(&mut breaker, number, outcome, now);
        assert_eq!(change, None, "{number}");
    }
    let change = attempt_with(&mut breaker, DIFFERENT, outcome, now);
    assert_eq!(change, Some(Change::Opened));
    breaker
}

/// What each outcome does to the counts: whether it is a sign of life, and whether it counts.
#[test]
fn each_outcome_says_what_it_says() {
    let now = Instant::now();
    let unsendable = Outcome::Unsendable("too large".into());
    let table = [
        (answered(200, None), true),
        (answered(301, None), true),
        (answered(400, None), true),
        (answered(404, None), true),
        (answered(500, None), true),
        (answered(501, None), true),
        (answered(505, None), true),
        (answered(599, None), true),
        (answered(100, None), true),
        (answered(999, None), true),
        (answered(429, None), false),
        (answered(502, None), false),
        (answered(503, Some(1)), false),
        (answered(504, None), false),
        (hung(), false),
        (unsendable.clone(), false),
    ];
    for (outcome, is_sign_of_life) in table {
        let mut breaker = Breaker::new(2);
        attempt(&mut breaker, &down(), now);
        attempt(&mut breaker, &outcome, now);
        let change = attempt(&mut breaker, &down(), now);
        let opened = (!is_sign_of_life).then_some(Change::Opened);
        assert_eq!(change, opened, "{outcome:?}");
    }
    for outcome in [
        answered(429, None),
        answered(502, None),
        answered(503, None),
        answered(504, None),
        hung(),
    ] {
        opened_by_requests(&outcome, now);
    }
    for outcome in [answered(404, None), answered(500, None), unsendable] {
        let mut breaker = Breaker::new(FAILURES);
        for number in 0..10 * DIFFERENT {
            attempt_with(&mut breaker, number, &outcome, now);
        }
        assert_eq!(breaker.fault(), None, "{outcome:?}");
    }
}

#[test]
fn few_requests_never_open_it_however_often_they_are_not_answered() {
    let now = Instant::now();
    let mut breaker = Breaker::new(FAILURES);
    for attempt in 0..100 * DIFFERENT {
        let number = attempt % (DIFFERENT - 1);
        attempt_with(&mut breaker, number, &hung(), now);
    }
    assert_eq!(breaker.pace(now), Pace::Full);
}

#[test]
fn requests_that_are_not_answered_and_connections_that_fail_count_together() {
    let now = Instant::now();
    let mut breaker = Breaker::new(FAILURES);
    attempt_with(&mut breaker, 1, &down(), now);
    for number in 2..DIFFERENT {
        let change = attempt_with(&mut breaker, number, &hung(), now);
        assert_eq!(change, None, "{number}");
    }
    let change = attempt_with(&mut breaker, DIFFERENT, &down(), now);
    assert_eq!(change, Some(Change::Opened));
    assert_eq!(breaker.fault(), Some("refused"));
}

#[test]
fn what_is_remembered_is_bounded() {
    let limits = Limits::new(u32::MAX);
    assert_eq!(limits.different, 10_000);
    let mut evidence = Evidence::default();
    for number in 0..20_000 {
        evidence.note(id(number), &Sign::of(&hung()), limits);
        assert_eq!(evidence.is_down(limits), number >= 9_999);
    }
}

/// Errors alone only slow the queue down, and only when there is nothing else.
#[test]
fn nothing_but_errors_slow_it_until_the_first_that_is_none() {
    let now = Instant::now();
    let mut breaker = Breaker::new(FAILURES);
    for round in 0..3 {
        for number in 1..DIFFERENT {
            let outcome = if number % 2 == 0 {
                hung()
            } else {
                answered(500, None)
            };
            let change = attempt_with(&mut breaker, number, &outcome, now);
            assert_eq!((change, breaker.pace(now)), (None, Pace::Full), "{round}");
        }
        let change = attempt_with(&mut breaker, DIFFERENT, &answered(501, None), now);
        assert_eq!(change, Some(Change::Failing));
        assert_eq!(breaker.pace(now), Pace::Sample(0.25));
        assert!(!breaker.is_closed(now));
        assert_eq!((breaker.name(now), breaker.fault()), ("slowed", None));
        attempt_with(&mut breaker, DIFFERENT + 1, &answered(500, None), now);
        let change = attempt_with(&mut breaker, 1, &answered(400, None), now);
        assert_eq!(change, Some(Change::Working));
        assert_eq!(breaker.pace(now), Pace::Full);
        assert!(breaker.is_closed(now));
    }
}

#[test]
fn zero_never_opens_it() {
    let now = Instant::now();
    let mut breaker = Breaker::new(0);
    for _ in 0..1000 {
        assert_eq!(attempt(&mut breaker, &down(), now), None);
    }
    assert!(breaker.is_closed(now));
    assert_eq!(breaker.pace(now), Pace::Full);
}

#[test]
fn one_probe_at_a_time_with_pauses_that_grow() {
    let mut now = Instant::now();
    let mut breaker = opened(now);
    for pause in [1, 2, 4, 8, 16, 30, 30] {
        let probe_at = now + seconds(pause);
        assert_eq!(breaker.pace(now), Pace::Stopped(probe_at), "{pause}");
        assert!(matches!(breaker.permit(now), Permit::Denied(_)));
        now = probe_at;
        assert_eq!(breaker.pace(now), Pace::Probe(1));
        let Permit::Granted(era) = breaker.permit(now) else {
            panic!("no probe");
        };
        assert!(matches!(breaker.permit(now), Permit::Denied(_)));
        assert!(matches!(breaker.pace(now), Pace::Stopped(_)));
        assert_eq!(
            breaker.note(era, id(0), &down(), now),
            Some(Change::ProbeFailed)
        );
    }
}

#[test]
fn a_probe_that_hangs_is_not_waited_for_without_end() {
    let now = Instant::now();
    let mut breaker = opened(now);
    let later = now + seconds(1);
    let Permit::Granted(hanging) = breaker.permit(later) else {
        panic!("no probe");
    };
    let next = later + PROBE_PAUSE_MAX;
    assert_eq!(breaker.permit(later), Permit::Denied(next));
    assert_eq!(breaker.pace(next), Pace::Probe(1));
    let change = attempt(&mut breaker, &answered(200, None), next);
    assert_eq!(change, Some(Change::Recovered));
    assert_eq!(breaker.note(hanging, id(0), &down(), next), None);
}

#[test]
fn a_probe_waits_as_long_as_it_was_asked_to() {
    let now = Instant::now();
    let mut breaker = opened_by_requests(&answered(503, Some(10)), now);
    assert_eq!(breaker.pace(now), Pace::Stopped(now + seconds(10)));
    let later = now + seconds(10);
    for _ in 0..FAILURES {
        attempt(&mut breaker, &answered(429, Some(9999)), later);
    }
    assert_eq!(breaker.pace(later), Pace::Stopped(later + seconds(30)));
}

/// One in ten may be good, so a round has several.
#[test]
fn where_requests_may_be_at_fault_a_round_has_several_probes() {
    let now = Instant::now();
    let mut breaker = opened_by_requests(&hung(), now);
    let mut at = now + seconds(1);
    for pause in [2, 4, 8] {
        assert_eq!(breaker.pace(at), Pace::Probe(FAILURES));
        let permits: Vec<_> = (0..FAILURES).map(|_| breaker.permit(at)).collect();
        assert!(
            permits
                .iter()
                .all(|permit| matches!(permit, Permit::Granted(_)))
        );
        assert_eq!(breaker.permit(at), Permit::Denied(at + PROBE_PAUSE_MAX));
        let mut changes = Vec::new();
        for (number, permit) in permits.iter().enumerate() {
            if let Permit::Granted(era) = permit {
                changes.push(breaker.note(*era, id(number as u128), &hung(), at));
            }
        }
        assert_eq!(changes, [Some(Change::ProbeFailed), None, None]);
        let next = at + seconds(pause);
        assert_eq!(breaker.pace(at), Pace::Stopped(next));
        at = next;
    }
    // One that could not be sent at all leaves its place to another.
    let unsendable = Outcome::Unsendable("too large".into());
    for _ in 0..5 {
        attempt(&mut breaker, &unsendable, at);
    }
    assert_eq!(breaker.pace(at), Pace::Probe(FAILURES));
    // Without a connection one tells as much as many.
    attempt(&mut breaker, &down(), at);
    assert_eq!(breaker.pace(at), Pace::Stopped(at + seconds(16)));
    assert_eq!(breaker.pace(at + seconds(16)), Pace::Probe(1));
}

#[test]
fn an_error_shows_that_it_is_there_again() {
    let now = Instant::now();
    let mut breaker = opened(now);
    let change = attempt(&mut breaker, &answered(500, None), now + seconds(1));
    assert_eq!(change, Some(Change::Recovered));
}

#[test]
fn after_a_short_time_it_begins_with_half() {
    let now = Instant::now();
    let mut breaker = opened(now);
    let at = now + seconds(9);
    attempt(&mut breaker, &answered(200, None), at);
    assert_eq!(breaker.pace(at), Pace::Share(0.5));
    assert_eq!(breaker.name(at), "recovering");
    assert_eq!(breaker.pace(at + seconds(1)), Pace::Full);
    assert!(breaker.is_closed(at + seconds(1)));
}

#[test]
fn it_closes_slowly() {
    let now = Instant::now() + seconds(10);
    let mut breaker = opened(now - seconds(10));
    assert_eq!(
        attempt(&mut breaker, &answered(200, None), now),
        Some(Change::Recovered)
    );
    assert_eq!(breaker.fault(), None);
    for (second, share) in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (4, 16.0)] {
        let at = now + seconds(second);
        assert_eq!(breaker.pace(at), Pace::Share(share / 32.0));
        assert!(!breaker.is_closed(at));
    }
    let at = now + seconds(5);
    assert_eq!(breaker.pace(at), Pace::Full);
    assert!(breaker.is_closed(at));
    // As many failures as ever open it again.
    for _ in 0..2 {
        assert_eq!(attempt(&mut breaker, &down(), at), None);
    }
    let change = attempt(&mut breaker, &down(), at);
    assert_eq!(change, Some(Change::Opened));
}

#[test]
fn what_was_begun_before_says_nothing() {
    let now = Instant::now();
    let mut breaker = Breaker::new(2);
    let early: Vec<_> = (0..9).map(|_| breaker.permit(now)).collect();
    let note = |breaker: &mut Breaker, permit: Permit, outcome: &Outcome| match permit {
        Permit::Granted(era) => breaker.note(era, id(0), outcome, now),
        Permit::Denied(_) => panic!("denied"),
    };
    note(&mut breaker, early[0], &down());
    assert_eq!(note(&mut breaker, early[1], &down()), Some(Change::Opened));
    // One that succeeds now was sent when the destination still worked.
    assert_eq!(note(&mut breaker, early[2], &answered(200, None)), None);
    assert!(breaker.fault().is_some());
    let later = now + seconds(1);
    attempt(&mut breaker, &answered(200, None), later);
    for permit in &early[3..] {
        assert_eq!(note(&mut breaker, *permit, &down()), None);
    }
    assert_eq!(breaker.fault(), None);
}
