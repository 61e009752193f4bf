//! What is kept of histories that lost, over HTTP.
//!
//! | route | what |
//! |---|---|
//! | `GET /v1/lost` | all entries of this node |
//! | `GET /v1/lost/ID?pages=true` | one, with its transactions, and with the pages that differ from the database now |
//! | `GET /v1/lost/ID/export?records=FIRST-LAST` | the whole database, or an LTX file of one record |
//! | `DELETE /v1/lost/ID` | removes it for good |

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::error::NodeError;
use super::server::{Export, blocking, stream_out};
use crate::db::lost::Entry;
use crate::ltx::Txid;

/// One entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// What is known of it.
    #[serde(flatten)]
    pub entry: Entry,
    /// Where it is on the node.
    pub path: String,
    /// What it takes on disk.
    pub disk_bytes: u64,
    /// What is wrong with it, in words.
    pub problem: Option<String>,
}

/// Answer of `GET /v1/lost`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listing {
    /// Oldest first.
    pub lost: Vec<Summary>,
}

/// Some transactions that were captured as one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// First transaction, 16 hex digits.
    pub first: String,
    /// Last transaction.
    pub last: String,
    /// How many.
    pub tx_count: u64,
    /// Tenure in which they were committed; zero if that is not known.
    pub epoch: u64,
    /// When the last was captured, milliseconds since 1970.
    pub when_ms: i64,
    /// Pages that they changed.
    pub pages: u32,
    /// Pages of the database afterwards.
    pub page_count: u32,
    /// Length of their LTX file.
    pub bytes: u64,
}

/// Answer of `GET /v1/lost/ID`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detail {
    /// What `GET /v1/lost` says of it.
    #[serde(flatten)]
    pub summary: Summary,
    /// What was lost, oldest first, as far as the log had it. The first may begin before the histories part.
    pub records: Vec<Record>,
    /// Pages in which the database is another now, if that was asked for and can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differing_pages: Option<Vec<u32>>,
}

/// What the routes need of the node. Calls may block.
pub trait LostApi: Send + Sync + 'static {
    /// All entries.
    ///
    /// # Errors
    /// The data directory cannot be read.
    fn list(&self) -> Result<Vec<Summary>, NodeError>;
    /// One of them.
    ///
    /// # Errors
    /// There is none.
    fn show(&self, id: &str, with_pages: bool) -> Result<Detail, NodeError>;
    /// Opens the whole database.
    ///
    /// # Errors
    /// There is none.
    fn export(&self, id: &str) -> Result<Export, NodeError>;
    /// Opens the LTX file of one record.
    ///
    /// # Errors
    /// There is none.
    fn export_record(&self, id: &str, first: Txid, last: Txid) -> Result<Export, NodeError>;
    /// Removes it; returns its id.
    ///
    /// # Errors
    /// There is none. Disk.
    fn discard(&self, id: &str) -> Result<String, NodeError>;
}

type Node = Arc<dyn LostApi>;

/// Makes the routes.
pub fn router(node: Node) -> Router {
    Router::new()
        .route("/v1/lost", get(list))
        .route("/v1/lost/{id}", get(show).delete(discard))
        .route("/v1/lost/{id}/export", get(export))
        .with_state(node)
}

async fn list(State(node): State<Node>) -> Result<Json<Listing>, NodeError> {
    let lost = blocking(move || node.list()).await?;
    Ok(Json(Listing { lost }))
}

#[derive(Deserialize)]
struct ShowQuery {
    #[serde(default)]
    pages: bool,
}

async fn show(
    State(node): State<Node>,
    Path(id): Path<String>,
    Query(query): Query<ShowQuery>,
) -> Result<Json<Detail>, NodeError> {
    blocking(move || node.show(&id, query.pages))
        .await
        .map(Json)
}

#[derive(Deserialize)]
struct ExportQuery {
    records: Option<String>,
}

async fn export(
    State(node): State<Node>,
    Path(id): Path<String>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, NodeError> {
    let Some(records) = query.records.filter(|text| !text.is_empty()) else {
        let database = blocking(move || node.export(&id)).await?;
        return Ok(stream_out(database, "application/vnd.sqlite3"));
    };
    let range = records
        .split_once('-')
        .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let Some((first, last)) = range else {
        return Err(NodeError::NotKept {
            id,
            what: format!("{records:?} is no range of transactions"),
            remedy:
                "give one as `litefs lost show --json` shows it, FIRST-LAST, 16 hex digits each"
                    .to_owned(),
        });
    };
    let record = blocking(move || node.export_record(&id, first, last)).await?;
    Ok(stream_out(record, "application/octet-stream"))
}

async fn discard(
    State(node): State<Node>,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, NodeError> {
    let id = blocking(move || node.discard(&id)).await?;
    Ok(Json(serde_json::json!({ "discarded": id })))
}
