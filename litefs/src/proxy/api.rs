//! The proxy's part of the node's port: forwarded requests, and waiting for clients that do not come through the proxy.
//!
//! | route | what |
//! |---|---|
//! | any, with the header `litefs-forward` | a request of another node's client, for this node's program |
//! | `GET /v1/wait?db=&pos=&timeout=` | waits until the database is at a position here |
//! | `GET /v1/wait?db=&consistency=&timeout=` | waits until a read here would be `eventual`, `bounded=DURATION` or `strong` |
//! | `GET /v1/positions?db=` | where databases are, by the primary's word |

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::confirm::{self, Confirm, PositionsReply};
use super::level::Consistency;
use super::links::Link;
use super::port::Primary;
use super::positions::Positions;
use super::token::{self, Token};
use crate::config::GoDuration;
use crate::http::NodeError;
use crate::http::client::path_with_query;
use crate::replication::{DatabaseFilter, DbName};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(Clone)]
struct Desk {
    positions: Arc<Positions>,
    nodes: Link,
}

/// Makes the routes.
pub(super) fn router(positions: Arc<Positions>, nodes: Link) -> Router {
    Router::new()
        .route("/v1/wait", get(wait))
        .route(confirm::PATH, get(positions_route))
        .with_state(Desk { positions, nodes })
}

#[derive(Deserialize)]
struct PositionsQuery {
    db: Option<String>,
}

async fn positions_route(
    State(desk): State<Desk>,
    Query(query): Query<PositionsQuery>,
) -> Result<Json<PositionsReply>, NodeError> {
    let list = query.db.unwrap_or_default();
    let bad = || NodeError::BadParameter {
        name: "db",
        why: format!(
            "{:?} is no list of database names",
            list.chars().take(80).collect::<String>()
        ),
    };
    let filter = confirm::parse_filter(&list).ok_or_else(bad)?;
    let only = match filter.patterns() {
        [name] if !name.as_str().contains(['*', '?']) => name.as_str().parse().ok(),
        _ => None,
    };
    let own = confirm::own(&desk.positions, &filter, only.as_ref()).await;
    let (epoch, token) = own.ok_or_else(|| NodeError::NotPrimary {
        primary: desk.positions.node.primary_hostname(),
    })?;
    let positions = token
        .iter()
        .map(|(db, seen)| Token::of(db.clone(), *seen).to_text());
    Ok(Json(PositionsReply {
        epoch,
        positions: positions.collect(),
    }))
}

#[derive(Deserialize)]
struct WaitQuery {
    db: Option<String>,
    pos: Option<String>,
    consistency: Option<String>,
    timeout: Option<String>,
}

/// What `GET /v1/wait` says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Waited {
    /// The database.
    pub db: String,
    /// Where it is here, as in its `-pos` file; nothing if it is not here.
    pub position: Option<String>,
    /// The same, for the header `Litefs-Position` and the cookie.
    pub token: Option<String>,
}

/// The path of a question.
#[must_use]
pub fn wait_path(
    db: &str,
    pos: Option<&str>,
    consistency: Option<&str>,
    timeout: Duration,
) -> String {
    let mut path = path_with_query("/v1/wait", "db", db);
    for (name, value) in [("pos", pos), ("consistency", consistency)] {
        if let Some(value) = value {
            path.push('&');
            path.push_str(path_with_query("", name, value).trim_start_matches('?'));
        }
    }
    path.push_str(&format!("&timeout={}ms", timeout.as_millis()));
    path
}

