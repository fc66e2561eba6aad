//! Rows a second, and how they compare with the bare loops: the table at the end.

use std::fmt;
use std::time::Duration;

use crate::What;
use crate::queue::Kind;

pub const SAMPLES: usize = 10;

/// Whether everything is only to be run once, as criterion decides it.
pub fn is_test() -> bool {
    let has = |wanted| std::env::args().any(|argument| argument == wanted);
    !has("--bench") || has("--test")
}

type Name = (Kind, What, &'static str);

/// By what was measured, in the order of the first measurement; the rates of warming up, too.
#[derive(Debug, Default)]
pub struct Figures(Vec<(Name, Vec<f64>)>);

impl Figures {
    pub fn add(&mut self, kind: Kind, what: What, body: &'static str, rows: u64, took: Duration) {
        let (name, rate) = ((kind, what, body), rows as f64 / took.as_secs_f64());
        match self.0.iter_mut().find(|(other, _)| *other == name) {
            Some((_, rates)) => rates.push(rate),
            None => self.0.push((name, vec![rate])),
        }
    }

    /// The median, if it was measured.
    fn rate(&self, name: Name) -> Option<f64> {
        let (_, rates) = self.0.iter().find(|(other, _)| *other == name)?;
        // Warming up comes first.
        let mut rates = rates[rates.len().saturating_sub(SAMPLES)..].to_vec();
        rates.sort_by(f64::total_cmp);
        Some(f64::midpoint(
            rates[(rates.len() - 1) / 2],
            rates[rates.len() / 2],
        ))
    }

    fn ratio(&self, (kind, what, body): Name) -> Option<f64> {
        let bare = self.rate((kind, what.bare()?, body))?;
        Some(self.rate((kind, what, body))? / bare)
    }

    fn bodies(&self) -> Vec<&'static str> {
        let mut bodies: Vec<_> = self.0.iter().map(|((_, _, body), _)| *body).collect();
        bodies.sort_unstable();
        bodies.dedup();
        bodies
    }
}

impl What {
    /// The loop that it is compared with.
    fn bare(self) -> Option<What> {
        match self {
            What::Append(crate::APPEND_ROWS) => Some(What::BareAppend),
            What::ClaimSettle => Some(What::BareClaimSettle),
            _ => None,
        }
    }
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
        let mut seen: Vec<(Kind, What)> = Vec::new();
        let bodies = self.bodies();
        for ((kind, what, _), _) in &self.0 {
            if seen.contains(&(*kind, *what)) {
                continue;
            }
            if seen.is_empty() {
                write!(f, "\n{:<9} {:<26}", "store", "rows/s (ours / bare)")?;
                bodies
                    .iter()
                    .try_for_each(|body| write!(f, "{body:>10} {:>8}", ""))?;
                writeln!(f)?;
            }
            seen.push((*kind, *what));
            write!(f, "{:<9} {what:<26}", kind.to_string())?;
            for body in &bodies {
                let name = (*kind, *what, *body);
                let rate = self.rate(name).map_or("-".into(), grouped);
                let ratio = self.ratio(name).map(|ratio| format!("({ratio:.2})"));
                write!(f, "{rate:>10} {:>8}", ratio.unwrap_or_default())?;
            }
            writeln!(f)?;
        }
        Ok(())
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
