//! How long a destination asks to be left alone. Pure.

use std::time::{Duration, SystemTime};

const SHORT_DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const LONG_DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// `Retry-After` in both forms of RFC 9110 §10.2.3: seconds, or a date. More seconds than 64 bits
/// hold are the longest time there is; `None`: it says nothing that can be understood.
pub(super) fn parse(value: &[u8], now: SystemTime) -> Option<Duration> {
    let value = std::str::from_utf8(value).ok()?.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // Nothing but digits: what does not fit is too large.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = date(value)?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// A date in any of the three forms of RFC 9110 §5.6.7. The weekday follows from the date, so
/// that a wrong one changes nothing.
fn date(value: &str) -> Option<SystemTime> {
    let strict = httpdate::parse_http_date(value).ok();
    strict.or_else(|| {
        let rest = value.trim_start_matches(|letter: char| letter.is_ascii_alphabetic());
        if rest.len() == value.len() {
            return None;
        }
        let days = SHORT_DAYS.iter().chain(&LONG_DAYS);
        days.map(|day| format!("{day}{rest}"))
            .find_map(|value| httpdate::parse_http_date(&value).ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Option<u64> {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        parse(text.as_bytes(), now).map(|pause| pause.as_secs())
    }

    #[test]
    fn seconds_beyond_64_bits_ask_for_the_longest_pause() {
        for (text, seconds) in [
            ("120", 120),
            (" 0 ", 0),
            ("000120", 120),
            ("18446744073709551615", u64::MAX),
            ("18446744073709551616", u64::MAX),
            ("99999999999999999999", u64::MAX),
        ] {
            assert_eq!(parsed(text), Some(seconds), "{text}");
        }
        assert_eq!(parsed(&"9".repeat(5000)), Some(u64::MAX));
    }

    #[test]
    fn a_date_is_meant_whatever_weekday_it_names() {
        for text in [
            "Sun, 06 Nov 1994 08:50:37 GMT",
            "Mon, 06 Nov 1994 08:50:37 GMT",
            "Son, 06 Nov 1994 08:50:37 GMT",
            "Sunday, 06-Nov-94 08:50:37 GMT",
            "Wednesday, 06-Nov-94 08:50:37 GMT",
            "Sun Nov  6 08:50:37 1994",
            "Fri Nov  6 08:50:37 1994",
        ] {
            assert_eq!(parsed(text), Some(60), "{text}");
        }
        assert_eq!(parsed("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(parsed("Tue, 06 Nov 1994 08:00:00 GMT"), Some(0));
    }

    #[test]
    fn what_is_neither_is_no_wish() {
        for text in [
            "",
            "-1",
            "+1",
            "soon",
            "1.5",
            "1 2",
            "\u{661}",
            "06 Nov 1994 08:50:37 GMT",
            ", 06 Nov 1994 08:50:37 GMT",
            "Sun, 31 Feb 1994 08:50:37 GMT",
            "Sun, 06 Nov 1994 25:50:37 GMT",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
        assert_eq!(parse(b"\xff", SystemTime::UNIX_EPOCH), None);
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(value in prop::collection::vec(any::<u8>(), 0..64)) {
            parse(&value, SystemTime::now());
        }

        #[test]
        fn no_date_makes_it_panic(
            value in "[A-Z][a-z]{2,8}[ ,]{1,2}[0-9]{1,2}[ -][A-Z][a-z]{2}[ -][0-9]{2,4} [0-9:]{5,8}( GMT| [0-9]{4})?"
        ) {
            parse(value.as_bytes(), SystemTime::now());
        }
    }
}
