//! Broken streams, lost history, damaged files.
