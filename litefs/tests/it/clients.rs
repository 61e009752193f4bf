//! Real programs as clients, several at once.
