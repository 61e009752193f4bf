//! Where the primary is, by its own word: what `strong` and `bounded` go by.
//!
//! An answer says where the databases were at some moment after the question. Who was at all of that since then is no older
//! than the question; so it needs no clock but this node's own, and a stream that is late is not believed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Limited};
use hyper::{Request, StatusCode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::body::Lent;
use super::links::{self, Link, SendError};
use super::port::{Primary, ProxyNode};
use super::positions::Positions;
use super::token::{self, Token};
use crate::http::client::path_with_query;
use crate::replication::{DatabaseFilter, DbName};

/// Route of the node's port.
pub(super) const PATH: &str = "/v1/positions";
/// How long the primary may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Answers that this node was not at yet, of which so many are kept, for `bounded`.
const KEPT: usize = 64;
/// How often a question is asked again whose connection broke.
const TRIES: u32 = 3;
const MAX_ANSWER_LEN: usize = 32 << 20;

/// What `GET /v1/positions` says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PositionsReply {
    /// Tenure of the primary.
    pub(super) epoch: u64,
    /// Where each database is, each as a token.
    pub(super) positions: Vec<String>,
}

/// Where the primary was, after it was asked.
#[derive(Debug, Clone)]
pub(super) struct Evidence {
    pub(super) asked_at: Instant,
    pub(super) token: Arc<Token>,
}

/// Asks the primary about some databases; one question at a time, for all who wait.
pub(super) struct Confirm {
    node: Arc<dyn ProxyNode>,
    positions: Arc<Positions>,
    link: Link,
    path: String,
    filter: DatabaseFilter,
    only: Option<DbName>,
    last: tokio::sync::Mutex<Option<Evidence>>,
    proof: Mutex<Proof>,
}

/// How old this node is at most.
#[derive(Default)]
struct Proof {
    /// When was asked what this node has had all of since.
    level: Option<Instant>,
    /// What it did not have yet when it was looked at, oldest first.
    open: Vec<Evidence>,
}

impl Proof {
    fn add(&mut self, evidence: Evidence) {
        if self.open.len() == KEPT {
            // Every other one: a long bound can do with few, and a short one with the last.
            let mut keep = false;
            self.open.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.open.push(evidence);
    }

    fn settle(&mut self, positions: &Positions) {
        let reached = self.open.iter().rposition(|e| positions.has(&e.token));
        if let Some(at) = reached {
            self.level = self.level.max(Some(self.open[at].asked_at));
            self.open.drain(..=at);
        }
    }
}

impl Confirm {
    pub(super) fn new(
        positions: Arc<Positions>,
        link: Link,
        filter: DatabaseFilter,
        only: Option<DbName>,
    ) -> Confirm {
        let mut list = String::new();
        for pattern in filter.patterns() {
            if !list.is_empty() {
                list.push(',');
            }
            token::encode(pattern.as_str(), &mut list);
        }
        Confirm {
            node: positions.node.clone(),
            positions,
            link,
            path: path_with_query(PATH, "db", &list),
            filter,
            only,
            last: tokio::sync::Mutex::default(),
            proof: Mutex::default(),
        }
    }

    /// Asks, unless an answer is there to a question that was asked since.
    pub(super) async fn ask(&self, since: Instant) -> Option<Evidence> {
        let mut last = self.last.lock().await;
        if let Some(last) = last.as_ref().filter(|e| e.asked_at >= since) {
            return Some(last.clone());
        }
        let asked_at = Instant::now();
        let token = match self.node.primary() {
            Primary::Here => {
                own(&self.positions, &self.filter, self.only.as_ref())
                    .await?
                    .1
            }
            Primary::At(url) => tokio::time::timeout(PATIENCE, self.fetch(&url))
                .await
                .ok()??,
            Primary::Unknown => return None,
        };
        let evidence = Evidence {
            asked_at,
            token: Arc::new(token),
        };
        *last = Some(evidence.clone());
        let mut proof = self.proof.lock();
        proof.add(evidence.clone());
        proof.settle(&self.positions);
        Some(evidence)
    }

    /// Whether this node is known to be no older than `bound`.
    pub(super) fn is_within(&self, bound: Duration, now: Instant) -> bool {
        let mut proof = self.proof.lock();
        proof.settle(&self.positions);
        proof
            .level
            .is_some_and(|at| now.saturating_duration_since(at) <= bound)
    }

