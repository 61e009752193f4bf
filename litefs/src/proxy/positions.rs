//! Where the databases of this node are, and waiting until they are somewhere.
//!
//! The commit path tells nobody while nobody waits: the first who does subscribes, and a task passes on that something
//! moved until the last has gone.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::port::ProxyNode;
use super::token::{MAX_DATABASES, Seen, Standing, Token};
use crate::replication::{DatabaseFilter, DbName};

/// Of several databases, those go into a token whose last commit is younger; a client's cookie is kept no longer.
const RECENT: Duration = Duration::from_secs(300);

/// Positions of this node, as tokens.
pub(super) struct Positions {
    pub(super) node: Arc<dyn ProxyNode>,
    /// Counts moves while somebody waits.
    moves: watch::Sender<u64>,
    waiters: Mutex<Waiters>,
}

#[derive(Default)]
struct Waiters {
    count: usize,
    has_task: bool,
}

/// Somebody waits, until this is dropped.
struct Waiter<'a>(&'a Positions);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiters.lock().count -= 1;
    }
}

impl Positions {
    /// Makes it; nothing runs yet.
    pub(super) fn new(node: Arc<dyn ProxyNode>) -> Arc<Positions> {
        Arc::new(Positions {
            node,
            moves: watch::Sender::new(0),
            waiters: Mutex::default(),
        })
    }

    /// Whether this node has all of a token that is left.
    pub(super) fn has(&self, token: &Token) -> bool {
        token.iter().all(|(db, seen)| self.has_one(db, seen))
    }

    fn has_one(&self, db: &DbName, seen: &Seen) -> bool {
        match self.node.standing(db) {
            Some(at) => seen.is_in(&at),
            None => seen.txid.0 == 0,
        }
    }

    /// Makes the positions of databases those of their last commits here, where this node is primary.
    pub(super) async fn capture(&self, dbs: &[DbName]) {
        for db in dbs {
            if self.node.is_captured(db) {
                continue;
            }
            let (node, db) = (self.node.clone(), db.clone());
            // A capture that panics is in the log; the position is what it is.
            let _ = tokio::task::spawn_blocking(move || node.capture(&db)).await;
        }
    }

    /// Databases that a filter takes; just the one, if it is about one.
    pub(super) fn names(&self, filter: &DatabaseFilter, only: Option<&DbName>) -> Vec<DbName> {
        match only {
            Some(db) => vec![db.clone()],
            None => {
                let mut all = self.node.databases();
                all.retain(|db| filter.matches(db));
                all
            }
        }
    }

    /// Where these databases are. Of many, those that moved last: a token has room for so many.
    pub(super) fn token(&self, dbs: &[DbName]) -> Token {
        let here = |db: &DbName| Some((db.clone(), self.node.standing(db)?));
        let mut found: Vec<(DbName, Standing)> = dbs.iter().filter_map(here).collect();
        if found.len() > 1 {
            let since = crate::clock::wall_ms() - i64::try_from(RECENT.as_millis()).unwrap_or(0);
            found.retain(|(_, at)| at.timestamp_ms >= since);
            found.sort_by_key(|(_, at)| std::cmp::Reverse(at.timestamp_ms));
            found.truncate(MAX_DATABASES);
        }
        let mut token = Token::default();
        for (db, at) in found {
            token.set(db, at.into());
        }
        token
    }

    /// Waits until this node has all of a token that is left.
    pub(super) async fn reach(self: &Arc<Self>, token: &Token) {
        if self.has(token) {
            return;
        }
        let mut moves = self.moves.subscribe();
        let _waiter = self.wait();
        // What moved before the subscription is seen here, what moves after it is told.
        while !self.has(token) {
            if moves.changed().await.is_err() {
                return;
            }
        }
    }

    fn wait(self: &Arc<Self>) -> Waiter<'_> {
        let mut waiters = self.waiters.lock();
        waiters.count += 1;
        if !std::mem::replace(&mut waiters.has_task, true) {
            // Subscribed when the call returns, not when the task begins.
            let changes = self.node.changes();
            tokio::spawn(pass_on(self.clone(), changes));
        }
        drop(waiters);
        Waiter(self)
    }
}

async fn pass_on(positions: Arc<Positions>, mut changes: crate::replication::Changes) {
    loop {
        let is_over = changes.recv().await.is_none();
        positions.moves.send_modify(|n| *n += 1);
        let mut waiters = positions.waiters.lock();
        if waiters.count == 0 || is_over {
            waiters.has_task = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeNode;
    use super::*;

    fn seen(txid: u64) -> Token {
        let at = FakeNode::standing_at(txid, 1);
        Token::of("app.db".parse().unwrap(), at.into())
    }

    #[tokio::test]
    async fn waits_for_a_move_and_subscribes_only_meanwhile() {
        let node = FakeNode::new();
        node.put("app.db", 1, 1);
        let positions = Positions::new(node.clone());
        positions.reach(&seen(1)).await;
        assert!(!positions.waiters.lock().has_task);
        let waiting = {
            let positions = positions.clone();
            tokio::spawn(async move { positions.reach(&seen(3)).await })
        };
        tokio::task::yield_now().await;
        node.put("app.db", 2, 1);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        node.put("app.db", 3, 1);
        waiting.await.unwrap();
        assert_eq!(positions.waiters.lock().count, 0);
        node.put("app.db", 4, 1);
        while positions.waiters.lock().has_task {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn of_several_databases_the_recent_ones_go_into_a_token() {
        let node = FakeNode::new();
        for i in 0..60 {
            node.put(&format!("{i:02}.db"), i + 1, 1);
        }
        let positions = Positions::new(node.clone());
        let filter = DatabaseFilter::new(vec!["*.db".parse().unwrap()]);
        let names = positions.names(&filter, None);
        assert_eq!(names.len(), 60);
        assert_eq!(positions.token(&names).len(), MAX_DATABASES);
        let one = "07.db".parse().unwrap();
        assert_eq!(
            positions.names(&filter, Some(&one)),
            std::slice::from_ref(&one)
        );
        node.age("07.db");
        assert_eq!(positions.token(&[one]).len(), 1);
        assert_eq!(positions.token(&names[..]).len(), MAX_DATABASES);
    }
}
