//! `litefs`: SQLite databases in a FUSE directory, replicated page by page to every node.
//!
//! Layers, top to bottom; nothing points up:
//! `cmd -> node -> proxy -> {http, volume} -> replication -> store -> db -> {ltx, sqlite, disk}`.

pub mod clock;
pub mod cmd;
pub mod config;
pub mod db;
pub mod disk;
pub mod exec;
pub mod exit;
pub mod history;
pub mod http;
pub mod lag;
pub mod logging;
pub mod ltx;
pub mod node;
pub mod proxy;
pub mod replication;
pub mod sqlite;
pub mod store;
pub mod survivors;
pub mod volume;
pub mod watch;

/// Returns every labelled step at which `LITEFS_CRASH_AT` can kill the daemon (see [`disk`]).
#[must_use]
pub fn steps() -> Vec<disk::Step> {
    [
        db::log::steps::ALL,
        db::page_checksums::steps::ALL,
        db::steps::ALL,
        db::lost::steps::ALL,
        db::lost::discard_steps::ALL,
        store::steps::ALL,
        node::steps::ALL,
    ]
    .concat()
}
