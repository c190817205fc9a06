//! Sizes as people write them: `64GiB`, `500MB`, `4096`.

use std::fmt;

/// Why a size does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is no size: write a number and a unit, as in 64GiB, 1.5TiB or 500MB")]
pub struct SizeError {
    given: String,
}

const UNITS: [(&str, u64); 13] = [
    ("B", 1),
    ("K", 1 << 10),
    ("KIB", 1 << 10),
    ("KB", 1000),
    ("M", 1 << 20),
    ("MIB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GIB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TIB", 1 << 40),
    ("TB", 1_000_000_000_000),
];

/// Parses a size into bytes. A number alone is bytes; `K`, `M`, `G`, `T` alone are powers of 1024.
pub fn parse_size(given: &str) -> Result<u64, SizeError> {
    let error = || SizeError { given: given.to_owned() };
    let text = given.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_uppercase();
    let scale = match unit.as_str() {
        "" => 1,
        unit => UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?.1,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(error);
    }
    let bytes = number.parse::<f64>().map_err(|_| error())? * scale as f64;
    if bytes.is_finite() && bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(error()) }
}

/// Bytes as a person reads them: the largest binary unit that leaves at least 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match named.into_iter().find(|(_, shift)| self.0 >> shift > 0) {
            None => write!(f, "{} B", self.0),
            Some((unit, shift)) if self.0.is_multiple_of(1 << shift) => write!(f, "{} {unit}", self.0 >> shift),
            Some((unit, shift)) => write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_written() {
        for (text, bytes) in [
            ("64GiB", 64 << 30),
            ("500MB", 500_000_000),
            ("4096", 4096),
            (" 2 mib ", 2 << 20),
            ("1.5G", 3 << 29),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn rubbish_is_named() {
        for text in ["", "GiB", "-1G", "4 parsecs", "1..2G", "99999999999TiB", "nan", "1e3"] {
            assert!(parse_size(text).unwrap_err().to_string().contains(&format!("'{text}'")), "{text}");
        }
    }

    #[test]
    fn bytes_read_well() {
        assert_eq!(Bytes(64 << 30).to_string(), "64 GiB");
        assert_eq!(Bytes((1 << 30) + (1 << 29)).to_string(), "1.5 GiB");
        assert_eq!(Bytes(12).to_string(), "12 B");
    }
}
