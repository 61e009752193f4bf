//! tokio with nodes: tasks belong to the node that spawned them, which can be paused, killed, and has a clock.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use openraft::OptionalSend;
use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft::impls::TokioRuntime;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::SmallRng;

thread_local! {
    static NODE: RefCell<Option<Arc<Node>>> = const { RefCell::new(None) };
    static RNG: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
    static START: Cell<Option<tokio::time::Instant>> = const { Cell::new(None) };
}

/// One run of a node's process.
#[derive(Debug)]
pub(crate) struct Node {
    /// How fast its clock runs, in parts per million.
    pub(crate) clock_ppm: u64,
    is_dead: AtomicBool,
    is_paused: AtomicBool,
    /// How long its clock stood still, in nanoseconds.
    suspended: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl Node {
    pub(crate) fn new(clock_ppm: u64) -> Arc<Node> {
        Arc::new(Node {
            clock_ppm,
            is_dead: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            suspended: AtomicU64::new(0),
            waiting: Mutex::new(Vec::new()),
        })
    }

    /// As kill -9: no task of it is ever polled again.
    pub(crate) fn kill(&self) {
        self.is_dead.store(true, Ordering::Relaxed);
    }

    /// As SIGSTOP and SIGCONT.
    pub(crate) fn set_paused(&self, paused: bool) {
        self.is_paused.store(paused, Ordering::Relaxed);
        if !paused {
            self.waiting.lock().drain(..).for_each(Waker::wake);
        }
    }

    /// Notes that its clock stood still.
    pub(crate) fn suspended_for(&self, time: Duration) {
        self.suspended.fetch_add(nanos(time), Ordering::Relaxed);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.is_dead.load(Ordering::Relaxed)
    }

    /// Runs something as if it were part of the node's process.
    pub(crate) fn enter<T>(self: &Arc<Node>, work: impl FnOnce() -> T) -> T {
        let before = NODE.replace(Some(self.clone()));
        let result = work();
        NODE.set(before);
        result
    }

    /// Starts a task of this node.
    pub(crate) fn spawn<T: Send + 'static>(
        self: &Arc<Node>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.enter(|| SimRuntime::spawn(future))
    }
}

/// A task of a node.
struct Task<F> {
    node: Option<Arc<Node>>,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Task<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Some(node) = self.node.clone() else {
            return self.future.as_mut().poll(cx);
        };
        if node.is_dead() {
            return Poll::Pending;
        }
        if node.is_paused() {
            node.waiting.lock().push(cx.waker().clone());
            return Poll::Pending;
        }
        node.enter(|| self.future.as_mut().poll(cx))
    }
}

/// Makes this thread's randomness and clocks begin anew.
pub(crate) fn seed(seed: u64) {
    RNG.set(Some(SmallRng::seed_from_u64(seed)));
    START.set(Some(tokio::time::Instant::now()));
}

/// A moment of a node's monotonic clock, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SimInstant(u64);

/// What clocks show when a simulation starts; far enough from zero for any subtraction.
const EPOCH: u64 = 1_000_000_000_000;

fn start() -> tokio::time::Instant {
    static FALLBACK: OnceLock<tokio::time::Instant> = OnceLock::new();
    START
        .get()
        .unwrap_or_else(|| *FALLBACK.get_or_init(tokio::time::Instant::now))
}

fn ppm() -> u64 {
    NODE.with_borrow(|node| node.as_ref().map_or(1_000_000, |node| node.clock_ppm))
}

/// Returns the time by the clock of the node whose task this is.
pub(crate) fn now() -> SimInstant {
    let since = tokio::time::Instant::now().saturating_duration_since(start());
    let since = since.saturating_sub(suspended());
    SimInstant(EPOCH + scale(nanos(since), ppm(), 1_000_000))
}

/// Returns how long the clock of the node whose task this is stood still.
pub(crate) fn suspended() -> Duration {
    let nanos = |node: &Arc<Node>| node.suspended.load(Ordering::Relaxed);
    Duration::from_nanos(NODE.with_borrow(|node| node.as_ref().map_or(0, nanos)))
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

fn scale(n: u64, by: u64, per: u64) -> u64 {
    u64::try_from(u128::from(n) * u128::from(by) / u128::from(per)).unwrap_or(u64::MAX)
}

/// Converts a time span by the node's clock to one of the world's; rather too long, so that who waits for a moment
/// finds that it has come.
fn to_world(d: Duration) -> Duration {
    match ppm() {
        1_000_000 => d,
        ppm => Duration::from_nanos(scale(nanos(d), 1_000_000, ppm) + 2),
    }
}

impl SimInstant {
    /// The same moment for those who count in std's instants.
    pub(crate) fn to_std(self) -> std::time::Instant {
        start().into_std() + Duration::from_nanos(self.0 - EPOCH)
    }
}

impl Instant for SimInstant {
    fn now() -> SimInstant {
        now()
    }
}

impl Add<Duration> for SimInstant {
    type Output = SimInstant;
    fn add(self, d: Duration) -> SimInstant {
        SimInstant(self.0 + nanos(d))
    }
}

impl AddAssign<Duration> for SimInstant {
    fn add_assign(&mut self, d: Duration) {
        *self = *self + d;
    }
}

impl Sub<Duration> for SimInstant {
    type Output = SimInstant;
    fn sub(self, d: Duration) -> SimInstant {
        SimInstant(self.0.saturating_sub(nanos(d)))
    }
}

impl Sub<SimInstant> for SimInstant {
    type Output = Duration;
    fn sub(self, other: SimInstant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(other.0))
    }
}

impl SubAssign<Duration> for SimInstant {
    fn sub_assign(&mut self, d: Duration) {
        *self = *self - d;
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SimRuntime(tokio::runtime::Runtime);

type Tokio = TokioRuntime;

impl AsyncRuntime for SimRuntime {
    type JoinError = tokio::task::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = tokio::task::JoinHandle<T>;
    type Sleep = tokio::time::Sleep;
    type Instant = SimInstant;
    type TimeoutError = tokio::time::error::Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = tokio::time::Timeout<T>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = <Tokio as AsyncRuntime>::Mpsc;
    type Watch = super::watch::SimWatch;
    type Oneshot = <Tokio as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> tokio::task::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        tokio::spawn(Task {
            node: NODE.with_borrow(Clone::clone),
            future: Box::pin(future),
        })
    }

    fn sleep(duration: Duration) -> tokio::time::Sleep {
        tokio::time::sleep(to_world(duration))
    }

    fn sleep_until(deadline: SimInstant) -> tokio::time::Sleep {
        SimRuntime::sleep(deadline - now())
    }

    fn timeout<R, F>(duration: Duration, future: F) -> tokio::time::Timeout<F>
    where
        F: Future<Output = R> + OptionalSend,
    {
        tokio::time::timeout(to_world(duration), future)
    }

    fn timeout_at<R, F>(deadline: SimInstant, future: F) -> tokio::time::Timeout<F>
    where
        F: Future<Output = R> + OptionalSend,
    {
        SimRuntime::timeout(deadline - now(), future)
    }

    fn is_panic(error: &tokio::task::JoinError) -> bool {
        error.is_panic()
    }

    fn thread_rng() -> SmallRng {
        RNG.with_borrow_mut(|rng| match rng {
            Some(rng) => SmallRng::from_rng(rng),
            None => SmallRng::from_rng(&mut rand::rng()),
        })
    }

    fn new(_threads: usize) -> SimRuntime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        SimRuntime(builder.enable_all().build().expect("a runtime"))
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, future: F) -> T {
        self.0.block_on(future)
    }
}
