//! `litefs lost`: what is kept of histories that gave way to another.

use super::NodeArgs;
use crate::http::client::Client;
use crate::http::events::rfc3339;
use crate::http::lost::{Detail, Listing, Summary};
use anyhow::Context as _;
use clap::Subcommand;
use http_body_util::BodyExt as _;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt as _;

/// Transactions of a node that lost an election, or its history: list, look into, take out, discard.
///
/// A node whose history is not the primary's takes the primary's, and keeps its own apart. It is asked itself: see --url.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// All entries of the node.
    List {
        #[command(flatten)]
        node: NodeArgs,
        /// As the node's API says it.
        #[arg(long)]
        json: bool,
    },
    /// One entry, with its transactions one by one.
    Show {
        #[command(flatten)]
        node: NodeArgs,
        /// Id, or how it begins.
        id: String,
        /// Also the pages in which the database is another now; reads all of the copy.
        #[arg(long)]
        pages: bool,
        /// As the node's API says it.
        #[arg(long)]
        json: bool,
    },
    /// Copy the whole database of an entry into a file, or its transactions into LTX files.
    Export {
        #[command(flatten)]
        node: NodeArgs,
        /// Id, or how it begins.
        id: String,
        /// File to write, which must not be there; with --ltx a directory. Named after the entry unless given.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// The transactions instead of the database, a file for each record of the log.
        #[arg(long)]
        ltx: bool,
    },
    /// Remove an entry for good. Nothing else does.
    Discard {
        #[command(flatten)]
        node: NodeArgs,
        /// Id, or how it begins.
        id: String,
        /// It is meant.
        #[arg(long)]
        yes: bool,
    },
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    super::block_on(run_command(&args.command))
}

async fn run_command(command: &Command) -> anyhow::Result<i32> {
    match command {
        Command::List { node, json } => {
            let client = Client::new(node.url.clone());
            print(&client, "/v1/lost", *json, |listing: &Listing| {
                print!("{}", table(&listing.lost));
            })
            .await?;
        }
        Command::Show {
            node,
            id,
            pages,
            json,
        } => {
            let client = Client::new(node.url.clone());
            let path = format!("{}?pages={pages}", entry_path(id)?);
            print(&client, &path, *json, |detail: &Detail| {
                print!("{}", describe(detail))
            })
            .await?;
        }
        Command::Export {
            node,
            id,
            output,
            ltx,
        } => {
            let client = Client::new(node.url.clone());
            match ltx {
                false => export(&client, id, output.as_deref()).await?,
                true => export_ltx(&client, id, output.as_deref()).await?,
            }
        }
        Command::Discard { node, id, yes } => {
            anyhow::ensure!(
                yes,
                "this removes the only copy of transactions that were lost: look at `litefs lost show {id}`, and add --yes"
            );
            let client = Client::new(node.url.clone());
            client.delete(&entry_path(id)?).await?;
            println!("discarded {id}");
        }
    }
    Ok(0)
}

/// Returns the path of an entry; what could be no id does not become a part of one.
fn entry_path(id: &str) -> anyhow::Result<String> {
    anyhow::ensure!(
        !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id:?} is no id of a lost branch: they are hexadecimal, see `litefs lost list`"
    );
    Ok(format!("/v1/lost/{id}"))
}

async fn text_of(client: &Client, path: &str) -> anyhow::Result<bytes::Bytes> {
    let body = client.get(path).await?.into_body();
    let body = body.collect().await;
    Ok(body
        .with_context(|| format!("read {}{path}", client.url()))?
        .to_bytes())
}

async fn print<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
    json: bool,
    show: impl FnOnce(&T),
) -> anyhow::Result<()> {
    let text = text_of(client, path).await?;
    if json {
        println!("{}", String::from_utf8_lossy(&text));
        return Ok(());
    }
    let read = serde_json::from_slice(&text);
    show(&read.with_context(|| format!("{}{path} answers what is not expected", client.url()))?);
    Ok(())
}

async fn export(client: &Client, id: &str, output: Option<&Path>) -> anyhow::Result<()> {
    let path = output.map_or_else(|| PathBuf::from(format!("{id}.db")), Path::to_owned);
    let bytes = download(client, &format!("{}/export", entry_path(id)?), &path).await?;
    println!(
        "exported the database of {id} to {} ({bytes} bytes)",
        path.display()
    );
    Ok(())
}

async fn export_ltx(client: &Client, id: &str, output: Option<&Path>) -> anyhow::Result<()> {
    let entry = entry_path(id)?;
    let text = text_of(client, &entry).await?;
    let detail: Detail = serde_json::from_slice(&text)
        .with_context(|| format!("{}{entry} answers what is not expected", client.url()))?;
    if detail.records.is_empty() {
        anyhow::bail!(
            "{id} has no transactions: the log did not have them{}; try without --ltx",
            suffix(detail.summary.problem.as_deref())
        );
    }
    let dir = output.map_or_else(|| PathBuf::from(format!("{id}.ltx")), Path::to_owned);
    std::fs::create_dir_all(&dir).with_context(|| format!("create directory {}", dir.display()))?;
    let mut bytes = 0;
    for record in &detail.records {
        let range = format!("{}-{}", record.first, record.last);
        let path = dir.join(format!("{range}.ltx"));
        bytes += download(client, &format!("{entry}/export?records={range}"), &path).await?;
    }
    println!(
        "exported {} transactions of {id} in {} files to {} ({bytes} bytes)",
        detail.records.iter().map(|r| r.tx_count).sum::<u64>(),
        detail.records.len(),
        dir.display()
    );
    if let Some(problem) = &detail.summary.problem {
        eprintln!("litefs: not all of it: {problem}");
    }
    Ok(())
}

