//! Answers on their way back, and connections that become something else: WebSockets above all.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;

use super::answer::{Answer, say};
use super::body::AnswerBody;
use super::headers;
use super::inbound::Inbound;
use super::port::{Primary, ProxyNode};

/// Passes an answer on. A connection that is upgraded by it, and may be written through, ends when `as_primary` is primary no
/// more: the client connects again, and comes to the node that is.
pub(super) fn pass(
    inbound: &mut Inbound,
    mut answer: Response<Incoming>,
    as_primary: Option<Arc<dyn ProxyNode>>,
) -> Answer {
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        headers::strip_hop_by_hop(answer.headers_mut());
        if !inbound.body.is_done() && !inbound.is_http2 {
            // Without a word, whoever sent it would send its next on a connection that is about to be closed.
            let close = HeaderValue::from_static("close");
            answer.headers_mut().insert(header::CONNECTION, close);
        }
        return answer.map(AnswerBody::theirs);
    }
    let Some(client) = inbound.upgrade.take() else {
        return say(
            StatusCode::BAD_GATEWAY,
            "the program changed to a protocol that nobody asked for",
            "see the program's log",
        );
    };
    let server = hyper::upgrade::on(&mut answer);
    let hop = headers::strip_hop_by_hop(answer.headers_mut());
    hop.restore(answer.headers_mut());
    tokio::spawn(async move {
        let (client, server) = match tokio::try_join!(client, server) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "a connection left before it was upgraded");
                return;
            }
        };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let ended = async {
            let Some(node) = as_primary else {
                return std::future::pending().await;
            };
            loop {
                let changed = node.primary_changed();
                if node.primary() != Primary::Here {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            // How it ended is for the two to know.
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
            () = ended => {}
        }
    });
    answer.map(|_| AnswerBody::ours(""))
}
