//! Errors of the HTTP API: the one place where a reason becomes a status.
//!
//! Body: `{"error": what is wrong, "action": what to do about it}`.

use std::io;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::replication::message::PROTOCOL;
use crate::replication::{DbName, DbNameError};
use crate::store::lost::FindError;

/// Why the node cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// A query parameter is missing.
    #[error("query parameter {0:?} is missing")]
    MissingParameter(&'static str),
    /// A query parameter has a value that it cannot have.
    #[error("query parameter {name}: {why}")]
    BadParameter {
        /// Which.
        name: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Not a database name.
    #[error(transparent)]
    Name(#[from] DbNameError),
    /// No such database.
    #[error("database {0} does not exist on this node")]
    NotFound(DbName),
    /// A name that stands for something else.
    #[error("{db} cannot name a database: {why}")]
    Reserved {
        /// The name.
        db: DbName,
        /// What it stands for.
        why: &'static str,
    },
    /// No such endpoint.
    #[error("no such endpoint: {0}")]
    NoEndpoint(String),
    /// Only the primary can.
    #[error("this node is not the primary")]
    NotPrimary {
        /// Who is, if known.
        primary: Option<String>,
    },
    /// The bytes sent are not a database.
    #[error("database {db}: {why}")]
    BadDatabase {
        /// Which.
        db: DbName,
        /// What is wrong with them.
        why: String,
    },
    /// Programs hold locks that stand against it.
    #[error("{what}: {source}")]
    Locked {
        /// What was being done.
        what: String,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// Not the identity of a node.
    #[error("{0:?} is no node id")]
    BadNodeId(String),
    /// It does not fit with how the cluster is.
    #[error("{what}")]
    Conflict {
        /// What does not fit.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// No such lost branch.
    #[error(transparent)]
    Lost(#[from] FindError),
    /// A lost branch does not have what was asked for.
    #[error("lost branch {id}: {what}")]
    NotKept {
        /// Its id.
        id: String,
        /// What it does not have, and why.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The stream endpoint needs an upgrade.
    #[error("this endpoint speaks {PROTOCOL} after an HTTP/1.1 upgrade")]
    UpgradeRequired,
    /// The node is starting, stopping, or electing.
    #[error("not ready: {0}")]
    NotReady(String),
    /// Disk failure.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl NodeError {
    fn status(&self) -> StatusCode {
        match self {
            NodeError::MissingParameter(_)
            | NodeError::BadParameter { .. }
            | NodeError::Name(_)
            | NodeError::Reserved { .. }
            | NodeError::BadNodeId(_)
            | NodeError::Lost(FindError::NoId(_))
            | NodeError::BadDatabase { .. } => StatusCode::BAD_REQUEST,
            NodeError::NotFound(_)
            | NodeError::NoEndpoint(_)
            | NodeError::NotKept { .. }
            | NodeError::Lost(FindError::None { .. }) => StatusCode::NOT_FOUND,
            NodeError::Locked { .. }
            | NodeError::Conflict { .. }
            | NodeError::Lost(FindError::Several { .. }) => StatusCode::CONFLICT,
            NodeError::Lost(_) => StatusCode::INTERNAL_SERVER_ERROR,
            NodeError::NotPrimary { .. } | NodeError::NotReady(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            NodeError::UpgradeRequired => StatusCode::UPGRADE_REQUIRED,
            NodeError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            NodeError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn action(&self) -> String {
        match self {
            NodeError::MissingParameter(name) => format!("add ?{name}=... to the address"),
            NodeError::BadParameter { name, .. } => format!("give another {name}; see docs/proxy.md"),
            NodeError::Name(_) => {
                "name the database as in the mount, for instance my.db".to_owned()
            }
            NodeError::Reserved { .. } => "choose another name".to_owned(),
            NodeError::BadNodeId(_) => "take one from GET /v1/cluster: 16 hex digits".to_owned(),
            NodeError::Conflict { remedy, .. } | NodeError::NotKept { remedy, .. } => {
                remedy.clone()
            }
            NodeError::Lost(FindError::NoId(_)) => {
                "give an id, or at least the first four hex digits of it, as `litefs lost list` shows it"
                    .to_owned()
            }
            NodeError::Lost(_) => {
                "see `litefs lost list` on the node whose history lost (GET /v1/lost)".to_owned()
            }
            NodeError::NoEndpoint(_) => {
                "there are GET /info, /export, /events, /metrics, /v1/status, /debug/vars, and POST /import"
                    .to_owned()
            }
            NodeError::NotFound(_) => "list the databases with GET /debug/vars".to_owned(),
            NodeError::NotPrimary {
                primary: Some(primary),
            } => format!("ask the primary, {primary}"),
            NodeError::NotPrimary { primary: None } => {
                "no primary is known; try again, and see this node's log if it lasts".to_owned()
            }
            NodeError::BadDatabase { .. } => {
                "send a SQLite database file that passes `PRAGMA integrity_check`".to_owned()
            }
            NodeError::Locked { .. } => {
                "programs have the database open; try again, and to bring in another page size, \
                 which no WAL can change, close it in them first"
                    .to_owned()
            }
            NodeError::UpgradeRequired => {
                "it is for litefs nodes; a proxy in between must pass upgrades on".to_owned()
            }
            NodeError::NotReady(_) => "try again in a moment".to_owned(),
            NodeError::Io { .. } => {
                "see this node's log and the free space of its data directory".to_owned()
            }
        }
    }
}

impl IntoResponse for NodeError {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut error = self.to_string();
        let is_said = matches!(self, NodeError::Locked { .. });
        if let Some(cause) = std::error::Error::source(&self).filter(|_| !is_said) {
            error = format!("{error}: {cause}");
        }
        if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::error!(%status, %error, "request failed");
        }
        let body = serde_json::json!({ "error": error, "action": self.action() });
        let mut response = (status, Json(body)).into_response();
        if status == StatusCode::UPGRADE_REQUIRED {
            let protocol = HeaderValue::from_static(PROTOCOL);
            response.headers_mut().insert(header::UPGRADE, protocol);
        }
        response
    }
}
