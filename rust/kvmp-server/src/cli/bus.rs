//! SIGBUS: a segment that was made shorter from outside kills whoever touches what is gone. Its last words say why.

use std::time::Duration;

use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{emulate_default_handler, register};

use super::last::say_last;
use crate::error::{Context, ServerError};

const LAST_WORDS: &[u8] =
    b"kvmp: killed by SIGBUS: was the segment made shorter, or memory taken away, from outside? Start \
the server again; it will look at what is left.\n";

/// Has the process say so before it ends by that signal.
pub(super) fn explain() -> Result<(), ServerError> {
    let last_words = || {
        // No wait: a log that nobody reads must not keep the process from ending.
        say_last(LAST_WORDS, Duration::ZERO);
        // Never back to the access that faulted.
        let _ = emulate_default_handler(SIGBUS);
        std::process::abort();
    };
    // SAFETY: the action only polls a descriptor, writes a constant to it and ends the process: all of that may be done
    // in a signal handler.
    unsafe { register(SIGBUS, last_words) }.doing(|| "handling SIGBUS".into())?;
    Ok(())
}
