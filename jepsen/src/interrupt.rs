//! SIGINT and SIGTERM end a run at its next step, so that it takes down what it built.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_: libc::c_int) {
    ASKED.store(true, Ordering::Release);
}

/// From now on, signals are remembered.
pub(crate) fn listen() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, remember as *const () as libc::sighandler_t) };
    }
}

/// Whether a signal asked for the end.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Acquire)
}

/// # Errors
/// A signal asked for the end.
pub(crate) fn check() -> anyhow::Result<()> {
    anyhow::ensure!(!is_asked(), "interrupted");
    Ok(())
}
