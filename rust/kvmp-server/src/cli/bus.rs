//! SIGBUS: a segment that was made shorter from outside kills whoever touches what is gone. Its last words say why.

use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{emulate_default_handler, register};

use crate::error::{Context, ServerError};

const LAST_WORDS: &[u8] =
    b"kvmp: killed by SIGBUS: was the segment made shorter, or memory taken away, from outside? Start \
the server again; it will look at what is left.\n";

/// Has the process say so before it ends by that signal.
pub(super) fn explain() -> Result<(), ServerError> {
    let last_words = || {
        let _ = rustix::io::write(std::io::stderr(), LAST_WORDS);
        // Never back to the access that faulted.
        let _ = emulate_default_handler(SIGBUS);
        std::process::abort();
    };
    // SAFETY: the action only writes a constant to a descriptor and ends the process: both may be done in a signal handler.
    unsafe { register(SIGBUS, last_words) }.doing(|| "handling SIGBUS".into())?;
    Ok(())
}
