//! `kvmp stats`, `ping` and `clear`: ask a running server.

use std::path::PathBuf;

use kvmp_client::{Bound, Client, ClientError, ConnectOptions};
use kvmp_core::wire::Role;
use serde_json::Value;

use crate::config::{DEFAULT_NAME, checked_name, default_socket};
use crate::error::ServerError;
use crate::size::Bytes;

/// How long a server may take over an answer to a person, in milliseconds.
const PATIENCE_MS: u64 = 5000;

#[derive(clap::Args, Debug)]
pub(super) struct Where {
    /// Path of the server's unix socket [default: that of --name]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Name of the server
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
}

#[derive(clap::Args, Debug)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    place: Where,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn asked(error: ClientError) -> ServerError {
    ServerError::Asked(error.to_string())
}

fn connect(place: Where) -> Result<Client, ServerError> {
    let name = checked_name(place.name)?;
    let path = place.socket.unwrap_or_else(|| default_socket(&name));
    let path = std::path::absolute(&path)
        .map_err(|e| ServerError::Config { key: format!("--socket {}", path.display()), why: e.to_string() })?;
    let endpoint = format!("unix:{}", path.display());
    Client::connect(&endpoint, &ConnectOptions::new(Role::Tool), &Bound::ms(PATIENCE_MS)).map_err(asked)
}

pub(super) fn stats(args: StatsArgs) -> Result<(), ServerError> {
    let text = connect(args.place)?.stats(&Bound::ms(PATIENCE_MS)).map_err(asked)?;
    if args.json {
        say!("{text}");
        return Ok(());
    }
    let all: Value = serde_json::from_str(&text).map_err(|e| ServerError::Asked(format!("stats: {e}")))?;
    for (key, value) in all.as_object().into_iter().flatten() {
        say!("{key:<20} {}", shown(key, value));
    }
    Ok(())
}

fn shown(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) if key.ends_with("_bytes") => Bytes(n.as_u64().unwrap_or(0)).to_string(),
        other => other.to_string(),
    }
}

pub(super) fn ping(place: Where) -> Result<(), ServerError> {
    let client = connect(place)?;
    let took = client.ping(&Bound::ms(PATIENCE_MS)).map_err(asked)?;
    say!("{} (kvmp {}) answered in {} us", client.endpoint(), client.server_version(), took.as_micros());
    Ok(())
}

pub(super) fn clear(place: Where) -> Result<(), ServerError> {
    let count = connect(place)?.clear(&Bound::ms(PATIENCE_MS)).map_err(asked)?;
    say!("{count} blocks evicted; blocks in use are kept");
    Ok(())
}
