//! Spans of time as people write them: `10s`, `500ms`, `2m`.

use std::time::Duration;

/// Why a span does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is no span of time: write a whole number and a unit (ms, s or m), as in 10s")]
pub struct SpanError {
    given: String,
}

/// Longest span there may be: whoever means longer means for ever.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// Parses a span. A number alone is seconds.
pub fn parse_span(given: &str) -> Result<Duration, SpanError> {
    let error = || SpanError { given: given.to_owned() };
    let text = given.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let ms = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        _ => return Err(error()),
    };
    let whole = number.parse::<u64>().ok().and_then(|n| n.checked_mul(ms)).map(Duration::from_millis);
    whole.filter(|span| *span <= LONGEST).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_parse_with_and_without_units() {
        for (text, ms) in [("10s", 10_000), ("500ms", 500), ("2 m", 120_000), ("3", 3000), ("0", 0)] {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn what_is_no_span_is_named() {
        for text in ["", "s", "-1s", "1.5s", "10 years", "99999999999999999999s", "400000000s"] {
            assert!(parse_span(text).unwrap_err().to_string().contains(&format!("'{text}'")), "{text}");
        }
    }
}
