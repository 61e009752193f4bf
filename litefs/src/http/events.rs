//! `GET /events`: newline-delimited JSON, in LiteFS's shape.
//!
//! `init` once, then `tx` for every transaction that became visible here, `primaryChange` when this node's role or its
//! primary changes, and `epochChange`, which LiteFS does not have, when a new tenure is heard of. An empty line every few seconds is the heartbeat: JSON readers, LiteFS's own clients among them, pass
//! over it, and a connection that has gone dead is noticed. A reader that falls behind the buffer is disconnected.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;

use crate::ltx::Pos;
use crate::replication::DbName;

const HEARTBEAT: Duration = Duration::from_secs(5);

/// Something that happened on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A transaction became visible.
    Tx {
        /// The database.
        db: DbName,
        /// Where it is now.
        pos: Pos,
        /// Bytes per page.
        page_size: u32,
        /// Pages of the database afterwards.
        commit: u32,
        /// Primary's clock at the commit, milliseconds since 1970.
        timestamp_ms: i64,
    },
    /// A history of this node gave way to another; what it had is kept.
    Lost {
        /// The database.
        db: DbName,
        /// What it is kept as.
        id: String,
        /// How many transactions, at most, if that is known.
        count: Option<u64>,
        /// Where it ended.
        last: String,
    },
    /// Another node, or none, is primary.
    PrimaryChange {
        /// Whether it is this one.
        is_primary: bool,
        /// Its host name, if there is one.
        hostname: Option<String>,
    },
    /// A new tenure began.
    EpochChange {
        /// Its number.
        epoch: u64,
    },
}

impl Event {
    fn to_json(&self) -> Value {
        match self {
            Event::Tx {
                db,
                pos,
                page_size,
                commit,
                timestamp_ms,
            } => json!({
                "type": "tx",
                "db": db.as_str(),
                "data": {
                    "txID": pos.txid.to_string(),
                    "postApplyChecksum": pos.post_apply_checksum.to_string(),
                    "pageSize": page_size,
                    "commit": commit,
                    "timestamp": rfc3339(*timestamp_ms),
                },
            }),
            Event::Lost {
                db,
                id,
                count,
                last,
            } => json!({
                "type": "lost",
                "db": db.as_str(),
                "data": { "id": id, "lostCount": count, "last": last },
            }),
            Event::PrimaryChange {
                is_primary,
                hostname,
            } => primary("primaryChange", *is_primary, hostname.as_deref()),
            Event::EpochChange { epoch } => {
                json!({ "type": "epochChange", "data": { "epoch": epoch } })
            }
        }
    }
}

/// Returns the first event of every subscription.
pub(super) fn init(is_primary: bool, hostname: Option<&str>) -> Value {
    primary("init", is_primary, hostname)
}

fn primary(kind: &str, is_primary: bool, hostname: Option<&str>) -> Value {
    let mut data = json!({ "isPrimary": is_primary });
    if let Some(hostname) = hostname {
        data["hostname"] = hostname.into();
    }
    json!({ "type": kind, "data": data })
}

/// Makes the endless body of a subscription; it ends when the node stops or the reader is too slow.
pub(super) fn body(
    init: &Value,
    events: broadcast::Receiver<Event>,
    closing: CancellationToken,
) -> Body {
    let state = (Some(line(init)), events, closing);
    Body::from_stream(stream::unfold(
        state,
        |(first, mut events, closing)| async {
            let chunk = match first {
                Some(first) => first,
                None => tokio::select! {
                    () = closing.cancelled() => return None,
                    event = events.recv() => match event {
                        Ok(event) => line(&event.to_json()),
                        Err(RecvError::Closed | RecvError::Lagged(_)) => return None,
                    },
                    () = tokio::time::sleep(HEARTBEAT) => Bytes::from_static(b"\n"),
                },
            };
            Some((Ok::<_, Infallible>(chunk), (None, events, closing)))
        },
    ))
}

fn line(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

/// Prints milliseconds since 1970 as UTC.
pub(crate) fn rfc3339(ms: i64) -> String {
    let days = ms.div_euclid(86_400_000);
    let in_day = ms.rem_euclid(86_400_000);
    // Days to civil date: H. Hinnant, "chrono-compatible low-level date algorithms".
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute) = (in_day / 3_600_000, in_day / 60_000 % 60);
    let (second, milli) = (in_day / 1000 % 60, in_day % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }

    #[test]
    fn shapes_are_those_of_litefs() {
        let tx = Event::Tx {
            db: "my.db".parse().unwrap(),
            pos: Pos::default(),
            page_size: 4096,
            commit: 2,
            timestamp_ms: 0,
        };
        assert_eq!(
            tx.to_json().to_string(),
            r#"{"data":{"commit":2,"pageSize":4096,"postApplyChecksum":"8000000000000000","timestamp":"1970-01-01T00:00:00.000Z","txID":"0000000000000000"},"db":"my.db","type":"tx"}"#
        );
        assert_eq!(
            init(true, Some("ams")).to_string(),
            r#"{"data":{"hostname":"ams","isPrimary":true},"type":"init"}"#
        );
    }
}
