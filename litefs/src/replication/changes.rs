//! "Database X has moved", from one publisher to many subscribers, coalesced.
//!
//! A subscriber holds a set of names, so it is bounded by the number of databases however slow it is;
//! a name already in the set is not added twice. Names come out in the order they first went in.

use std::collections::{HashSet, VecDeque};
use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::DbName;

/// Publishing end. Cheap to publish without subscribers.
#[derive(Debug, Default)]
pub struct ChangeHub {
    subscribers: Mutex<Vec<Weak<Shared>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    order: VecDeque<DbName>,
    present: HashSet<DbName>,
    waker: Option<Waker>,
    is_closed: bool,
}

impl ChangeHub {
    /// Makes a hub without subscribers.
    #[must_use]
    pub fn new() -> ChangeHub {
        ChangeHub::default()
    }

    /// Adds a subscriber, which sees what is published from now on.
    #[must_use]
    pub fn subscribe(&self) -> Changes {
        let shared = Arc::new(Shared::default());
        let mut subscribers = self.subscribers.lock();
        subscribers.retain(|s| s.strong_count() > 0);
        subscribers.push(Arc::downgrade(&shared));
        Changes(shared)
    }

    /// Tells every subscriber that a database moved, appeared or was dropped.
    pub fn publish(&self, db: &DbName) {
        for shared in self.subscribers.lock().iter().filter_map(Weak::upgrade) {
            shared.put(db);
        }
    }
}

impl Drop for ChangeHub {
    fn drop(&mut self) {
        for shared in self.subscribers.lock().iter().filter_map(Weak::upgrade) {
            shared.close();
        }
    }
}

impl Shared {
    fn put(&self, db: &DbName) {
        let mut state = self.state.lock();
        if state.present.insert(db.clone()) {
            state.order.push_back(db.clone());
        }
        self.wake(state);
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        self.wake(state);
    }

    fn wake(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        self.arrived.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Subscribing end, for one task or thread.
#[derive(Debug)]
pub struct Changes(Arc<Shared>);

impl Changes {
    /// Takes the names gathered so far, without waiting.
    #[must_use]
    pub fn take(&mut self) -> Vec<DbName> {
        let mut state = self.0.state.lock();
        state.present.clear();
        state.order.drain(..).collect()
    }

    /// Waits for names; `None` once the hub is gone and nothing is left. Losing the future loses no name.
    pub async fn recv(&mut self) -> Option<Vec<DbName>> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Waits on this thread for names, for at most `timeout`; empty when it passed or the hub is gone.
    #[must_use]
    pub fn recv_timeout(&mut self, timeout: Duration) -> Vec<DbName> {
        let mut state = self.0.state.lock();
        if state.order.is_empty() && !state.is_closed {
            self.0.arrived.wait_for(&mut state, timeout);
        }
        state.present.clear();
        state.order.drain(..).collect()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<DbName>>> {
        let mut state = self.0.state.lock();
        if !state.order.is_empty() {
            state.present.clear();
            return Poll::Ready(Some(state.order.drain(..).collect()));
        }
        if state.is_closed {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn db(name: &str) -> DbName {
        name.parse().unwrap()
    }

    #[test]
    fn coalesces_in_order_of_first_mention() {
        let hub = ChangeHub::new();
        let mut changes = hub.subscribe();
        for name in ["b", "a", "b", "c", "a"] {
            hub.publish(&db(name));
        }
        assert_eq!(changes.take(), [db("b"), db("a"), db("c")]);
        assert!(changes.take().is_empty());
        hub.publish(&db("a"));
        assert_eq!(changes.recv_timeout(Duration::ZERO), [db("a")]);
    }

    #[tokio::test]
    async fn wakes_a_waiting_task_and_ends_with_the_hub() {
        let hub = ChangeHub::new();
        let mut changes = hub.subscribe();
        let task = tokio::spawn(async move {
            let first = changes.recv().await;
            (first, changes.recv().await)
        });
        tokio::task::yield_now().await;
        hub.publish(&db("x"));
        tokio::task::yield_now().await;
        drop(hub);
        assert_eq!(task.await.unwrap(), (Some(vec![db("x")]), None));
    }

    #[test]
    fn a_dropped_subscriber_is_forgotten() {
        let hub = ChangeHub::new();
        drop(hub.subscribe());
        let _kept = hub.subscribe();
        hub.publish(&db("a"));
        assert_eq!(hub.subscribers.lock().len(), 1);
    }
}