async fn wait(
    State(desk): State<Desk>,
    Query(query): Query<WaitQuery>,
) -> Result<Response, NodeError> {
    let db = query.db.filter(|db| !db.is_empty());
    let db: DbName = db.ok_or(NodeError::MissingParameter("db"))?.parse()?;
    let timeout = match query.timeout.as_deref().filter(|text| !text.is_empty()) {
        None => DEFAULT_TIMEOUT,
        Some(text) => {
            let parsed = text.parse::<GoDuration>();
            let parsed = parsed.map_err(|e| bad("timeout", e.to_string()))?;
            parsed.positive().unwrap_or_default().min(MAX_TIMEOUT)
        }
    };
    let goal = goal(&db, query.pos.as_deref(), query.consistency.as_deref())?;
    let positions = &desk.positions;
    if positions.node.standing(&db).is_none() && !positions.node.may_come(&db) {
        return Err(NodeError::NotFound(db));
    }
    let reached = tokio::time::timeout(timeout, desk.reach(&db, &goal)).await;
    let standing = positions.node.standing(&db);
    let waited = Waited {
        db: db.to_string(),
        position: standing.map(|at| at.pos.to_string()),
        token: standing.map(|at| Token::of(db.clone(), at.into()).to_text()),
    };
    if reached.is_ok() {
        return Ok(Json(waited).into_response());
    }
    let at = waited.position.as_deref().unwrap_or("not on this node yet");
    let not_yet = match &goal {
        Goal::Seen(token) => format!("not at {}", token.to_text()),
        Goal::Level(level) => format!("not {level} by the word of a primary"),
    };
    let body = serde_json::json!({
        "error": format!("after {timeout:?}, {db} is {not_yet}: it is at {at}"),
        "action": "ask the primary, or wait longer; see `litefs status` for lag",
        "db": waited.db, "position": waited.position, "token": waited.token,
    });
    Ok((StatusCode::GATEWAY_TIMEOUT, Json(body)).into_response())
}

fn bad(name: &'static str, why: String) -> NodeError {
    NodeError::BadParameter { name, why }
}

enum Goal {
    Seen(Token),
    Level(Consistency),
}

fn goal(db: &DbName, pos: Option<&str>, consistency: Option<&str>) -> Result<Goal, NodeError> {
    let given = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
    match (given(pos), given(consistency)) {
        (Some(_), Some(_)) => Err(bad(
            "consistency",
            "it goes without pos, which is a goal by itself".into(),
        )),
        (None, None) => Err(NodeError::MissingParameter("pos")),
        (Some(text), None) => {
            let token =
                Token::parse(text.trim(), Some(db)).map_err(|e| bad("pos", e.to_string()))?;
            match token.get(db) {
                Some(seen) => Ok(Goal::Seen(Token::of(db.clone(), *seen))),
                None => Err(bad("pos", format!("it says nothing of {db}"))),
            }
        }
        (None, Some(text)) => match text
            .parse()
            .map_err(|e: super::ConsistencyError| bad("consistency", e.to_string()))?
        {
            Consistency::Session => Err(bad(
                "consistency",
                "session is about what a client has seen: give it as pos".into(),
            )),
            level => Ok(Goal::Level(level)),
        },
    }
}

impl Desk {
    async fn reach(&self, db: &DbName, goal: &Goal) {
        let positions = &self.positions;
        match goal {
            Goal::Seen(token) => {
                positions.capture(std::slice::from_ref(db)).await;
                positions.reach(token).await;
            }
            Goal::Level(Consistency::Eventual | Consistency::Session) => {}
            Goal::Level(Consistency::Strong | Consistency::Bounded(_)) => {
                let asked = Instant::now();
                // The name is one, so it is a pattern.
                let patterns = db.as_str().parse().into_iter().collect();
                let filter = DatabaseFilter::new(patterns);
                let confirm = Confirm::new(
                    positions.clone(),
                    self.nodes.clone(),
                    filter,
                    Some(db.clone()),
                );
                loop {
                    let changed = positions.node.primary_changed();
                    if let Some(evidence) = confirm.ask(asked).await {
                        return positions.reach(&evidence.token).await;
                    }
                    let pause = match positions.node.primary() {
                        Primary::Unknown => Duration::from_secs(1),
                        _ => Duration::from_millis(50),
                    };
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
    }
}

/// Reads what `-pos` of `litefs wait` says.
///
/// # Errors
/// It is no position.
pub fn check_pos(db: &DbName, text: &str) -> Result<(), token::TokenError> {
    Token::parse(text.trim(), Some(db)).map(drop)
}
