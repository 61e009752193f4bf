//! `litefs import`: replaces a database of the cluster with an ordinary file.

use super::NodeArgs;
use crate::http::client::{Client, path_with_query};
use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::io::ReaderStream;

const CHUNK_LEN: usize = 64 << 10;
/// How long to wait for a program that holds a lock of the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Copy a database into the cluster.
///
/// Creates the database, or replaces it in one transaction. The node must be the primary. What is in a WAL beside PATH
/// comes along.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Name of the database, relative to the mount.
    #[arg(long)]
    name: String,
    /// File to read.
    path: PathBuf,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    super::block_on(import(args))
}

async fn import(args: &Args) -> anyhow::Result<i32> {
    let context = || format!("read {}", args.path.display());
    let whole = WithCompanions::of(&args.path).with_context(context)?;
    let file = tokio::fs::File::open(whole.path())
        .await
        .with_context(context)?;
    let bytes = file.metadata().await.with_context(context)?.len();
    let body = StreamBody::new(ReaderStream::with_capacity(file, CHUNK_LEN).map_ok(Frame::data));
    let request = path_with_query("/import", "name", &args.name);
    let client = Client::new(args.node.url.clone());
    let answer = client.post(&request, body).await?;
    answer
        .into_body()
        .collect()
        .await
        .with_context(|| format!("read {}{request}", client.url()))?;
    println!(
        "imported {} as database {:?} ({bytes} bytes)",
        args.path.display(),
        args.name
    );
    Ok(0)
}

/// A database file with all that belongs to it. Transactions may be in its WAL, or a journal may have to be rolled
/// back first; then it is a copy that SQLite made, removed when dropped.
enum WithCompanions<'a> {
    Itself(&'a Path),
    Copy(PathBuf),
}

impl WithCompanions<'_> {
    fn of(path: &Path) -> anyhow::Result<WithCompanions<'_>> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            anyhow::bail!("it is not an ordinary file");
        }
        let has = |suffix| {
            let companion = crate::db::paths::with_suffix(path, suffix);
            std::fs::metadata(companion).is_ok_and(|m| m.len() > 0)
        };
        if !has("-wal") && !has("-journal") {
            return Ok(WithCompanions::Itself(path));
        }
        let name = format!("litefs-import-{:016x}.db", rand::random::<u64>());
        let copy = WithCompanions::Copy(std::env::temp_dir().join(name));
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
        let database = rusqlite::Connection::open_with_flags(path, flags)?;
        database.busy_timeout(BUSY_TIMEOUT)?;
        database
            .backup("main", copy.path(), None::<fn(rusqlite::backup::Progress)>)
            .with_context(|| format!("copy to {}", copy.path().display()))?;
        Ok(copy)
    }

    fn path(&self) -> &Path {
        match self {
            WithCompanions::Itself(path) => path,
            WithCompanions::Copy(path) => path,
        }
    }
}

impl Drop for WithCompanions<'_> {
    fn drop(&mut self) {
        if let WithCompanions::Copy(path) = self {
            for suffix in ["", "-journal", "-wal", "-shm"] {
                // What is not there needs no removing; what cannot be removed is a file in the temporary directory.
                let _ = std::fs::remove_file(crate::db::paths::with_suffix(path, suffix));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::serve;
    use super::*;
    use axum::extract::{DefaultBodyLimit, Query};
    use axum::http::StatusCode;
    use axum::{Router, routing};
    use bytes::Bytes;
    use parking_lot::Mutex;
    use std::collections::HashMap;
    use std::sync::Arc;

    type Databases = Arc<Mutex<HashMap<String, Bytes>>>;

    async fn node(databases: Databases) -> NodeArgs {
        let post = async move |Query(query): Query<HashMap<String, String>>, body: Bytes| {
            if body.is_empty() {
                return (StatusCode::BAD_REQUEST, "not a database");
            }
            databases.lock().insert(query["name"].clone(), body);
            (StatusCode::OK, "")
        };
        let router = Router::new().route("/import", routing::post(post));
        NodeArgs {
            url: serve(router.layer(DefaultBodyLimit::disable())).await,
        }
    }

    #[tokio::test]
    async fn import_command_create_and_overwrite() {
        let databases = Databases::default();
        let node = node(Arc::clone(&databases)).await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for content in [vec![7_u8; 3 * CHUNK_LEN + 5], b"smaller".to_vec()] {
            std::fs::write(&path, &content).unwrap();
            let args = Args {
                node: node.clone(),
                name: "my app.db".to_owned(),
                path: path.clone(),
            };
            assert_eq!(import(&args).await.unwrap(), 0);
            assert_eq!(databases.lock()["my app.db"], content);
        }
    }

    #[tokio::test]
    async fn refusals_and_missing_files_are_told() {
        let node = node(Databases::default()).await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let args = Args {
            node,
            name: "db".to_owned(),
            path: path.clone(),
        };
        let error = import(&args).await.unwrap_err().to_string();
        assert_eq!(error, format!("read {}", path.display()));
        std::fs::write(&path, "").unwrap();
        let error = import(&args).await.unwrap_err().to_string();
        assert!(
            error.ends_with("/import?name=db: 400 Bad Request: not a database"),
            "{error}"
        );
    }
}