fn suffix(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(" ({why})"))
}

/// Writes an answer to a new file and syncs it; returns its length.
async fn download(client: &Client, request: &str, path: &Path) -> anyhow::Result<u64> {
    let mut body = client.get(request).await?.into_body();
    let context = || format!("write {}", path.display());
    // What is there may be another copy of the same: it is not written over.
    let file = tokio::fs::File::create_new(path).await;
    let mut file = file.with_context(context)?;
    let write = async {
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.with_context(|| format!("read {}{request}", client.url()))?;
            if let Some(data) = frame.data_ref() {
                file.write_all(data).await.with_context(context)?;
                bytes += data.len() as u64;
            }
        }
        file.flush().await.with_context(context)?;
        file.sync_all().await.with_context(context)?;
        Ok(bytes)
    };
    let written = write.await;
    if written.is_err() {
        // The error is what matters.
        let _ = std::fs::remove_file(path);
    }
    written
}

fn shown(text: &str) -> &str {
    match text {
        "" => "-",
        text => text,
    }
}

fn lost_count(summary: &Summary) -> String {
    match summary.entry.lost_count {
        Some(count) => count.to_string(),
        None if summary.entry.transactions.tx_count > 0 => {
            format!("<={}", summary.entry.transactions.tx_count)
        }
        None => "?".to_owned(),
    }
}

/// Lines up entries, one a line.
fn table(lost: &[Summary]) -> String {
    if lost.is_empty() {
        return "nothing is kept: no history of this node gave way to another\n".to_owned();
    }
    let head = [
        "ID",
        "DATABASE",
        "WHEN",
        "REASON",
        "LOST",
        "COMMON UP TO",
        "LAST",
        "BYTES",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(lost.iter().map(|summary| {
        let entry = &summary.entry;
        [
            entry.id.clone(),
            shown(&entry.database).to_owned(),
            rfc3339(entry.when_ms),
            entry.reason.to_string(),
            lost_count(summary),
            entry.fork.as_deref().unwrap_or("?").to_owned(),
            shown(&entry.last).to_owned(),
            summary.disk_bytes.to_string(),
        ]
    }));
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max();
    let widths: Vec<usize> = (0..head.len()).filter_map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    for summary in lost {
        if let Some(problem) = &summary.problem {
            text.push_str(&format!("{}: {problem}\n", summary.entry.id));
        }
    }
    text
}

/// Says all there is to say of one entry.
fn describe(detail: &Detail) -> String {
    let summary = &detail.summary;
    let entry = &summary.entry;
    let copy = entry.copy.as_ref().map_or_else(
        || "none".to_owned(),
        |copy| format!("{} pages of {} bytes", copy.page_count, copy.page_size),
    );
    let winner = entry.winner.as_ref().map_or_else(
        || "-".to_owned(),
        |winner| format!("{} in epoch {}", winner.pos, winner.epoch),
    );
    let logged = &entry.transactions;
    let mut lines = vec![
        ("id", entry.id.clone()),
        ("database", shown(&entry.database).to_owned()),
        ("when", rfc3339(entry.when_ms)),
        ("reason", entry.reason.to_string()),
        (
            "node",
            format!("{} {}", shown(&entry.hostname), entry.node_id),
        ),
        ("lost", format!("{} transactions", lost_count(summary))),
        (
            "last",
            format!("{} in epoch {}", shown(&entry.last), entry.epoch),
        ),
        (
            "common up to",
            entry.fork.as_deref().unwrap_or("not known").to_owned(),
        ),
        ("gave way to", winner),
        ("copy", copy),
        (
            "in the log",
            format!(
                "{} transactions in {} records{}",
                logged.tx_count,
                logged.record_count,
                if logged.is_whole {
                    ""
                } else {
                    ", not all of them"
                }
            ),
        ),
        ("path", summary.path.clone()),
        ("bytes", summary.disk_bytes.to_string()),
    ];
    lines.extend(entry.note.clone().map(|note| ("note", note)));
    lines.extend(summary.problem.clone().map(|problem| ("problem", problem)));
    if let Some(pages) = &detail.differing_pages {
        let all: Vec<String> = pages.iter().map(ToString::to_string).collect();
        lines.push((
            "pages that differ now",
            format!("{}: {}", pages.len(), all.join(" ")),
        ));
    }
    let mut text: String = lines
        .iter()
        .map(|(name, value)| format!("{name:22}{value}\n"))
        .collect();
    if !detail.records.is_empty() {
        text.push_str(&format!(
            "\n{:16}  {:16}  {:>5}  {:>5}  {:24}  {:>6}  {:>9}\n",
            "FIRST", "LAST", "COUNT", "EPOCH", "CAPTURED", "PAGES", "BYTES"
        ));
    }
    for r in &detail.records {
        text.push_str(&format!(
            "{:16}  {:16}  {:>5}  {:>5}  {:24}  {:>6}  {:>9}\n",
            r.first,
            r.last,
            r.tx_count,
            if r.epoch == 0 {
                "-".to_owned()
            } else {
                r.epoch.to_string()
            },
            rfc3339(r.when_ms),
            r.pages,
            r.bytes
        ));
    }
    text
}
