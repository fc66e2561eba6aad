//! The forms a setting's value can have. Each parser's error completes the sentence "must be …".

use std::time::Duration;

use log::LevelFilter;

/// Longest duration: beyond any use, and short enough that no sum of times overflows.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A duration as Go's `time.ParseDuration` reads it (`30s`, `1m30s`, `1.5h`), or in days of 24
/// hours (`30d`); a bare number is seconds.
///
/// # Errors
/// What it must be.
pub fn duration(text: &str) -> Result<Duration, String> {
    const ACCEPTED: &str = "a duration such as 500ms, 30s, 1m30s, 1h or 30d, of at most 10 years";
    let parsed = match text.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => sum_of_parts(text),
    };
    parsed
        .filter(|duration| *duration <= DURATION_MAX)
        .ok_or_else(|| ACCEPTED.to_owned())
}

fn sum_of_parts(mut text: &str) -> Option<Duration> {
    let mut sum = None;
    while !text.is_empty() {
        let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, rest) = text.split_at(number_end);
        let unit_end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(unit_end);
        let nanoseconds = match unit {
            "ns" => 1e0,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            "d" => 24.0 * 3600e9,
            _ => return None,
        };
        let seconds = number.parse::<f64>().ok()? * nanoseconds / 1e9;
        let part = Duration::try_from_secs_f64(seconds).ok()?;
        sum = Some(sum.unwrap_or(Duration::ZERO).checked_add(part)?);
        text = rest;
    }
    sum
}

/// As [`duration`], but at least a millisecond.
///
/// # Errors
/// What it must be.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    // Below a millisecond, a timeout of the system's may be rounded to none at all.
    duration(text)
        .ok()
        .filter(|duration| *duration >= Duration::from_millis(1))
        .ok_or_else(|| {
            "a duration such as 500ms, 30s, 1m30s, 1h or 30d, from 1ms to 10 years".to_owned()
        })
}

/// A size in bytes: `512KiB`, `10MiB`, `10MB`, or a bare number of bytes.
///
/// # Errors
/// What it must be.
pub(super) fn size(text: &str) -> Result<usize, String> {
    let number_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let factor: usize = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1000 * 1000,
        "gb" => 1000 * 1000 * 1000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => 0,
    };
    number
        .parse::<usize>()
        .ok()
        .filter(|_| factor > 0)
        .and_then(|number| number.checked_mul(factor))
        // So that sums of sizes never overflow.
        .filter(|size| *size <= usize::MAX / 4)
        .ok_or_else(|| "a size such as 512KiB, 10MiB or 1GiB".to_owned())
}

/// What `server.memory_limit: auto` may come to. Less would be below `server.max_body_size` as it is
/// shipped, and more is for those who know that they need it.
const AUTO_LIMIT_MIN: usize = 16 << 20;
const AUTO_LIMIT_MAX: usize = 256 << 20;

/// A size, or `auto`: a quarter of the memory that is there, in whole MiB.
///
/// # Errors
/// What it must be.
pub(super) fn memory_limit(
    text: &str,
    there: impl FnOnce() -> Option<u64>,
) -> Result<usize, String> {
    if text != "auto" {
        return size(text).map_err(|size| format!("auto, or {size}"));
    }
    let quarter = there().and_then(|bytes| usize::try_from(bytes / 4).ok());
    let quarter = quarter.unwrap_or(AUTO_LIMIT_MAX) >> 20 << 20;
    Ok(quarter.clamp(AUTO_LIMIT_MIN, AUTO_LIMIT_MAX))
}

/// The size of a body. Stores take no value of a gigabyte.
///
/// # Errors
/// What it must be.
pub(super) fn body_size(text: &str) -> Result<usize, String> {
    size(text)
        .ok()
        .filter(|size| (1..=512 << 20).contains(size))
        .ok_or_else(|| "a size such as 512KiB or 10MiB, from 1B to 512MiB".to_owned())
}

/// A boolean as Go's `strconv.ParseBool` reads it.
///
/// # Errors
/// What it must be.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("true or false".into()),
    }
}

/// A whole number from `min` to `max`.
///
/// # Errors
/// What it must be.
pub(super) fn integer<T>(text: &str, min: T, max: T) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    text.parse()
        .ok()
        .filter(|number| (&min..=&max).contains(&number))
        .ok_or_else(|| format!("a whole number from {min} to {max}"))
}

