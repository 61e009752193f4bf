//! Supervision of real `/bin/sh` children. They tell how far they are through files and pipes.

use super::*;
use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::Stdio;

const HELPER: &str = "LITEFS_TEST_EXEC_HELPER";

fn sh(script: &str) -> ExecCommand {
    ExecCommand {
        argv: ["sh", "-c", script].map(Into::into).to_vec(),
        if_candidate: false,
    }
}

fn if_candidate(command: ExecCommand) -> ExecCommand {
    ExecCommand {
        if_candidate: true,
        ..command
    }
}

fn start(commands: &[ExecCommand], is_candidate: bool) -> Supervisor {
    Supervisor::start(commands.to_vec(), is_candidate).unwrap()
}

/// A pipe in the file system: reading it blocks until the child has written.
fn fifo(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path
}

async fn read_fifo(path: &Path) -> String {
    tokio::fs::read_to_string(path)
        .await
        .unwrap()
        .trim()
        .to_owned()
}

#[tokio::test]
async fn the_last_exit_code_is_ours() {
    for (script, want) in [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137)] {
        let supervisor = start(&[sh("true"), sh(script)], true);
        assert_eq!(supervisor.wait().await.unwrap(), want, "{script}");
        assert_eq!(supervisor.wait().await.unwrap(), want, "asked again");
        assert!(!supervisor.signal(Signal::TERM), "nothing left to signal");
    }
}

#[tokio::test]
async fn a_failure_before_the_last_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("ran");
    let touch = sh(&format!("touch {}", mark.display()));
    let supervisor = start(&[sh("exit 7"), touch], true);
    assert_eq!(supervisor.wait().await.unwrap(), 7);
    assert!(!mark.exists());
}

#[tokio::test]
async fn commands_for_candidates_are_skipped_elsewhere() {
    let commands = [if_candidate(sh("exit 7")), sh("exit 5")];
    assert_eq!(start(&commands, false).wait().await.unwrap(), 5);
    assert_eq!(start(&commands, true).wait().await.unwrap(), 7);
}

#[tokio::test]
async fn with_nothing_in_the_background_it_is_idle() {
    for commands in [vec![], vec![sh("true"), if_candidate(sh("exit 7"))]] {
        let supervisor = start(&commands, false);
        assert_eq!(supervisor.wait_or_idle().await.unwrap(), 0);
        assert!(matches!(*supervisor.progress.borrow(), Progress::Idle));
        assert_eq!(
            supervisor.shutdown(Duration::from_secs(10)).await.unwrap(),
            0
        );
    }
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_named() {
    let command = ExecCommand {
        argv: vec!["/no/such/program".into()],
        if_candidate: false,
    };
    let error = start(&[command], true).wait().await.unwrap_err();
    assert_eq!(error.to_string(), "start program `/no/such/program`");
}

#[tokio::test]
async fn signals_reach_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = fifo(dir.path());
    let script = format!(
        "trap 'exit 42' USR1; echo up > {}; while :; do read line < {}; done",
        fifo.display(),
        fifo.display()
    );
    let supervisor = start(&[sh(&script)], true);
    assert_eq!(read_fifo(&fifo).await, "up");
    assert!(supervisor.signal(Signal::USR1));
    assert_eq!(supervisor.wait().await.unwrap(), 42);
}

#[tokio::test]
async fn a_stop_during_an_early_command_starts_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (fifo, mark) = (fifo(dir.path()), dir.path().join("ran"));
    let early = format!(
        "trap 'exit 0' TERM; echo up > {0}; read x < {0}",
        fifo.display()
    );
    let supervisor = start(
        &[sh(&early), sh(&format!("touch {}", mark.display()))],
        true,
    );
    assert_eq!(read_fifo(&fifo).await, "up");
    assert_eq!(
        supervisor.shutdown(Duration::from_secs(60)).await.unwrap(),
        0
    );
    assert!(!mark.exists());
}

#[tokio::test]
async fn shutdown_kills_a_program_that_ignores_term() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = fifo(dir.path());
    let script = format!(
        "trap '' TERM; echo up > {0}; while :; do read x < {0}; done",
        fifo.display()
    );
    let supervisor = start(&[sh(&script)], true);
    assert_eq!(read_fifo(&fifo).await, "up");
    assert_eq!(
        supervisor
            .shutdown(Duration::from_millis(20))
            .await
            .unwrap(),
        137
    );
}

