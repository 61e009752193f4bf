//! Answers of the proxy itself: each says what is wrong and what to do, as those of the node's API do.

use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

use super::body::{AnswerBody, Fault};
use super::headers::REFUSED;

/// An answer on its way to a client.
pub(super) type Answer = Response<AnswerBody>;

/// Why a node does not give a forwarded request to its program, which has seen nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is not the primary, or not any more.
    NotPrimary,
    /// It has no proxy.
    NoProxy,
    /// It is of another cluster.
    OtherCluster,
}

impl Refusal {
    const ALL: [Refusal; 3] = [Refusal::NotPrimary, Refusal::NoProxy, Refusal::OtherCluster];

    fn name(self) -> &'static str {
        match self {
            Refusal::NotPrimary => "not-primary",
            Refusal::NoProxy => "no-proxy",
            Refusal::OtherCluster => "other-cluster",
        }
    }

    /// Reads the mark of an answer.
    pub(super) fn of<B>(answer: &Response<B>) -> Option<Refusal> {
        let mark = answer.headers().get(REFUSED)?;
        Refusal::ALL
            .into_iter()
            .find(|r| mark.as_bytes() == r.name().as_bytes())
    }

    /// The answer of the node that refuses.
    pub(super) fn answer(self) -> Answer {
        let (what, remedy) = match self {
            Refusal::NotPrimary => ("this node is not the primary", "ask the one that is"),
            Refusal::NoProxy => (
                "this node has no proxy",
                "set proxy.target and proxy.addr in its litefs.yml, as on the other nodes",
            ),
            Refusal::OtherCluster => (
                "this node is of another cluster",
                "check lease.advertise-url",
            ),
        };
        let mut answer = say(StatusCode::SERVICE_UNAVAILABLE, what, remedy);
        answer
            .headers_mut()
            .insert(REFUSED, HeaderValue::from_static(self.name()));
        answer
    }
}

/// An answer in our own words.
pub(super) fn say(status: StatusCode, error: &str, action: &str) -> Answer {
    let text = serde_json::json!({ "error": error, "action": action }).to_string();
    let mut answer = Response::new(AnswerBody::ours(text + "\n"));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    answer
}

/// The request was refused as it stands.
pub(super) fn bad_request(what: &str) -> Answer {
    let mut answer = say(
        StatusCode::BAD_REQUEST,
        what,
        "send a request as RFC 9110 and 9112 have it",
    );
    // Who sent one such may send its next where no request begins.
    answer
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// The body of the request did not come in whole: the program has seen a request that broke off.
pub(super) fn bad_body(fault: Fault) -> Answer {
    let mut answer = match fault {
        Fault::Broken => bad_request("the body of the request broke off, or is not made of chunks"),
        Fault::Late => say(
            StatusCode::REQUEST_TIMEOUT,
            "the request took longer to arrive than proxy.read-timeout",
            "send it faster, or in parts",
        ),
    };
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(header::CONNECTION, close);
    answer
}

/// Nothing of the request was done.
pub(super) fn no_primary(is_read: bool) -> Answer {
    match is_read {
        true => say(
            StatusCode::GATEWAY_TIMEOUT,
            "this node does not have what this client has seen, and no primary is known that has",
            "try again; or ask for less with the header Litefs-Consistency: eventual",
        ),
        false => say(
            StatusCode::SERVICE_UNAVAILABLE,
            "no primary takes writes at the moment; nothing of this request was done",
            "send it again in a moment; see `litefs status` if it lasts",
        ),
    }
}

/// Nobody knows whether the request was done.
pub(super) fn outcome_unknown(whom: &str, why: &str) -> Answer {
    say(
        StatusCode::BAD_GATEWAY,
        &format!(
            "the connection to {whom} broke off before there was an answer ({why}): whether this request was done is not known"
        ),
        "look whether it was before it is sent again",
    )
}