/// Statuses, separated by commas, in brackets or not: as YAML has them, and `--check-config` shows them.
///
/// # Errors
/// What they must be.
pub(super) fn failed_statuses(text: &str) -> Result<Vec<u16>, String> {
    let accepted = "a list of statuses such as 410, 404 or [410, 404]: from 100 to 599, without those of a delivery (2xx)";
    without_brackets(text)
        .split(',')
        .map(str::trim)
        .filter(|status| !status.is_empty())
        .map(|status| {
            integer(status, 100, 599)
                .ok()
                .filter(|status| !(200..300).contains(status))
                .ok_or_else(|| accepted.to_owned())
        })
        .collect()
}

/// What a list holds that may be in brackets.
pub(super) fn without_brackets(text: &str) -> &str {
    let text = text.trim();
    let inner = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    inner.unwrap_or(text)
}

/// A log level.
///
/// # Errors
/// What it must be.
pub(super) fn level(text: &str) -> Result<LevelFilter, String> {
    text.parse()
        .ok()
        .filter(|level| *level != LevelFilter::Off)
        .ok_or_else(|| "error, warn, info, debug or trace".into())
}

/// The path of a URL, for the control port.
///
/// # Errors
/// What it must be.
pub(super) fn metrics_path(text: &str) -> Result<String, String> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.starts_with('/')
        && is_plain
        && !text.contains(['?', '#'])
        && !matches!(text, "/healthz" | "/readyz" | "/status")
    {
        Ok(text.to_owned())
    } else {
        Err("a path such as /metrics, other than /healthz, /readyz and /status".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_does_and_in_days() {
        for (text, milliseconds) in [
            ("0", 0),
            ("30", 30_000),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("500ms", 500),
            (".5s", 500),
            ("1s500ms", 1500),
            ("30d", 30 * 86_400_000),
            ("1.5d", 36 * 3_600_000),
            ("1d12h", 36 * 3_600_000),
            ("3650d", 3650 * 86_400_000),
            ("2000us", 2),
            ("2000\u{b5}s", 2),
        ] {
            assert_eq!(
                duration(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for text in [
            "",
            "s",
            "-1s",
            "1 s",
            "1x",
            "1s1",
            "1..5s",
            "1e3s",
            "100000h",
            "3651d",
            "d",
            "1D",
            "-1d",
            "1day",
            "99999999999999999999",
            "\u{663}s",
            "s1",
            "NaNs",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(positive_duration("0s").is_err());
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1B", 1),
            ("10MiB", 10 << 20),
            ("10mib", 10 << 20),
            ("10 MB", 10_000_000),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "MiB",
            "-1",
            "1.5MiB",
            "1TiB",
            "99999999999999999999",
            "18446744073709551615GiB",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_automatic_limit_is_a_quarter_within_bounds() {
        let auto = |there| memory_limit("auto", || there);
        for (there, limit) in [
            (0, 16 << 20),
            (64 << 20, 16 << 20),
            ((512 << 20) + 12_345, 128 << 20),
            (1 << 30, 256 << 20),
            (u64::MAX, 256 << 20),
        ] {
            assert_eq!(auto(Some(there)), Ok(limit), "{there}");
        }
        assert_eq!(auto(None), Ok(256 << 20));
        assert_eq!(memory_limit("1MiB", || unreachable!()), Ok(1 << 20));
        for text in ["Auto", "automatic", "", "25%"] {
            let error = memory_limit(text, || None).unwrap_err();
            assert!(error.starts_with("auto, or a size"), "{error}");
        }
    }

    #[test]
    fn other_forms() {
        assert_eq!(boolean("T"), Ok(true));
        assert!(boolean("yes").is_err());
        assert_eq!(integer("7", 1, 10), Ok(7));
        for text in ["0", "11", "-1", "1.0", "", "x"] {
            assert!(integer(text, 1, 10).is_err(), "{text}");
        }
        assert_eq!(failed_statuses("410, 404"), Ok(vec![410, 404]));
        for (text, statuses) in [
            ("", vec![]),
            ("[]", vec![]),
            ("410", vec![410]),
            ("[410]", vec![410]),
            ("410,404", vec![410, 404]),
            (" [ 410, 404 ] ", vec![410, 404]),
        ] {
            assert_eq!(failed_statuses(text), Ok(statuses), "{text}");
        }
        for text in [
            "200", "99", "600", "x", "410;404", "[410", "410]", "[[410]]", "[200]",
        ] {
            assert!(failed_statuses(text).is_err(), "{text}");
        }
        assert_eq!(level("WARN"), Ok(LevelFilter::Warn));
        assert!(level("off").is_err());
        assert!(metrics_path("/m").is_ok());
        for text in ["", "metrics", "/a b", "/a?b", "/healthz", "/status", "/\n"] {
            assert!(metrics_path(text).is_err(), "{text:?}");
        }
    }
}
