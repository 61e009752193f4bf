//! `litefs`: SQLite databases in a FUSE directory, replicated page by page to every node.
//!
//! Layers, top to bottom; nothing points up:
//! `cmd -> node -> {http, volume, exec} -> replication -> store -> db -> {ltx, sqlite, disk}`.

pub mod cmd;
pub mod config;
pub mod exec;
pub mod exit;
pub mod http;
pub mod logging;
pub mod ltx;
pub mod node;
pub mod sqlite;
