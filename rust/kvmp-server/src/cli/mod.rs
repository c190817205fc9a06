//! The command line, for the binary and for the wheel's console script.

/// As `println!`, but a reader that has gone (`kvmp stats | head -1`) is no reason to panic.
macro_rules! say {
    ($($what:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($what)*);
    }};
}
mod ask;
mod bus;
mod last;
mod log;
mod serve;
mod wheel;

use std::io::IsTerminal;

use clap::{Parser, Subcommand};

use crate::config::{ConfigSource, DEFAULT_ARENA_DIR, DEFAULT_NAME, checked_name};
use crate::segment;
use crate::size::Bytes;

/// Keeps LLM engines' KV cache in shared memory: shared between engines, across restarts.
#[derive(Parser, Debug)]
#[command(name = "kvmp", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a server.
    Serve(Box<serve::ServeArgs>),
    /// Show what a running server counts.
    Stats(ask::StatsArgs),
    /// Ask a running server whether it is there.
    Ping(ask::Where),
    /// Evict every block that is not in use.
    Clear(ask::Where),
    /// Remove the segment file that a server left at its exit.
    Rm(RmArgs),
    /// Start vLLM on a kvmp server, found or started (in the Python wheel).
    Vllm(wheel::WheelArgs),
    /// Check this machine, and say what is wrong and the mend (in the Python wheel).
    Doctor(wheel::WheelArgs),
}

#[derive(clap::Args, Debug)]
struct RmArgs {
    /// Name of the server.
    #[arg(default_value = DEFAULT_NAME)]
    name: String,
    /// Folder of the segment file.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_ARENA_DIR)]
    arena_dir: std::path::PathBuf,
}

/// Runs a command line (with the program's name first); gives the exit status.
#[must_use]
pub fn main(args: Vec<String>) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => return no_command(&e),
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Stats(args) => ask::stats(args),
        Command::Ping(place) => ask::ping(place),
        Command::Clear(place) => ask::clear(place),
        Command::Rm(args) => rm(args),
        Command::Vllm(_) => wheel::refuse("vllm"),
        Command::Doctor(_) => wheel::refuse("doctor"),
    };
    match done {
        Ok(()) => 0,
        Err(e) => {
            last::say_last(format!("kvmp: {e}\n").as_bytes(), last::LAST_LINES);
            e.exit_code()
        }
    }
}

/// What is no command line. Help and version come this way too, with status 0.
fn no_command(error: &clap::Error) -> i32 {
    let text = error.render();
    match (error.use_stderr(), std::io::stderr().is_terminal()) {
        (false, _) => drop(error.print()),
        (true, true) => last::say_last(text.ansi().to_string().as_bytes(), last::LAST_LINES),
        (true, false) => last::say_last(text.to_string().as_bytes(), last::LAST_LINES),
    }
    error.exit_code()
}

fn rm(args: RmArgs) -> Result<(), crate::ServerError> {
    let name = checked_name(args.name)?;
    let bytes = segment::remove(&args.arena_dir, &name)?;
    say!("removed the segment of '{name}': {} of memory are free again", Bytes(bytes));
    Ok(())
}

impl From<serve::ServeArgs> for ConfigSource {
    fn from(args: serve::ServeArgs) -> Self {
        Self {
            size: args.size,
            name: args.name,
            arena_dir: args.arena_dir,
            socket: args.socket,
            tcp: args.tcp,
            policy: args.policy,
            chunk: args.chunk,
            ephemeral: args.ephemeral.then_some(true),
            fresh: args.fresh.then_some(true),
            allow_uid: (!args.allow_uid.is_empty()).then_some(args.allow_uid),
            until_pid: args.until_pid,
            upgrade: args.upgrade.then_some(true),
            upgrade_from: args.upgrade_from,
            drain_timeout: args.drain_timeout,
        }
    }
}
