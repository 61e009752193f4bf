//! `litefs export`: copies a database out of the cluster into an ordinary file.

use super::NodeArgs;
use crate::http::client::{Client, path_with_query};
use anyhow::Context as _;
use http_body_util::BodyExt as _;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt as _;

/// Copy a database out of the cluster.
///
/// Replaces PATH, and removes the journal, WAL and shared memory of what was there.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Name of the database, relative to the mount.
    #[arg(long)]
    name: String,
    /// File to write.
    path: PathBuf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    super::block_on(export(args))
}

async fn export(args: &Args) -> anyhow::Result<i32> {
    if args.path.is_dir() {
        anyhow::bail!("{} is a directory: name a file in it", args.path.display());
    }
    let client = Client::new(args.node.url.clone());
    let temporary = with_suffix(&args.path, ".tmp");
    let result = download(&client, &args.name, &temporary).await;
    let bytes = result.and_then(|bytes| replace(&temporary, &args.path).map(|()| bytes));
    if bytes.is_err() {
        // The error is what matters; PATH is as it was.
        let _ = std::fs::remove_file(&temporary);
    }
    println!(
        "exported database {:?} to {} ({} bytes)",
        args.name,
        args.path.display(),
        bytes?
    );
    Ok(0)
}

/// Writes the database to `path` and syncs it; returns its length.
async fn download(client: &Client, name: &str, path: &Path) -> anyhow::Result<u64> {
    let request = path_with_query("/export", "name", name);
    let mut body = client.get(&request).await?.into_body();
    let context = || format!("write {}", path.display());
    let mut file = tokio::fs::File::create(path).await.with_context(context)?;
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.with_context(|| format!("read {}{request}", client.url()))?;
        if let Some(data) = frame.data_ref() {
            file.write_all(data).await.with_context(context)?;
            bytes += data.len() as u64;
        }
    }
    file.flush().await.with_context(context)?;
    file.sync_all().await.with_context(context)?;
    Ok(bytes)
}

/// Puts the finished file in place of `path`, durably.
///
/// Sidecars go first: a WAL of the old database must never meet the new one.
fn replace(finished: &Path, path: &Path) -> anyhow::Result<()> {
    for suffix in ["-journal", "-wal", "-shm"] {
        let sidecar = with_suffix(path, suffix);
        match std::fs::remove_file(&sidecar) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", sidecar.display()));
            }
            _ => {}
        }
    }
    let context = || format!("rename {} to {}", finished.display(), path.display());
    #[expect(
        clippy::disallowed_methods,
        reason = "a user's file, not a database's; synced below"
    )]
    std::fs::rename(finished, path).with_context(context)?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))
        .and_then(|dir| dir.sync_all())
        .with_context(context)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(suffix);
    path.into()
}

#[cfg(test)]
mod tests {
    use super::super::tests::serve;
    use super::*;
    use axum::body::Body;
    use axum::extract::Query;
    use axum::http::StatusCode;
    use axum::response::{IntoResponse as _, Response};
    use axum::{Router, routing};
    use bytes::Bytes;
    use futures_util::stream;
    use std::collections::HashMap;

    async fn answer(Query(query): Query<HashMap<String, String>>) -> Response {
        let pages = [
            Ok(Bytes::from_static(b"page 1,")),
            Ok(Bytes::from_static(b"page 2")),
        ];
        match query["name"].as_str() {
            "dir/my app.db" => Body::from_stream(stream::iter(pages)).into_response(),
            "broken" => {
                let [first, _] = pages;
                let broken = [first, Err(io::Error::other("disk"))];
                Body::from_stream(stream::iter(broken)).into_response()
            }
            _ => (StatusCode::NOT_FOUND, "database not found").into_response(),
        }
    }

    async fn args(name: &str, path: PathBuf) -> Args {
        let url = serve(Router::new().route("/export", routing::get(answer))).await;
        Args {
            node: NodeArgs { url },
            name: name.to_owned(),
            path,
        }
    }

    fn listing(dir: &Path) -> Vec<String> {
        let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(name).collect();
        names.sort();
        names
            .into_iter()
            .map(|name| name.into_string().unwrap())
            .collect()
    }

    #[tokio::test]
    async fn export_command_ok() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        for suffix in ["", "-wal", "-shm", "-journal"] {
            std::fs::write(with_suffix(&path, suffix), "old").unwrap();
        }
        assert_eq!(
            export(&args("dir/my app.db", path.clone()).await)
                .await
                .unwrap(),
            0
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "page 1,page 2");
        assert_eq!(listing(dir.path()), ["db"]);
    }

    #[tokio::test]
    async fn export_command_err_database_not_found_changes_nothing() {
        for (name, want) in [
            ("none", "404 Not Found: database not found"),
            ("broken", "/export?name=broken"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("db");
            for suffix in ["", "-wal"] {
                std::fs::write(with_suffix(&path, suffix), "old").unwrap();
            }
            let error = export(&args(name, path.clone()).await)
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(want), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
            assert_eq!(listing(dir.path()), ["db", "db-wal"]);
        }
    }
}
