//! The programs a node runs: `exec` of the config file, or what follows `--`.
//!
//! All but the last run one after another, each to its successful end; the last runs in the
//! background, and its exit code becomes ours. What holds:
//! - **No program outlives us.** Each is killed by the kernel (`PR_SET_PDEATHSIG`) when the *thread*
//!   that started it ends, so one thread starts them all and waits for each. It covers our direct
//!   children: a program that starts others must end them itself.
//! - **A signal never hits a stranger.** A child is reaped under the lock that guards its pid.
//! - **No signal is lost at the start.** A child is started under the same lock, so a signal comes
//!   either before it (and then it is not started) or after (and then it is delivered).
//!
//! As pid 1 of a container we also reap orphans that are handed to us ([`reap`]).

mod reap;
mod signals;

use crate::config::ExecCommand;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};
use tokio::sync::watch;

pub use signals::Signals;

/// A program that could not be run.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The program cannot be started.
    #[error("start program `{program}`")]
    Start {
        /// The program, as it was named.
        program: String,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// The program was started but cannot be waited for.
    #[error("wait for program `{program}`")]
    Wait {
        /// The program, as it was named.
        program: String,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// The thread that looks after programs is gone.
    #[error("the supervisor thread ended early")]
    Supervisor,
}

/// Runs a node's programs and knows the one that is running.
#[derive(Debug)]
pub struct Supervisor {
    current: Arc<Mutex<Current>>,
    progress: watch::Receiver<Progress>,
}

/// What the thread has come to; moves downwards only.
#[derive(Debug, Clone)]
enum Progress {
    /// A program runs, or is about to.
    Busy,
    /// All ran to a successful end and none is left in the background.
    Idle,
    /// The last program ended, or an earlier one failed, or we were told to stop.
    Ended(i32),
    /// A program could not be run.
    Failed(ExecError),
}

/// The running child, shared by the thread that waits for it and those who signal it.
#[derive(Debug, Default)]
struct Current {
    child: Option<Pid>,
    stopping: bool,
}

impl Supervisor {
    /// Starts to run `commands`; returns at once.
    ///
    /// Those with `if_candidate` are skipped unless `is_candidate`. As pid 1 it reaps orphans too.
    /// # Errors
    /// If the thread cannot be started. What becomes of the programs is told by [`Self::wait`].
    pub fn start(commands: Vec<ExecCommand>, is_candidate: bool) -> io::Result<Self> {
        if rustix::process::getpid() == Pid::INIT {
            thread::Builder::new()
                .name("reap".into())
                .spawn(reap::reap_orphans)?;
        }
        let current = Arc::<Mutex<Current>>::default();
        let (tell, progress) = watch::channel(Progress::Busy);
        let shared = Arc::clone(&current);
        thread::Builder::new().name("exec".into()).spawn(move || {
            let end = run_all(&commands, is_candidate, &shared);
            tell.send_replace(end);
        })?;
        Ok(Self { current, progress })
    }

    /// Waits until the last program ended, or an earlier one failed; returns the exit code.
    ///
    /// A program killed by signal N counts as 128 + N. Waits for ever if no program is left in the
    /// background. May be called again, and by several tasks.
    /// # Errors
    /// If a program could not be started or waited for.
    pub async fn wait(&self) -> Result<i32, ExecError> {
        let mut progress = self.progress.clone();
        loop {
            match progress.borrow_and_update().clone() {
                Progress::Ended(code) => return Ok(code),
                Progress::Failed(error) => return Err(error),
                Progress::Idle => std::future::pending::<()>().await,
                Progress::Busy => {}
            }
            progress
                .changed()
                .await
                .map_err(|_| ExecError::Supervisor)?;
        }
    }

    /// Sends `signal` to the running program; returns whether there is one.
    ///
    /// After a signal that asks to stop (INT, TERM, QUIT) no further program is started.
    pub fn signal(&self, signal: Signal) -> bool {
        let mut current = self.current.lock();
        current.stopping |= asks_to_stop(signal);
        let Some(child) = current.child else {
            return false;
        };
        if let Err(error) = rustix::process::kill_process(child, signal) {
            tracing::warn!(pid = child.as_raw_pid(), ?signal, %error, "signal not delivered");
        }
        true
    }

    /// Passes our signals on until the programs end; returns the exit code.
    ///
    /// With no program running, INT, TERM or QUIT ends the wait with code 0.
    /// # Errors
    /// As [`Self::wait`].
    pub async fn run_until_end(&self, signals: &mut Signals) -> Result<i32, ExecError> {
        loop {
            tokio::select! {
                end = self.wait() => return end,
                signal = signals.recv() => {
                    if !self.signal(signal) && asks_to_stop(signal) {
                        return self.wait_or_idle().await;
                    }
                }
            }
        }
    }

    /// Ends the running program: TERM, and KILL after `grace`; returns its exit code.
    ///
    /// For when the node itself must stop. Code 0 if no program was left to end.
    /// # Errors
    /// As [`Self::wait`].
    pub async fn shutdown(&self, grace: Duration) -> Result<i32, ExecError> {
        self.signal(Signal::TERM);
        if let Ok(end) = tokio::time::timeout(grace, self.wait_or_idle()).await {
            return end;
        }
        tracing::warn!(?grace, "program ignored TERM, killing it");
        self.signal(Signal::KILL);
        self.wait_or_idle().await
    }

    /// As [`Self::wait`], but with 0 once nothing is left in the background.
    async fn wait_or_idle(&self) -> Result<i32, ExecError> {
        let mut progress = self.progress.clone();
        let settled = progress
            .wait_for(|progress| !matches!(progress, Progress::Busy))
            .await;
        match settled.map_err(|_| ExecError::Supervisor)?.clone() {
            Progress::Ended(code) => Ok(code),
            Progress::Failed(error) => Err(error),
            Progress::Busy | Progress::Idle => Ok(0),
        }
    }
}

/// Whether a signal asks the whole program to end.
#[must_use]
pub fn asks_to_stop(signal: Signal) -> bool {
    matches!(signal, Signal::INT | Signal::TERM | Signal::QUIT)
}

fn run_all(commands: &[ExecCommand], is_candidate: bool, current: &Mutex<Current>) -> Progress {
    for (index, command) in commands.iter().enumerate() {
        if command.if_candidate && !is_candidate {
            tracing::info!(program = %program(command), "not a candidate, program skipped");
            continue;
        }
        let code = match run_one(command, current) {
            Ok(Some(code)) => code,
            Ok(None) => return Progress::Ended(0),
            Err(error) => return Progress::Failed(error),
        };
        tracing::info!(program = %program(command), code, "program ended");
        let is_last = index + 1 == commands.len();
        if is_last || code != 0 {
            return Progress::Ended(code);
        }
    }
    match current.lock().stopping {
        true => Progress::Ended(0),
        false => Progress::Idle,
    }
}

/// Runs one program to its end; `None` if we were told to stop before it started.
fn run_one(command: &ExecCommand, current: &Mutex<Current>) -> Result<Option<i32>, ExecError> {
    let mut guard = current.lock();
    if guard.stopping {
        return Ok(None);
    }
    let mut child = spawn(command).map_err(|source| ExecError::Start {
        program: program(command),
        source: Arc::new(source),
    })?;
    guard.child = Some(Pid::from_child(&child));
    drop(guard);
    tracing::info!(program = %program(command), pid = child.id(), "program started");
    let status = wait_for(&mut child, current).map_err(|source| ExecError::Wait {
        program: program(command),
        source: Arc::new(source),
    });
    Ok(Some(exit_code(status?)))
}

/// Waits for the child's end, then reaps it under the lock that guards its pid.
fn wait_for(child: &mut Child, current: &Mutex<Current>) -> io::Result<ExitStatus> {
    let pid = WaitId::Pid(Pid::from_child(child));
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let ended = rustix::io::retry_on_intr(|| rustix::process::waitid(pid.clone(), options));
    let mut current = current.lock();
    current.child = None;
    ended?;
    child.wait()
}

fn spawn(command: &ExecCommand) -> io::Result<Child> {
    let (program, args) = command
        .argv
        .split_first()
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut spawned = Command::new(program);
    spawned.args(args);
    if std::env::var_os("HOSTNAME").is_none() {
        spawned.env("HOSTNAME", crate::config::Env::from_process().os_hostname());
    }
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only two system calls are made; nothing allocates or locks.
    unsafe { spawned.pre_exec(move || die_with(parent)) };
    spawned.spawn()
}

/// Asks the kernel to kill the calling process when the thread that forked it ends.
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    match rustix::process::getppid() == Some(parent) {
        true => Ok(()),
        false => Err(io::ErrorKind::NotConnected.into()),
    }
}

/// The exit code as a shell gives it.
fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1)
}

fn program(command: &ExecCommand) -> String {
    command
        .argv
        .first()
        .map(|program| program.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