/// Runs one of the helpers below in a process of its own: this test binary, started again.
fn helper(name: &str, argument: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("exec::tests::{name}"), "--nocapture"])
        .env(HELPER, argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Reads the helper's output up to the line with `mark`; returns what follows it on that line.
fn line_with(output: &mut impl std::io::BufRead, mark: &str) -> String {
    let mut lines = output.lines().map(Result::unwrap);
    let line = lines
        .find(|line| line.contains(mark))
        .unwrap_or_else(|| panic!("no `{mark}`"));
    line.split_once(mark).unwrap().1.trim().to_owned()
}

/// Helper: runs the given script under a supervisor, as the daemon would; ends with its code.
#[tokio::test]
async fn helper_supervises() {
    let Ok(script) = std::env::var(HELPER) else {
        return;
    };
    let mut signals = Signals::install().unwrap();
    let supervisor = start(&[sh(&script)], true);
    let code = supervisor.run_until_end(&mut signals).await.unwrap();
    std::process::exit(code);
}

/// Helper: has nothing left to run, and waits to be told to stop; ends with 40 more than its code.
#[tokio::test]
async fn helper_is_idle() {
    if std::env::var(HELPER).is_err() {
        return;
    }
    let mut signals = Signals::install().unwrap();
    let supervisor = start(&[sh("true"), if_candidate(sh("exit 7"))], false);
    supervisor.wait_or_idle().await.unwrap();
    println!("idle:");
    let code = supervisor.run_until_end(&mut signals).await.unwrap();
    std::process::exit(40 + code);
}

/// Helper: as a process that inherits orphans, makes one and reaps it.
#[test]
fn helper_inherits_orphans() {
    if std::env::var(HELPER).is_err() {
        return;
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    // Nobody waits for the inner shell, so it is handed to us when the outer ends.
    let mut outer = Command::new("sh")
        .args(["-c", "(exit 0) & exit 0"])
        .spawn()
        .unwrap();
    // Peeks until the orphan is a zombie beside `outer`, which nobody has waited for either.
    let own = Pid::from_child(&outer);
    let orphans = loop {
        let zombies = reap::zombies();
        if zombies.len() == 2 {
            break zombies;
        }
        thread::yield_now();
    };
    assert!(outer.wait().unwrap().success());
    let left = reap::reap_seen_again(&HashSet::new());
    assert_eq!(left.len(), 1, "an orphan seen once is left alone");
    assert!(left.is_subset(&orphans) && !left.contains(&own));
    assert!(reap::reap_seen_again(&left).is_empty());
    assert!(reap::zombies().is_empty(), "an orphan seen twice is reaped");
    std::process::exit(42);
}

#[test]
fn signals_of_the_daemon_are_forwarded() {
    for signal in [
        Signal::TERM,
        Signal::INT,
        Signal::HUP,
        Signal::USR2,
        Signal::WINCH,
    ] {
        let raw = signal.as_raw();
        // A trapped signal interrupts `wait`.
        let code = 100 + raw;
        let script =
            format!("sleep 1000 & trap \"kill $!; exit {code}\" {raw}; echo up:$$; wait; exit 1");
        let mut daemon = helper("helper_supervises", &script);
        let mut output = BufReader::new(daemon.stdout.take().unwrap());
        line_with(&mut output, "up:");
        rustix::process::kill_process(Pid::from_child(&daemon), signal).unwrap();
        assert_eq!(daemon.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn programs_die_with_a_killed_daemon() {
    // The child holds the pipe's write end: its end is our end of file.
    let mut daemon = helper("helper_supervises", "echo up:$$; exec tail -f /dev/null");
    let mut output = BufReader::new(daemon.stdout.take().unwrap());
    let child: i32 = line_with(&mut output, "up:").parse().unwrap();
    assert!(Path::new(&format!("/proc/{child}")).exists());
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
}

#[test]
fn a_daemon_with_nothing_in_the_background_stops_when_told() {
    // The first program ends well and the second is for candidates only.
    let mut daemon = helper("helper_is_idle", "1");
    let mut output = BufReader::new(daemon.stdout.take().unwrap());
    line_with(&mut output, "idle:");
    rustix::process::kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(40));
}

#[test]
fn orphans_are_reaped_when_seen_twice() {
    let mut inheritor = helper("helper_inherits_orphans", "1");
    assert_eq!(inheritor.wait().unwrap().code(), Some(42));
}

#[test]
fn a_child_is_reaped_and_leaves_no_zombie() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let supervisor = start(&[sh("exit 0")], true);
    assert_eq!(runtime.block_on(supervisor.wait()).unwrap(), 0);
    assert_eq!(supervisor.current.lock().child, None);
}
