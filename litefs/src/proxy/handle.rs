//! What the proxy does with a request.
//!
//! ```text
//! passthrough ─────────────────────────────────────────────▶ program
//! read ─▶ is this node current enough? ──yes───────────────▶ program
//!             └─no, and waiting did not help─┐
//! write ─▶ is this node primary? ──yes───────┼─────────────▶ program
//!             └─no───────────────────────────┴▶ primary's node ─▶ its program       forwarded once, never twice
//! ```
//!
//! What holds:
//! - INV-PROXY-1: a request that may change something reaches a program at most once. It is sent again only if nobody listened,
//!   or if a node says with a mark that its program has not seen it.
//! - INV-PROXY-2: the position that an answer carries contains whatever the program had committed or read when it answered.
//! - INV-PROXY-3: a token is lowered only by the primary, in a tenure not older than the token's.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode};

use super::answer::{Answer, Refusal, bad_body, bad_request, no_primary, outcome_unknown, say};
use super::body::AnswerBody;
use super::confirm::Confirm;
use super::headers::{self, CONSISTENCY, CONSISTENCY_COOKIE, POSITION};
use super::inbound::Inbound;
use super::level::Consistency;
use super::links::{self, Link, SendError};
use super::port::{Primary, ProxyNode};
use super::positions::Positions;
use super::rules::{Class, classify};
use super::token::{COOKIE, Token};
use super::upgrade;
use crate::config;
use crate::config::Redirect;
use crate::replication::DbName;

/// How long a program that does not listen yet is waited for, and how often it is tried, as in LiteFS.
const TARGET_PATIENCE: Duration = Duration::from_secs(30);
const TARGET_PACE: Duration = Duration::from_millis(100);
/// Tries of a request that breaks off, where it is safe to repeat.
const SAFE_TRIES: u32 = 3;
/// Pause before the primary is tried again, unless another is known sooner.
const RETRY: Duration = Duration::from_millis(25);
/// How often is looked whether there is one, beside being told.
const UNKNOWN: Duration = Duration::from_millis(200);
/// A read that has waited so long has the primary asked whether it waits in vain.
const DOUBT: Duration = Duration::from_millis(100);

/// The proxy of a node.
pub(super) struct Proxy {
    pub(super) config: config::Proxy,
    node: Arc<dyn ProxyNode>,
    positions: Arc<Positions>,
    confirm: Confirm,
    target: Link,
    nodes: Link,
}

/// What became of a request that this node's program should answer.
enum Local {
    Answered(Response<Incoming>),
    /// Nobody answers; this is what to say.
    Failed(Answer),
    /// This node is not primary any more, and the program has not seen the request.
    NotPrimary,
}

/// What is answered.
enum Kind {
    Write,
    Read {
        /// Where this node was when it began.
        before: Token,
        /// The client is to find on any node what it saw here.
        is_followed: bool,
    },
}

/// Whether this node may answer a read.
enum Current {
    Yes,
    /// As long as it was primary in this tenure until the program answered.
    InTenure(u64),
    No,
}

impl Proxy {
    pub(super) fn new(config: config::Proxy, positions: Arc<Positions>, nodes: Link) -> Proxy {
        Proxy {
            node: positions.node.clone(),
            confirm: Confirm::new(
                positions.clone(),
                nodes.clone(),
                config.databases.clone(),
                config.only.clone(),
            ),
            config,
            positions,
            target: Link::to_target(),
            nodes,
        }
    }

    /// Asks the primary where it is, if it is another node.
    pub(super) async fn look_at_primary(&self) {
        if let Primary::At(_) = self.node.primary() {
            // Who does not answer is found out by who needs it.
            let _ = self.confirm.ask(Instant::now()).await;
        }
    }

