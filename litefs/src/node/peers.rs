//! Requests to other nodes: Raft's messages, and what the winner of an election and who joins asks.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use consensus::{BoxFuture, Member, NodeId, Transport};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::http::cluster::{
    FenceReply, FenceRequest, Invitation, JoinReply, JoinRequest, Overview, Peer, show_id,
};
use crate::http::status::NodeStatus;

/// How long a node may take to answer that is asked for what it knows.
const ASK: Duration = Duration::from_secs(2);
/// The same where somebody waits for the answers of all.
const STATUS: Duration = Duration::from_secs(1);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(1);

/// Calls of Raft's in a row without an answer after which it is found out why.
const LATE_CALLS: u32 = 20;
/// How often that is done and said.
const TELL_LATE: Duration = Duration::from_secs(60);

/// Asks other nodes, over connections that are kept.
#[derive(Debug, Clone)]
pub(super) struct Peers {
    http: reqwest::Client,
    late: Arc<Mutex<HashMap<NodeId, Late>>>,
}

/// What is known of a member whose answers do not come in time.
#[derive(Debug, Default)]
struct Late {
    /// Calls since one was answered.
    unanswered: u32,
    told: Option<Instant>,
}

/// One of Raft's calls; it is dropped at the time at which an answer is of no use any more.
struct Call {
    peers: Peers,
    to: NodeId,
    url: String,
    within: Duration,
    began: Instant,
    is_answered: bool,
}

impl Call {
    fn answered(&mut self) {
        self.is_answered = true;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.is_answered {
            self.peers.late.lock().remove(&self.to);
            return;
        }
        if self.began.elapsed() < self.within * 9 / 10 {
            return; // it cannot be reached at all
        }
        {
            let mut late = self.peers.late.lock();
            let late = late.entry(self.to).or_default();
            late.unanswered += 1;
            let is_told = late.told.is_some_and(|at| at.elapsed() < TELL_LATE);
            if late.unanswered < LATE_CALLS || is_told {
                return;
            }
            late.told = Some(Instant::now());
        }
        let (peers, url, within) = (self.peers.clone(), self.url.clone(), self.within);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { peers.explain_late(&url, within).await });
        }
    }
}

impl Peers {
    pub(super) fn new() -> anyhow::Result<Peers> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .no_proxy()
            .build()
            .context("make an HTTP client")?;
        Ok(Peers {
            http,
            late: Arc::default(),
        })
    }

    /// Finds out whether a node whose answers are late is only far away, and says what helps then.
    async fn explain_late(&self, url: &str, within: Duration) {
        // The first connects.
        for is_connected in [false, true] {
            let began = Instant::now();
            if self.overview(url).await.is_err() {
                return;
            }
            let took = began.elapsed();
            if is_connected && took > within {
                tracing::warn!(
                    node = url,
                    ?took,
                    ?within,
                    "this node's answers come too late for elections: if it is far away, set lease.ttl on all nodes to more than \
                     six times what an answer takes"
                );
            }
        }
    }

    pub(super) async fn overview(&self, url: &str) -> anyhow::Result<Overview> {
        let url = format!("{}/v1/cluster", base(url));
        let request = self.http.get(&url).timeout(ASK);
        answer(&url, request).await
    }

    /// What a node knows by itself.
    pub(super) async fn status(&self, url: &str) -> anyhow::Result<NodeStatus> {
        let url = format!("{}/v1/status?only=node", base(url));
        answer(&url, self.http.get(&url).timeout(STATUS)).await
    }

    pub(super) async fn fence(
        &self,
        url: &str,
        request: &FenceRequest,
        patience: Duration,
    ) -> anyhow::Result<FenceReply> {
        self.post(url, "/v1/cluster/fence", request, patience).await
    }

    pub(super) async fn join(&self, url: &str, request: &JoinRequest) -> anyhow::Result<JoinReply> {
        self.post(url, "/v1/cluster/join", request, ASK).await
    }

    pub(super) async fn invite(&self, url: &str, invitation: &Invitation) -> anyhow::Result<()> {
        let invited = self.post(url, "/v1/cluster/invite", invitation, ASK).await;
        invited.map(|_: serde_json::Value| ())
    }

    pub(super) async fn opened(&self, url: &str, request: &FenceRequest) -> anyhow::Result<()> {
        self.tell(url, "/v1/cluster/opened", request).await
    }

    pub(super) async fn accepted(&self, url: &str, request: &FenceRequest) -> anyhow::Result<()> {
        self.tell(url, "/v1/cluster/accepted", request).await
    }

    async fn tell(&self, url: &str, path: &str, request: &FenceRequest) -> anyhow::Result<()> {
        let url = format!("{}{path}", base(url));
        let request = self.http.post(&url).timeout(ASK).json(request);
        request.send().await?.error_for_status()?;
        Ok(())
    }

    pub(super) async fn handoff(
        &self,
        url: &str,
        to: NodeId,
        patience: Duration,
    ) -> anyhow::Result<Peer> {
        let url = format!("{}/handoff?node={}", base(url), show_id(to));
        answer(&url, self.http.post(&url).timeout(patience)).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        url: &str,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> anyhow::Result<T> {
        let url = format!("{}{path}", base(url));
        answer(&url, self.http.post(&url).timeout(patience).json(body)).await
    }
}

fn base(url: &str) -> &str {
    url.trim_end_matches('/')
}

async fn answer<T: DeserializeOwned>(
    url: &str,
    request: reqwest::RequestBuilder,
) -> anyhow::Result<T> {
    let response = request.send().await.with_context(|| format!("ask {url}"))?;
    let status = response.status();
    let bytes = response
        .bytes()
        .await
        .with_context(|| format!("ask {url}"))?;
    if !status.is_success() {
        let text = String::from_utf8_lossy(&bytes);
        anyhow::bail!("{url} answered {status}: {}", text.trim());
    }
    serde_json::from_slice(&bytes).with_context(|| format!("answer of {url}"))
}

impl Transport for Peers {
    fn call(
        &self,
        to: NodeId,
        member: &Member,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, io::Result<Bytes>> {
        let url = format!("{}/v1/raft", base(&member.url));
        let mut call = Call {
            peers: self.clone(),
            to,
            url: member.url.clone(),
            within: timeout,
            began: Instant::now(),
            is_answered: false,
        };
        Box::pin(async move {
            let response = self.http.post(&url).timeout(timeout).body(request);
            let response = response.send().await.map_err(io::Error::other)?;
            let response = response.error_for_status().map_err(io::Error::other)?;
            let bytes = response.bytes().await.map_err(io::Error::other)?;
            call.answered();
            Ok(bytes)
        })
    }
}
