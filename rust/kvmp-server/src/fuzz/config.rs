//! Any text as a server's TOML file.

use crate::{ConfigSource, ServerConfig};

/// What came of it, for the tests: settings, or the refusal.
pub fn config(data: &[u8]) -> Result<ServerConfig, String> {
    let text = std::str::from_utf8(data).map_err(|e| e.to_string())?;
    let source: ConfigSource = toml::from_str(text).map_err(|e| e.to_string())?;
    let config = source.resolve().map_err(|e| e.to_string())?;
    check(&config);
    Ok(config)
}

/// Whatever was accepted is within what the settings' documentation says.
fn check(config: &ServerConfig) {
    assert!(config.size > 0);
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    assert!(!config.name.starts_with('.') && (1..=64).contains(&config.name.len()) && config.name.chars().all(fine));
    assert!(config.tcp.is_none_or(|address| address.ip().is_loopback()));
    if let Ok(geometry) = kvmp_core::geometry::Geometry::new(config.size, config.chunk) {
        assert!(geometry.arena_bytes() <= config.size && geometry.chunks > 0);
    }
}
