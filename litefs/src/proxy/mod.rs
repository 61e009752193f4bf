//! The HTTP proxy in front of a program, by which any node takes any request.
//!
//! ```text
//! client ─▶ server ─▶ inbound ─▶ handle ─┬─▶ program                         rules: what becomes of it
//!             ▲                          └─▶ primary's node: api ─▶ handle    token, level: what a read is promised
//!             └──────── upgrade ◀── answer + position ◀──────────┘            positions, confirm: when it is
//! ```
//! A client carries along what it has seen, as a cookie or a header ([`token`]); a read waits for it, or goes to the primary.
//! `/v1/wait` is the same for clients that do not speak HTTP to the program. docs/proxy.md; DESIGN section 8.

mod answer;
mod api;
mod body;
mod confirm;
#[cfg(test)]
mod fake;
mod handle;
mod headers;
mod inbound;
mod level;
mod links;
mod port;
mod positions;
mod rules;
mod server;
pub mod token;
mod upgrade;

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response};

use crate::config;
use crate::http::Forwarded;
use answer::Refusal;
use handle::Proxy;
use links::Link;
use parking_lot::Mutex;
use positions::Positions;
use server::Running;

pub use api::{Waited, check_pos, wait_path};
pub use level::{Consistency, ConsistencyError};
pub use port::{Primary, ProxyNode, Waiting};
pub use rules::PathPattern;

/// How often an idle connection to the primary is used, so that it is there when a write comes.
const WARM: Duration = Duration::from_secs(3);

/// A node's proxy, if it has one, and what of it every node has.
pub struct Front {
    proxy: Option<Arc<Proxy>>,
    positions: Arc<Positions>,
    nodes: Link,
    running: Mutex<Option<Running>>,
}

impl Front {
    /// Makes it; nothing is bound yet.
    #[must_use]
    pub fn new(node: Arc<dyn ProxyNode>, config: Option<&config::Proxy>) -> Arc<Front> {
        let positions = Positions::new(node);
        let nodes = Link::to_nodes();
        let proxy =
            config.map(|config| Proxy::new(config.clone(), positions.clone(), nodes.clone()));
        Arc::new(Front {
            proxy: proxy.map(Arc::new),
            positions,
            nodes,
            running: Mutex::new(None),
        })
    }

    /// Routes of the node's port.
    pub fn router(&self) -> Router {
        api::router(self.positions.clone(), self.nodes.clone())
    }

    /// Takes clients from now on, if there is a proxy.
    ///
    /// # Errors
    /// Its address cannot be bound.
    pub async fn start(&self) -> anyhow::Result<()> {
        let Some(proxy) = &self.proxy else {
            return Ok(());
        };
        let running = server::start(proxy.clone()).await?;
        *self.running.lock() = Some(running);
        tokio::spawn(keep_warm(Arc::downgrade(proxy)));
        Ok(())
    }

    /// Takes no more clients, and gives their requests a moment.
    pub async fn stop(self: Arc<Self>) {
        let running = self.running.lock().take();
        if let Some(running) = running {
            running.stop().await;
        }
    }
}

impl Forwarded for Front {
    fn takes(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(headers::FORWARDED_BY_NODE)
    }

    fn handle(
        &self,
        request: Request<Incoming>,
    ) -> Pin<Box<dyn Future<Output = Response<Body>> + Send>> {
        let proxy = self.proxy.clone();
        Box::pin(async move {
            let answer = match proxy {
                Some(proxy) => proxy.serve_for_node(request).await,
                None => Refusal::NoProxy.answer(),
            };
            answer.map(Body::new)
        })
    }
}

/// Asks the primary now and then where it is: a connection is there when a write comes, and what `bounded` goes by.
async fn keep_warm(proxy: Weak<Proxy>) {
    loop {
        {
            let Some(proxy) = proxy.upgrade() else {
                return;
            };
            proxy.look_at_primary().await;
        }
        tokio::time::sleep(WARM).await;
    }
}