    /// Answers a client.
    pub(super) async fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
        client: IpAddr,
    ) -> Answer {
        let inbound = Inbound::from_client(request, client, self.config.read_timeout);
        let mut inbound = match inbound {
            Ok(inbound) => inbound,
            Err(answer) => return *answer,
        };
        let (method, path, started) = (
            inbound.method.clone(),
            inbound.path.clone(),
            inbound.started,
        );
        let class = classify(
            &inbound.method,
            inbound.path.path(),
            &self.config.passthrough,
            &self.config.always_forward,
        );
        let answer = match class {
            Class::Passthrough => self.pass_through(&mut inbound).await,
            Class::Health => self.health(),
            Class::Read | Class::Write => match self.wishes(&inbound) {
                Ok((token, _)) if class == Class::Write => self.write(&mut inbound, token).await,
                Ok((token, level)) => self.read(&mut inbound, token, level).await,
                Err(answer) => *answer,
            },
        };
        if self.config.debug {
            tracing::info!(
                %method, path = path.path(), ?class, status = answer.status().as_u16(),
                elapsed_us = started.elapsed().as_micros(), "proxied"
            );
        }
        self.in_time(answer, started)
    }

    /// Answers a node, if this one is primary; forwards nothing.
    pub(super) async fn serve_for_node(&self, request: Request<Incoming>) -> Answer {
        let (mut inbound, cluster) = match Inbound::from_node(request, self.config.read_timeout) {
            Ok(inbound) => inbound,
            Err(answer) => return *answer,
        };
        if self.node.cluster_id().is_none_or(|ours| ours != cluster) {
            return Refusal::OtherCluster.answer();
        }
        let (token, level) = match self.wishes(&inbound) {
            Ok(wishes) => wishes,
            Err(answer) => return *answer,
        };
        let class = classify(
            &inbound.method,
            inbound.path.path(),
            &[],
            &self.config.always_forward,
        );
        let tenure = match (class, level) {
            (Class::Read, Consistency::Strong | Consistency::Bounded(_)) => {
                match self.node.tenure() {
                    Some(epoch) => Some(epoch),
                    None => return Refusal::NotPrimary.answer(),
                }
            }
            _ => None,
        };
        let started = inbound.started;
        let kind = self.kind(class, level, &token);
        let answer = match self.to_target(&inbound, true).await {
            Local::NotPrimary => Refusal::NotPrimary.answer(),
            Local::Failed(answer) => answer,
            // It was a read, so whoever forwarded it may ask another.
            Local::Answered(_) if tenure.is_some() && self.node.tenure() != tenure => {
                Refusal::NotPrimary.answer()
            }
            Local::Answered(answer) => self.finish(&mut inbound, answer, token, kind).await,
        };
        self.in_time(answer, started)
    }

    fn in_time(&self, answer: Answer, started: Instant) -> Answer {
        match self.config.write_timeout {
            None => answer,
            Some(timeout) => answer.map(|body| body.until(Some((started + timeout).into()))),
        }
    }

    /// What the client has seen, and what it wants to be promised.
    fn wishes(&self, inbound: &Inbound) -> Result<(Token, Consistency), Box<Answer>> {
        let only = self.config.only.as_ref();
        let mut token = Token::default();
        // A cookie is a browser's, whose user cannot help what is in it.
        if let Some(cookie) = headers::cookie(&inbound.headers, COOKIE)
            && let Ok(seen) = Token::parse(cookie, only)
        {
            token = seen;
        }
        for value in inbound.headers.get_all(POSITION) {
            let text = value.to_str().unwrap_or("?");
            match Token::parse(text, only) {
                Ok(seen) => token.merge(seen),
                Err(error) => {
                    return Err(Box::new(bad_request(&format!("Litefs-Position: {error}"))));
                }
            }
        }
        // Databases that are no business of this proxy's can make nobody wait.
        token.retain(|db, _| match only {
            Some(only) => db == only,
            None => self.config.databases.matches(db),
        });
        let level = match inbound.headers.get(CONSISTENCY) {
            Some(value) => match value.to_str().unwrap_or("?").trim().parse() {
                Ok(level) => level,
                Err(error) => {
                    let error = format!("Litefs-Consistency: {error}");
                    return Err(Box::new(bad_request(&error)));
                }
            },
            None => headers::cookie(&inbound.headers, CONSISTENCY_COOKIE)
                .and_then(|text| text.parse().ok())
                .unwrap_or(self.config.consistency),
        };
        Ok((token, level))
    }

    fn health(&self) -> Answer {
        let lag = self.node.lag_ms();
        let limit = self.config.max_lag.map(|limit| limit.as_millis());
        let is_late = limit
            .zip(lag)
            .is_some_and(|(limit, lag)| u128::from(lag.unsigned_abs()) > limit);
        let text = match (is_late, lag) {
            (true, Some(lag)) => format!("lag is {lag} ms, more than proxy.max-lag\n"),
            _ => "OK\n".to_owned(),
        };
        let mut answer = Response::new(AnswerBody::ours(text));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if is_late {
            *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        answer
    }

    async fn pass_through(&self, inbound: &mut Inbound) -> Answer {
        match self.to_target(inbound, false).await {
            Local::Answered(answer) => upgrade::pass(inbound, answer, None),
            Local::Failed(answer) => answer,
            Local::NotPrimary => no_primary(false),
        }
    }

    async fn read(&self, inbound: &mut Inbound, token: Token, level: Consistency) -> Answer {
        let class = Class::Read;
        loop {
            let tenure = match self.make_current(inbound.started, &token, level).await {
                Current::Yes => None,
                Current::InTenure(epoch) => Some(epoch),
                Current::No => return self.forward(inbound, token, class, level).await,
            };
            let kind = self.kind(class, level, &token);
            let answer = match self.to_target(inbound, false).await {
                Local::Answered(answer) => answer,
                Local::Failed(answer) => return answer,
                Local::NotPrimary => return no_primary(true),
            };
            if tenure.is_some() && self.node.tenure() != tenure {
                // Another may have been primary when the program looked. What it said is not passed on.
                if self.is_over(inbound) || !inbound.body.is_whole() {
                    return no_primary(true);
                }
                continue;
            }
            return self.finish(inbound, answer, token, kind).await;
        }
    }

    async fn write(&self, inbound: &mut Inbound, token: Token) -> Answer {
        self.forward(inbound, token, Class::Write, Consistency::Session)
            .await
    }

    /// Brings this node to where a read may be answered by it.
    async fn make_current(&self, started: Instant, token: &Token, level: Consistency) -> Current {
        let deadline = started + self.config.wait_timeout;
        let wait = async {
            match level {
                Consistency::Eventual => Current::Yes,
                Consistency::Session => self.wait_for(token).await,
                Consistency::Bounded(_) | Consistency::Strong
                    if self.node.primary() == Primary::Here =>
                {
                    match self.node.tenure() {
                        Some(epoch) => Current::InTenure(epoch),
                        None => Current::No,
                    }
                }
                Consistency::Bounded(bound) => {
                    if self.confirm.is_within(bound, Instant::now()) {
                        return Current::Yes;
                    }
                    match self.confirm.ask(started).await {
                        _ if self.confirm.is_within(bound, Instant::now()) => Current::Yes,
                        Some(evidence) => {
                            let reached = self.positions.reach(&evidence.token);
                            match tokio::time::timeout(bound, reached).await {
                                Ok(()) => Current::Yes,
                                Err(_) => Current::No,
                            }
                        }
                        None => Current::No,
                    }
                }
                Consistency::Strong => match self.confirm.ask(started).await {
                    Some(evidence) => {
                        self.positions.reach(&evidence.token).await;
                        Current::Yes
                    }
                    None => Current::No,
                },
            }
        };
        tokio::time::timeout_at(deadline.into(), wait)
            .await
            .unwrap_or(Current::No)
    }

    /// Waits until this node has all of a token, or it is plain that it will not have it soon.
    async fn wait_for(&self, token: &Token) -> Current {
        if self.positions.has(token) {
            return Current::Yes;
        }
        let doubt = async {
            let mut pause = DOUBT;
            loop {
                tokio::time::sleep(pause).await;
                pause *= 2;
                // What the primary does not have either comes to nobody.
                let Some(evidence) = self.confirm.ask(Instant::now()).await else {
                    continue;
                };
                let is_lost = token.iter().any(|(db, seen)| match evidence.token.get(db) {
                    Some(there) => seen.is_lost(there),
                    None => seen.txid.0 > 0,
                });
                if is_lost {
                    return;
                }
            }
        };
        let mut doubt = std::pin::pin!(doubt);
        loop {
            if self.is_primary_for(token).await {
                return Current::Yes;
            }
            let changed = self.node.primary_changed();
            tokio::select! {
                () = self.positions.reach(token) => return Current::Yes,
                () = &mut doubt => return Current::No,
                () = changed => {}
            }
        }
    }

    /// Whether this node is the primary, and so is right about a token that it does not have.
    async fn is_primary_for(&self, token: &Token) -> bool {
        let Some(tenure) = self.node.tenure() else {
            return false;
        };
        let names: Vec<DbName> = token.iter().map(|(db, _)| db.clone()).collect();
        self.positions.capture(&names).await;
        let is_newer = |epoch: Option<u64>| epoch.is_some_and(|epoch| epoch > tenure);
        !token.iter().any(|(_, seen)| is_newer(seen.epoch)) && self.node.tenure() == Some(tenure)
    }

    fn is_over(&self, inbound: &Inbound) -> bool {
        inbound.started.elapsed() >= self.config.primary_redirect_timeout + self.config.wait_timeout
    }

    /// Has the primary answer, whoever that is.
    async fn forward(
        &self,
        inbound: &mut Inbound,
        token: Token,
        class: Class,
        level: Consistency,
    ) -> Answer {
        let is_read = class == Class::Read;
        let deadline = Instant::now() + self.config.primary_redirect_timeout;
        loop {
            let changed = self.node.primary_changed();
            match self.node.primary() {
                Primary::Here => {
                    let kind = self.kind(class, level, &token);
                    match self.to_target(inbound, true).await {
                        Local::Answered(answer) => {
                            return self.finish(inbound, answer, token, kind).await;
                        }
                        Local::Failed(answer) => return answer,
                        Local::NotPrimary => {}
                    }
                }
                Primary::At(_) if self.config.redirect == Redirect::FlyReplay => {
                    if let Some(answer) = self.replay() {
                        return answer;
                    }
                }
                Primary::At(url) => match self.to_node(inbound, &url).await {
                    Ok(answer) => return answer,
                    Err(why) => tracing::debug!(%url, why, "the primary is tried again"),
                },
                Primary::Unknown => {}
            }
            let now = Instant::now();
            if now >= deadline {
                return no_primary(is_read);
            }
            if !inbound.body.is_whole() {
                return say(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "the primary changed while the body of this request came in; nothing of it was done",
                    "send it again",
                );
            }
            let pause = match self.node.primary() {
                // A handoff that came to nothing is told to nobody.
                Primary::Unknown => UNKNOWN.min(deadline - now),
                _ => RETRY.min(deadline - now),
            };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn replay(&self) -> Option<Answer> {
        let instance = self.node.primary_hostname()?;
        let value = HeaderValue::try_from(format!("instance={instance}")).ok()?;
        let mut answer = Response::new(AnswerBody::ours(""));
        answer.headers_mut().insert("fly-replay", value);
        Some(answer)
    }

    /// Hands a request to the node that should be primary. An error is a reason to try again: its program has not seen it, or
    /// may see it twice.
    async fn to_node(&self, inbound: &mut Inbound, url: &str) -> Result<Answer, String> {
        let cluster = self.node.cluster_id().unwrap_or_default();
        let authority = links::authority_of(url).ok_or("its address is no URL")?;
        let sent = self
            .nodes
            .send(inbound.for_node(&authority, &cluster))
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(SendError::Broken(why)) => {
                if let Some(fault) = inbound.body.fault() {
                    return Ok(bad_body(fault));
                }
                return match inbound.is_safe() && inbound.body.is_whole() {
                    true => Err(why),
                    false => Ok(outcome_unknown("the primary", &why)),
                };
            }
            Err(error) => return Err(error.why().to_owned()),
        };
        let who = self
            .node
            .primary_hostname()
            .unwrap_or_else(|| url.to_owned());
        match Refusal::of(&answer) {
            None => Ok(upgrade::pass(inbound, answer, None)),
            Some(Refusal::NotPrimary) => Err("it is not the primary".to_owned()),
            Some(Refusal::NoProxy) => Ok(say(
                StatusCode::BAD_GATEWAY,
                &format!(
                    "the primary, {who}, has no proxy, so that nothing can be forwarded to its program"
                ),
                "set proxy.target and proxy.addr in the litefs.yml of every node that may be primary",
            )),
            Some(Refusal::OtherCluster) => Ok(say(
                StatusCode::BAD_GATEWAY,
                &format!("the node at {url} is of another cluster"),
                "check lease.advertise-url of all nodes",
            )),
        }
    }

    /// Hands a request to this node's program; with `as_primary` only as long as this node is primary.
    async fn to_target(&self, inbound: &Inbound, as_primary: bool) -> Local {
        let target = self.config.target.authority();
        let deadline = Instant::now() + TARGET_PATIENCE;
        let mut broken = 0;
        loop {
            if as_primary && self.node.primary() != Primary::Here {
                return Local::NotPrimary;
            }
            let error = match self.target.send(inbound.for_target(target)).await {
                Ok(mut answer) => {
                    // Only nodes say so.
                    answer.headers_mut().remove(headers::REFUSED);
                    return Local::Answered(answer);
                }
                Err(error) => error,
            };
            match &error {
                SendError::Refused(_) if Instant::now() < deadline => {
                    tokio::time::sleep(TARGET_PACE).await;
                }
                SendError::Refused(why) | SendError::Connect(why) => {
                    return Local::Failed(say(
                        StatusCode::BAD_GATEWAY,
                        &format!(
                            "the program at {target} cannot be reached ({why}); nothing of this request was done"
                        ),
                        "see whether it runs, and listens at proxy.target",
                    ));
                }
                SendError::Broken(why) => {
                    if let Some(fault) = inbound.body.fault() {
                        return Local::Failed(bad_body(fault));
                    }
                    broken += 1;
                    if !inbound.is_safe() || broken >= SAFE_TRIES || !inbound.body.is_whole() {
                        return Local::Failed(outcome_unknown("the program", why));
                    }
                }
            }
        }
    }

    /// Where this node is, as far as it concerns a client.
    fn here(&self, caller: &Token) -> Token {
        let mut names = self
            .positions
            .names(&self.config.databases, self.config.only.as_ref());
        if self.config.only.is_none() {
            for (db, _) in caller.iter() {
                if !names.contains(db) {
                    names.push(db.clone());
                }
            }
        }
        self.positions.token(&names)
    }

    fn kind(&self, class: Class, level: Consistency, caller: &Token) -> Kind {
        match class {
            Class::Write => Kind::Write,
            _ => Kind::Read {
                before: self.here(caller),
                is_followed: level != Consistency::Eventual,
            },
        }
    }

    /// Gives the client the position with which this node answered (INV-PROXY-2).
    async fn finish(
        &self,
        inbound: &mut Inbound,
        answer: Response<Incoming>,
        caller: Token,
        kind: Kind,
    ) -> Answer {
        let tenure = self.node.tenure();
        let names = self
            .positions
            .names(&self.config.databases, self.config.only.as_ref());
        if tenure.is_some() {
            self.positions.capture(&names).await;
        }
        let here = self.here(&caller);
        let mut token = caller.clone();
        for (db, seen) in here.iter() {
            let is_right = tenure.is_some_and(|t| {
                caller
                    .get(db)
                    .and_then(|c| c.epoch)
                    .is_none_or(|epoch| epoch <= t)
            });
            match is_right {
                true => token.set(db.clone(), *seen), // INV-PROXY-3
                false => token.advance(db.clone(), *seen),
            }
        }
        if let Some(tenure) = tenure {
            // What the primary has never heard of was of a branch that is gone.
            token.retain(|db, seen| {
                self.node.standing(db).is_some() || seen.epoch.is_some_and(|epoch| epoch > tenure)
            });
        }
        let is_news = token != caller;
        let (is_write, has_moved, is_followed) = match &kind {
            Kind::Write => (true, true, true),
            Kind::Read {
                before,
                is_followed,
            } => (false, *before != here, *is_followed),
        };
        let mut answer = upgrade::pass(inbound, answer, is_write.then(|| self.node.clone()));
        let text = token.to_text();
        if text.is_empty() {
            return answer;
        }
        let is_shared = headers::is_for_shared_caches(answer.headers());
        let wants_cookie = is_write || (is_news && (has_moved || (is_followed && !is_shared)));
        if wants_cookie && let Some(cookie) = headers::token_cookie(&text) {
            answer.headers_mut().append(header::SET_COOKIE, cookie);
        }
        if let Ok(value) = HeaderValue::try_from(text) {
            answer.headers_mut().insert(POSITION, value);
        }
        answer
    }
}
