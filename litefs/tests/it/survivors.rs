//! Programs that outlive the daemon.
