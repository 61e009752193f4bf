//! The proxy's own port: HTTP/1.1, and HTTP/2 for clients that begin with it.
//!
//! What a client may cost: a descriptor and a few kilobytes while it is silent; headers of 64 KiB; and of its body what is on
//! its way. Who is slower than the timeouts allow is cut off.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::bail;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::body::AnswerBody;
use super::handle::Proxy;
use crate::config::ListenAddr;

/// Connections at a time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 32_768;
/// Longest request line and headers.
const MAX_HEAD_LEN: usize = 64 << 10;
const MAX_HEADERS: usize = 200;
/// Requests at a time on one connection of HTTP/2.
const MAX_STREAMS: u32 = 250;
/// How often a silent client of HTTP/2 is asked whether it is there.
const PING: Duration = Duration::from_secs(20);
/// What a shutdown gives requests under way.
const DRAIN: Duration = Duration::from_secs(5);
/// With what a client of HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The proxy while it serves; [`Running::stop`] ends it.
pub(super) struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    /// Takes no more connections, and gives requests under way a moment.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        // A task that panicked has ended.
        let _ = self.task.await;
    }
}

/// Binds the address and serves.
///
/// # Errors
/// The address cannot be bound.
pub(super) async fn start(proxy: Arc<Proxy>) -> anyhow::Result<Running> {
    let listener = bind(&proxy.config.addr).await?;
    let stop = CancellationToken::new();
    let task = tokio::spawn(serve(proxy, listener, stop.clone()));
    Ok(Running { stop, task })
}

async fn bind(addr: &ListenAddr) -> anyhow::Result<TcpListener> {
    let mut why = "no address".to_owned();
    for (host, port) in addr.bind_hosts() {
        match TcpListener::bind((host.as_str(), port)).await {
            Ok(listener) => {
                tracing::info!(proxy = %listener.local_addr()?, "http proxy");
                return Ok(listener);
            }
            Err(error) => why = error.to_string(),
        }
    }
    bail!("cannot listen on proxy.addr {addr}: {why}; stop what uses it, or set another proxy.addr")
}

async fn serve(proxy: Arc<Proxy>, listener: TcpListener, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Each connection holds one more of it.
    let served = Arc::new(());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        let Ok((slot, tcp, client)) = accepted else {
            tracing::error!(
                "the proxy's listener failed; no client can connect: restart this node"
            );
            break;
        };
        let (proxy, stop, alive) = (proxy.clone(), stop.clone(), served.clone());
        tokio::spawn(async move {
            let _ = (&slot, &alive);
            connection(proxy, tcp, client, stop).await;
            drop((slot, alive));
        });
    }
    drop(listener);
    let all = async {
        while Arc::strong_count(&served) > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(DRAIN, all).await.is_err() {
        tracing::warn!("requests through the proxy that are still under way are cut off");
    }
}

type Slot = tokio::sync::OwnedSemaphorePermit;

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(Slot, TcpStream, IpAddr)> {
    let slot = slots
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((tcp, from)) => return Ok((slot, tcp, from.ip())),
            Err(error) if is_passing(&error) => {
                tracing::warn!(%error, "the proxy cannot accept a connection, trying again");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    ) || matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS)
    )
}

async fn connection(proxy: Arc<Proxy>, tcp: TcpStream, client: IpAddr, stop: CancellationToken) {
    // A client that cannot have it is served all the same.
    let _ = tcp.set_nodelay(true);
    let limits = Limits {
        head: proxy.config.read_header_timeout,
        idle: proxy.config.idle_timeout,
    };
    let beginning = begins_with_http2(&tcp);
    let is_http2 = tokio::select! {
        beginning = within(limits.head, beginning) => match beginning {
            Some(Ok(is_http2)) => is_http2,
            _ => return,
        },
        () = stop.cancelled() => return,
    };
    let activity = Arc::new(Activity::new(is_http2));
    let io = TokioIo::new(Watched {
        tcp,
        activity: activity.clone(),
    });
    let service = service_fn({
        let activity = activity.clone();
        move |request: Request<Incoming>| {
            let busy = Busy::new(activity.clone());
            let proxy = proxy.clone();
            async move {
                let answer = proxy.serve(request, client).await;
                Ok::<Response<AnswerBody>, std::convert::Infallible>(
                    answer.map(|body| body.holding(busy)),
                )
            }
        }
    });
    let watch = watch(activity, limits);
    if is_http2 {
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_header_list_size(u32::try_from(MAX_HEAD_LEN).unwrap_or(u32::MAX))
            .max_concurrent_streams(MAX_STREAMS)
            .keep_alive_interval(PING);
        let http = pin!(builder.serve_connection(io, service));
        run(http, |http| http.graceful_shutdown(), watch, stop).await;
    } else {
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .max_buf_size(MAX_HEAD_LEN)
            .max_header_size(MAX_HEAD_LEN)
            .max_headers(MAX_HEADERS);
        let http = pin!(builder.serve_connection(io, service).with_upgrades());
        run(http, |http| http.graceful_shutdown(), watch, stop).await;
    }
}

