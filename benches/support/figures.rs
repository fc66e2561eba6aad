//! Rows a second, and how they compare with the bare loops: the table at the end.

use std::fmt;
use std::time::Duration;

use crate::What;
use crate::queue::Kind;

pub const SAMPLES: usize = 10;

type Name = (Kind, What, &'static str);

/// By what was measured, in the order of the first measurement. Warming up is in it, too.
#[derive(Debug, Default)]
pub struct Figures {
    rates: Vec<(Name, Vec<f64>)>,
    /// Ours by the bare loop, by the latter.
    ratios: Vec<(Name, Vec<f64>)>,
    sync_ms: Vec<f64>,
}

impl Figures {
    pub fn add(&mut self, name: Name, rows: u64, took: Duration) {
        push(&mut self.rates, name, rows as f64 / took.as_secs_f64());
    }

    /// Takes the times that our code and a bare loop took for the same, one right after the other.
    pub fn compare(&mut self, bare: Name, ours: Duration, took: Duration) {
        let ratio = took.as_secs_f64() / ours.as_secs_f64();
        push(&mut self.ratios, bare, ratio);
    }

    pub fn add_sync(&mut self, took: Duration) {
        self.sync_ms.push(took.as_secs_f64() * 1000.0);
    }

    fn ratio(&self, (kind, what, body): Name) -> Option<f64> {
        let is_it = |(other, _): &&(Name, _)| {
            let (other_kind, bare, other_body) = *other;
            (other_kind, bare.ours(), other_body) == (kind, Some(what), body)
        };
        self.ratios.iter().find(is_it).map(|(_, it)| last(it))
    }

    fn bodies(&self) -> Vec<&'static str> {
        let mut bodies: Vec<_> = self.rates.iter().map(|((_, _, body), _)| *body).collect();
        bodies.sort_unstable();
        bodies.dedup();
        bodies
    }
}

fn push(all: &mut Vec<(Name, Vec<f64>)>, name: Name, figure: f64) {
    match all.iter_mut().find(|(other, _)| *other == name) {
        Some((_, figures)) => figures.push(figure),
        None => all.push((name, vec![figure])),
    }
}

/// The median of those after warming up.
fn last(figures: &[f64]) -> f64 {
    quantile(&figures[figures.len().saturating_sub(SAMPLES)..], 0.5)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index"
)]
fn quantile(figures: &[f64], share: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let text = match self {
            What::Append(_) => format!("append by {rows}"),
            What::Senders(1) => "append, 1 sender".into(),
            What::Senders(senders) => format!("append, {senders} senders"),
            What::Claim(_) => format!("claim by {rows}"),
            What::Settle(_) => format!("settle by {rows}"),
            What::ClaimSettle => format!("claim + settle by {rows}"),
            What::BareAppend => format!("bare append by {rows}"),
            What::BareClaimSettle => format!("bare claim + delete by {rows}"),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rates.is_empty() {
            return Ok(());
        }
        let bodies = self.bodies();
        write!(f, "\nrows/s, and (ours / bare){:11}", "")?;
        for body in &bodies {
            write!(f, "{body:>10} {:7}", "")?;
        }
        writeln!(f)?;
        let mut lines: Vec<(Kind, What)> = Vec::new();
        for ((kind, what, _), _) in &self.rates {
            if !lines.contains(&(*kind, *what)) {
                lines.push((*kind, *what));
            }
        }
        lines.sort_by_key(|(kind, _)| *kind);
        for (kind, what) in lines {
            write!(f, "{:<9} {what:<26}", kind.to_string())?;
            for body in &bodies {
                let name = (kind, what, *body);
                let rates = self.rates.iter().find(|(other, _)| *other == name);
                let rate = rates.map_or("-".into(), |(_, rates)| grouped(last(rates)));
                let ratio = self.ratio(name).map(|ratio| format!("({ratio:.2})"));
                write!(f, "{rate:>10} {:<7}", ratio.unwrap_or_default())?;
            }
            writeln!(f)?;
        }
        let [low, median, high] = [0.1, 0.5, 0.9].map(|share| quantile(&self.sync_ms, share));
        writeln!(
            f,
            "Between the measurements the disk took {median:.2} ms to sync 8 KB \
             (median; {low:.2} to {high:.2} without the fastest and the slowest tenth)."
        )
    }
}

/// With a comma every three digits.
fn grouped(rate: f64) -> String {
    let digits = format!("{rate:.0}");
    let mut text = String::new();
    for (number, digit) in digits.chars().enumerate() {
        if number > 0 && (digits.len() - number).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