    async fn fetch(&self, url: &str) -> Option<Token> {
        let authority = links::authority_of(url)?;
        let uri = links::uri(&authority, &self.path.parse().ok()?);
        let mut tries = 0;
        let answer = loop {
            let mut request = Request::new(Lent::empty());
            *request.uri_mut() = uri.clone();
            match self.link.send(request).await {
                Ok(answer) => break answer,
                // The connection was kept by us alone.
                Err(SendError::Broken(_)) if tries < TRIES => tries += 1,
                Err(_) => return None,
            }
        };
        if answer.status() != StatusCode::OK {
            return None;
        }
        let body = Limited::new(answer.into_body(), MAX_ANSWER_LEN)
            .collect()
            .await
            .ok()?;
        let reply: PositionsReply = serde_json::from_slice(&body.to_bytes()).ok()?;
        let mut token = Token::default();
        for text in &reply.positions {
            token.merge(Token::parse(text, None).ok()?);
        }
        Some(token)
    }
}

/// Where the databases of this node were at some moment after the call, at which it was primary; and in which tenure.
pub(super) async fn own(
    positions: &Positions,
    filter: &DatabaseFilter,
    only: Option<&DbName>,
) -> Option<(u64, Token)> {
    let epoch = positions.node.tenure()?;
    let names = positions.names(filter, only);
    positions.capture(&names).await;
    let mut token = Token::default();
    for name in names {
        if let Some(at) = positions.node.standing(&name) {
            token.set(name, at.into());
        }
    }
    // Afterwards: it was the only primary at the moment of the looks.
    (positions.node.tenure()? == epoch).then_some((epoch, token))
}

/// Reads the `db` of a question.
pub(super) fn parse_filter(list: &str) -> Option<DatabaseFilter> {
    let patterns = list
        .split(',')
        .map(|name| token::decode(name)?.parse().ok());
    Some(DatabaseFilter::new(patterns.collect::<Option<Vec<_>>>()?))
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeNode;
    use super::*;

    #[tokio::test]
    async fn a_bound_goes_by_when_was_asked() {
        let node = FakeNode::new();
        node.put("app.db", 1, 1);
        node.set_primary(Primary::Here);
        let positions = Positions::new(node.clone());
        let only: DbName = "app.db".parse().unwrap();
        let filter = DatabaseFilter::new(vec!["app.db".parse().unwrap()]);
        let confirm = Confirm::new(positions, Link::to_nodes(), filter, Some(only));
        let bound = Duration::from_millis(500);
        assert!(!confirm.is_within(bound, Instant::now()));
        let before = Instant::now();
        let evidence = confirm.ask(before).await.unwrap();
        assert!(confirm.is_within(bound, evidence.asked_at + bound));
        assert!(!confirm.is_within(bound, evidence.asked_at + bound + Duration::from_millis(1)));
        // An answer to an older question is none to this one.
        let again = confirm.ask(before).await.unwrap();
        assert_eq!(again.asked_at, evidence.asked_at);
        assert!(confirm.ask(Instant::now()).await.unwrap().asked_at > evidence.asked_at);
        // Late: what was proved stays so, and ages.
        let proved = confirm.ask(Instant::now()).await.unwrap().asked_at;
        let ahead = Evidence {
            asked_at: proved + bound,
            token: Arc::new(Token::of(
                "app.db".parse().unwrap(),
                FakeNode::standing_at(2, 1).into(),
            )),
        };
        for _ in 0..100 {
            confirm.proof.lock().add(ahead.clone());
        }
        assert!(confirm.proof.lock().open.len() <= KEPT);
        assert!(!confirm.is_within(bound, proved + 2 * bound));
        assert!(confirm.is_within(3 * bound, proved + 2 * bound));
        node.put("app.db", 2, 1);
        assert!(confirm.is_within(bound, proved + 2 * bound));
        node.set_primary(Primary::Unknown);
        assert!(confirm.ask(Instant::now()).await.is_none());
    }

    #[test]
    fn lists_of_patterns() {
        let filter = parse_filter("app.db,t%2C%2A").unwrap();
        assert!(
            filter.matches(&"app.db".parse().unwrap()) && filter.matches(&"t,x".parse().unwrap())
        );
        assert!(
            parse_filter("").is_none()
                && parse_filter("a,,b").is_none()
                && parse_filter("%").is_none()
        );
    }
}