/// Serves a connection to its end, or until it is too slow or the proxy stops.
async fn run<F: Future<Output = Result<(), E>>, E: std::fmt::Display>(
    mut http: Pin<&mut F>,
    end: impl Fn(Pin<&mut F>),
    watch: impl Future<Output = TooLong>,
    stop: CancellationToken,
) {
    let ended = tokio::select! {
        ended = &mut http => Some(ended),
        which = watch => match which {
            // Half a request: nothing is lost with it.
            TooLong::Head => return,
            TooLong::Idle => None,
        },
        () = stop.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            end(http.as_mut());
            match tokio::time::timeout(DRAIN, http).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection to the proxy ended");
    }
}

async fn within<T>(limit: Option<Duration>, what: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, what).await.ok(),
        None => Some(what.await),
    }
}

/// Looks at what the client sends first, and leaves it where it is.
async fn begins_with_http2(tcp: &TcpStream) -> io::Result<bool> {
    let mut first = [0; PREFACE.len()];
    loop {
        let n = tcp.peek(&mut first).await?;
        if n == 0 || !PREFACE.starts_with(&first[..n]) {
            return Ok(false);
        }
        if n == PREFACE.len() {
            return Ok(true);
        }
        // The socket is readable all the while.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    head: Option<Duration>,
    idle: Option<Duration>,
}

/// What a connection is at.
#[derive(Debug)]
struct Activity {
    state: Mutex<State>,
    is_http2: bool,
}

#[derive(Debug)]
struct State {
    in_flight: usize,
    /// Since when headers are on their way.
    head_since: Option<Instant>,
    idle_since: Instant,
}

enum TooLong {
    Head,
    Idle,
}

impl Activity {
    fn new(is_http2: bool) -> Activity {
        let now = Instant::now();
        Activity {
            state: Mutex::new(State {
                in_flight: 0,
                head_since: (!is_http2).then_some(now),
                idle_since: now,
            }),
            is_http2,
        }
    }

    fn received(&self) {
        if self.is_http2 {
            return; // pings, among others
        }
        let mut state = self.state.lock();
        if state.in_flight == 0 && state.head_since.is_none() {
            state.head_since = Some(Instant::now());
        }
    }

    /// Returns what takes too long, or when to look again.
    fn judge(&self, limits: Limits, now: Instant) -> Result<Instant, TooLong> {
        let state = self.state.lock();
        let look = now
            + limits
                .head
                .or(limits.idle)
                .unwrap_or(Duration::from_secs(60));
        if state.in_flight > 0 {
            return Ok(look);
        }
        let (since, limit, what) = match state.head_since {
            Some(since) => (since, limits.head, TooLong::Head),
            None => (state.idle_since, limits.idle, TooLong::Idle),
        };
        match limit.map(|limit| since + limit) {
            Some(end) if end <= now => Err(what),
            Some(end) => Ok(end.min(look)),
            None => Ok(look),
        }
    }
}

/// Ends when a client takes too long.
async fn watch(activity: Arc<Activity>, limits: Limits) -> TooLong {
    loop {
        match activity.judge(limits, Instant::now()) {
            Ok(at) => tokio::time::sleep_until(at.into()).await,
            Err(what) => return what,
        }
    }
}

/// A request is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Busy {
    fn new(activity: Arc<Activity>) -> Busy {
        {
            let mut state = activity.state.lock();
            state.in_flight += 1;
            state.head_since = None;
        }
        Busy(activity)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.in_flight -= 1;
        state.idle_since = Instant::now();
    }
}

/// A socket that tells when something came in.
struct Watched {
    tcp: TcpStream,
    activity: Arc<Activity>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.tcp).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.received();
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_heads_and_silence_have_limits_of_their_own() {
        let limits = Limits {
            head: Some(Duration::from_secs(1)),
            idle: Some(Duration::from_secs(5)),
        };
        let activity = Arc::new(Activity::new(false));
        let t0 = activity.state.lock().idle_since;
        let after = |s| t0 + Duration::from_secs(s);
        assert!(matches!(
            activity.judge(limits, after(2)),
            Err(TooLong::Head)
        ));
        let busy = Busy::new(activity.clone());
        assert!(activity.judge(limits, after(100)).is_ok());
        drop(busy);
        let idle = activity.state.lock().idle_since;
        assert!(
            activity
                .judge(limits, idle + Duration::from_secs(4))
                .is_ok()
        );
        assert!(matches!(
            activity.judge(limits, idle + Duration::from_secs(5)),
            Err(TooLong::Idle)
        ));
        activity.received();
        assert!(matches!(
            activity.judge(limits, idle + Duration::from_secs(4)),
            Err(TooLong::Head)
        ));
        let unlimited = Limits {
            head: None,
            idle: None,
        };
        assert!(activity.judge(unlimited, after(1000)).is_ok());
    }
}
