//! What is kept of histories that lost, as the node's HTTP API, metrics and events see it.

use std::io::Cursor;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::ports::Ports;
use crate::db::OnLost;
use crate::db::log::Error as LogError;
use crate::http::lost::{Detail, LostApi, Record, Summary};
use crate::http::{Event, Export, MetricKind, MetricsText, NodeError};
use crate::ltx::{Txid, verify};
use crate::store::{
    Store, chain,
    lost::{self, Kept},
};

/// The entries of this node.
pub(super) struct Lost(pub(super) Arc<Ports>);

impl Lost {
    fn find(&self, id: &str) -> Result<Kept, NodeError> {
        Ok(lost::find(&self.0.node.metas, id)?)
    }
}

fn summary(kept: &Kept) -> Summary {
    Summary {
        entry: kept.entry.clone(),
        path: kept.path.display().to_string(),
        disk_bytes: kept.bytes,
        problem: kept.problem.clone(),
    }
}

fn io(what: String) -> impl FnOnce(std::io::Error) -> NodeError {
    move |source| NodeError::Io { what, source }
}

fn record(record: &crate::db::log::Record) -> Result<Record, String> {
    let meta = &record.meta;
    let summary = verify(&record.ltx).map_err(|e| e.to_string())?;
    Ok(Record {
        first: meta.min_txid.to_string(),
        last: meta.max_txid.to_string(),
        tx_count: meta.max_txid.0 - meta.min_txid.0 + 1,
        epoch: meta.epoch,
        when_ms: meta.timestamp_ms,
        pages: summary.page_count,
        page_count: meta.commit,
        bytes: record.ltx.len() as u64,
    })
}

impl LostApi for Lost {
    fn list(&self) -> Result<Vec<Summary>, NodeError> {
        let metas = &self.0.node.metas;
        let all = lost::list(metas).map_err(io(format!("read {}", metas.display())))?;
        Ok(all.iter().map(summary).collect())
    }

    fn show(&self, id: &str, with_pages: bool) -> Result<Detail, NodeError> {
        let kept = self.find(id)?;
        let mut detail = Detail {
            summary: summary(&kept),
            records: Vec::new(),
            differing_pages: None,
        };
        let mut wrong = None;
        let read = kept.read_transactions(|found| match record(&found) {
            Ok(record) => {
                detail.records.push(record);
                true
            }
            Err(why) => {
                wrong = Some(format!("transactions after {}: {why}", found.meta.min_txid));
                false
            }
        });
        let wrong = wrong.or(read.err().map(|error| chain(&error)));
        // What can be read is shown, whatever comes after it.
        let problem = &mut detail.summary.problem;
        *problem = problem.take().or(wrong);
        if with_pages && let Some(db) = self.0.store.get(&kept.entry.database) {
            let (_, now) = db.checksums();
            let differing = kept
                .differing_pages(&now)
                .map_err(io(format!("compare {}", kept.path.display())))?;
            detail.differing_pages =
                differing.map(|pages| pages.iter().map(|pgno| pgno.get()).collect());
        }
        Ok(detail)
    }

    fn export(&self, id: &str) -> Result<Export, NodeError> {
        let kept = self.find(id)?;
        let Some(path) = &kept.database else {
            let why = kept.entry.note.as_deref();
            return Err(NodeError::NotKept {
                what: format!(
                    "{} has no whole database{}",
                    kept.path.display(),
                    why.map_or_else(String::new, |why| format!(" ({why})"))
                ),
                id: kept.entry.id,
                remedy: match kept.transactions {
                    Some(_) => "export its transactions: `litefs lost export ID --ltx`".to_owned(),
                    None => "take the files from there as they are".to_owned(),
                },
            });
        };
        let what = format!("read {}", path.display());
        let opened = crate::store::open_regular(path).and_then(|file| {
            let len = file.metadata()?.len();
            Ok((file, len))
        });
        let (file, len) = opened.map_err(io(what))?;
        Ok(Export {
            len: Some(len),
            bytes: Box::new(file),
        })
    }

    fn export_record(&self, id: &str, first: Txid, last: Txid) -> Result<Export, NodeError> {
        let kept = self.find(id)?;
        let mut found = None;
        let read = kept.read_transactions(|record| {
            if (record.meta.min_txid, record.meta.max_txid) == (first, last) {
                found = Some(record.ltx);
            }
            found.is_none()
        });
        match (found, read) {
            (Some(ltx), _) => Ok(Export {
                len: Some(ltx.len() as u64),
                bytes: Box::new(Cursor::new(ltx)),
            }),
            (None, Err(LogError::Io { path, source, .. })) => Err(NodeError::Io {
                what: format!("read {}", path.display()),
                source,
            }),
            (None, read) => Err(NodeError::NotKept {
                what: match read {
                    Err(error) => chain(&error),
                    Ok(()) => format!("it has no record {first}-{last}"),
                },
                remedy: "see `litefs lost show ID` for what it has".to_owned(),
                id: kept.entry.id,
            }),
        }
    }

    fn discard(&self, id: &str) -> Result<String, NodeError> {
        let kept = self.find(id)?;
        kept.discard(&*self.0.node.disk)
            .map_err(io(format!("remove {}", kept.path.display())))?;
        let entry = kept.entry;
        tracing::warn!(
            db = entry.database, id = entry.id, last = entry.last, lost = entry.lost_count, path = %kept.path.display(),
            "a lost branch was discarded, as somebody asked"
        );
        Ok(entry.id)
    }
}

/// Adds how many entries there are, by database.
pub(super) fn metrics(store: &Store, text: &mut MetricsText) {
    const NAME: &str = "litefs_lost_branches";
    let help =
        "Histories of this node that gave way to another, and are kept: see litefs lost list.";
    text.family(NAME, MetricKind::Gauge, help);
    for db in store.all() {
        let count = u32::try_from(lost::count(&db.paths().meta)).map_or(f64::MAX, f64::from);
        text.sample(NAME, &[("db", db.name().as_str())], count);
    }
}

/// Makes what tells of each new entry.
pub(super) fn teller(events: broadcast::Sender<Event>) -> OnLost {
    Box::new(move |entry| {
        if let Ok(db) = entry.database.parse() {
            // Nobody listening is not an error.
            let _ = events.send(Event::Lost {
                db,
                id: entry.id.clone(),
                count: entry.lost_count,
                last: entry.last.clone(),
            });
        }
    })
}
