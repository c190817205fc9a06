//! `kvmp vllm` and `kvmp doctor` are Python: the native binary lists them, and says where they are.

use crate::error::ServerError;

/// Whatever follows the command: its own program would read it.
#[derive(clap::Args, Debug)]
#[command(disable_help_flag = true)]
pub(super) struct WheelArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

pub(super) fn refuse(command: &'static str) -> Result<(), ServerError> {
    Err(ServerError::InWheel { command })
}
