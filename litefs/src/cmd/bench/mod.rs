//! `litefs bench`: measurements that anybody can repeat.

mod failover;
mod load;
mod nodes;
mod report;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::exec::{Signals, asks_to_stop};

/// Measure on this machine.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Failover(failover::Args),
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    match &args.command {
        Command::Failover(args) => failover::run(args),
    }
}

/// Whether somebody asked this process to stop: everything that waits looks at it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// From now on a signal to stop ends what is waited for, so that what was started is ended in order.
fn stop_on_signals() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = runtime.block_on(async { Signals::install() })?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                if asks_to_stop(signals.recv().await) {
                    INTERRUPTED.store(true, Ordering::Release);
                }
            }
        });
    });
    Ok(())
}

/// Waits for something to become true.
fn wait_until(
    what: &str,
    patience: Duration,
    mut is_so: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        if is_interrupted() {
            bail!("interrupted");
        }
        if Instant::now() >= deadline {
            bail!("waited {patience:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
