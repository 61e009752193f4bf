//! Kernel requests to a `Volume` port.
