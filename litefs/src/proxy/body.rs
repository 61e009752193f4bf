//! Bodies on their way through, chunk by chunk: nothing is held but the first 64 KiB of a request, for a second try.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::time::Sleep;

use super::server::Busy;

/// So much of a request can be sent again.
pub(super) const KEPT_LEN: usize = 64 << 10;

pub(super) type BodyError = Box<dyn Error + Send + Sync>;

/// The body of a request: lent to one attempt after the other, for as long as nothing of it is lost.
pub(super) struct RequestBody {
    loan: Option<Arc<Mutex<Loan>>>,
    len: Option<u64>,
}

struct Loan {
    body: Incoming,
    kept: Vec<Bytes>,
    kept_len: usize,
    /// Part of it was sent and is kept no more.
    is_spent: bool,
    /// All of it came in.
    is_done: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    fault: Option<Fault>,
}

/// Why a body did not come in whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its chunks are none, or its client left.
    Broken,
    /// It took too long.
    Late,
}

impl RequestBody {
    /// Takes a body that must have come in whole after `timeout`.
    pub(super) fn new(body: Incoming, timeout: Option<Duration>) -> RequestBody {
        let len = body.size_hint().exact();
        let loan = (!body.is_end_stream()).then(|| {
            Arc::new(Mutex::new(Loan {
                body,
                kept: Vec::new(),
                kept_len: 0,
                is_spent: false,
                is_done: false,
                deadline: timeout.map(|timeout| Box::pin(tokio::time::sleep(timeout))),
                fault: None,
            }))
        });
        RequestBody { loan, len }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.loan.is_none()
    }

    /// How long it is, if that was said.
    pub(super) fn len(&self) -> Option<u64> {
        self.len
    }

    /// Whether it can be sent from its beginning.
    pub(super) fn is_whole(&self) -> bool {
        self.loan.as_ref().is_none_or(|loan| !loan.lock().is_spent)
    }

    /// Whether all of it came in. What did not stands in the way of a next request on its connection.
    pub(super) fn is_done(&self) -> bool {
        self.loan.as_ref().is_none_or(|loan| loan.lock().is_done)
    }

    /// Why it did not come in whole, if it did not.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.loan.as_ref().and_then(|loan| loan.lock().fault)
    }

    /// Lends it to an attempt, which sends nothing of it before `gate`.
    pub(super) fn lend(&self, gate: Option<Gate>) -> Lent {
        Lent {
            loan: self.loan.clone(),
            next: 0,
            left: self.len,
            gate,
        }
    }
}

/// What has to happen before a body is sent.
pub(super) type Gate = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The body of one attempt.
pub(super) struct Lent {
    loan: Option<Arc<Mutex<Loan>>>,
    /// Of what is kept, the next to be sent.
    next: usize,
    left: Option<u64>,
    gate: Option<Gate>,
}

impl Lent {
    /// A body without anything in it.
    pub(super) fn empty() -> Lent {
        Lent {
            loan: None,
            next: 0,
            left: Some(0),
            gate: None,
        }
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let Some(shared) = &this.loan else {
            return Poll::Ready(None);
        };
        if let Some(gate) = &mut this.gate {
            ready!(gate.as_mut().poll(cx));
            this.gate = None;
        }
        let mut loan = shared.lock();
        let loan = &mut *loan;
        let sent = |left: &mut Option<u64>, chunk: &Bytes| {
            *left = left.map(|left| left.saturating_sub(chunk.len() as u64));
        };
        if let Some(chunk) = loan.kept.get(this.next) {
            this.next += 1;
            sent(&mut this.left, chunk);
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if loan
            .deadline
            .as_mut()
            .is_some_and(|at| at.as_mut().poll(cx).is_ready())
        {
            loan.fault = Some(Fault::Late);
            return Poll::Ready(Some(Err(
                "the request took too long to arrive (proxy.read-timeout)".into(),
            )));
        }
        let frame = match ready!(Pin::new(&mut loan.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                loan.is_spent = true;
                loan.fault = Some(Fault::Broken);
                return Poll::Ready(Some(Err(error.into())));
            }
            None => {
                loan.is_done = true;
                return Poll::Ready(None);
            }
        };
        loan.is_done = loan.body.is_end_stream();
        match frame.data_ref() {
            Some(chunk) if !loan.is_spent && loan.kept_len + chunk.len() <= KEPT_LEN => {
                loan.kept_len += chunk.len();
                loan.kept.push(chunk.clone());
                this.next += 1;
            }
            _ => {
                loan.is_spent = true;
                loan.kept = Vec::new();
                this.next = 0;
            }
        }
        if let Some(chunk) = frame.data_ref() {
            sent(&mut this.left, chunk);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.loan {
            None => true,
            Some(loan) => {
                let loan = loan.lock();
                self.next >= loan.kept.len() && loan.body.is_end_stream()
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map(SizeHint::with_exact).unwrap_or_default()
    }
}

/// The body of an answer.
pub(super) struct AnswerBody {
    kind: Kind,
    deadline: Option<Pin<Box<Sleep>>>,
    /// The connection is in use until this is dropped.
    busy: Option<Busy>,
}

enum Kind {
    Ours(Option<Bytes>),
    Theirs(Incoming),
}

impl AnswerBody {
    /// What another server sends.
    pub(super) fn theirs(body: Incoming) -> AnswerBody {
        AnswerBody {
            kind: Kind::Theirs(body),
            deadline: None,
            busy: None,
        }
    }

    /// Words of our own.
    pub(super) fn ours(text: impl Into<Bytes>) -> AnswerBody {
        let text = text.into();
        AnswerBody {
            kind: Kind::Ours((!text.is_empty()).then_some(text)),
            deadline: None,
            busy: None,
        }
    }

    /// Must have gone out by then.
    pub(super) fn until(mut self, deadline: Option<tokio::time::Instant>) -> AnswerBody {
        self.deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
        self
    }

    /// Holds the connection busy.
    pub(super) fn holding(mut self, busy: Busy) -> AnswerBody {
        self.busy = Some(busy);
        self
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this
            .deadline
            .as_mut()
            .is_some_and(|at| at.as_mut().poll(cx).is_ready())
        {
            return Poll::Ready(Some(Err(
                "the answer took too long (proxy.write-timeout)".into()
            )));
        }
        match &mut this.kind {
            Kind::Ours(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Kind::Theirs(body) => Pin::new(body)
                .poll_frame(cx)
                .map(|frame| frame.map(|frame| frame.map_err(Into::into))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Ours(text) => text.is_none(),
            Kind::Theirs(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Ours(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Kind::Theirs(body) => body.size_hint(),
        }
    }
}
