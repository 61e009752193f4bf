//! Daemons that are not root's: `/dev/fuse` is open to them as on any Debian, here in a mount namespace of each node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::find_program;
use crate::harness::{Node, Options, cannot_mount, wait_for};

const TOOLS: [&str; 5] = ["unshare", "nsenter", "setpriv", "fusermount3", "sqlite3"];

/// Opens `/dev/fuse` to all, in this namespace, and runs the rest as nobody.
const AS_NOBODY: &str = "set -e; mkdir -p $0; mount -t tmpfs -o dev tmpfs $0; mknod -m 666 $0/fuse c 10 229; \
    mount --bind $0/fuse /dev/fuse; exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";

fn options(dir: &Path) -> Options {
    let device = dir.join("dev").display().to_string();
    Options {
        as_nobody_by: [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            AS_NOBODY,
            &device,
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Options::default()
    }
}

/// Runs a shell as nobody where the node's mount is to be seen, in the mount; returns what it printed.
fn sh(node: &Node, script: &str) -> String {
    let done = Command::new("nsenter")
        .args(["-m", "-t", &node.pid().to_string(), "--"])
        .args([
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-ec",
        ])
        .arg(format!("cd {}/mnt; {script}", node.dir.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{script}: {said}{errors}");
    said
}

#[test]
fn nodes_without_root_replicate_and_survive_their_daemon() {
    if cannot_mount() {
        return;
    }
    if let Some(missing) = TOOLS.iter().find(|t| find_program(t, "").is_none()) {
        eprintln!("skipped: {missing} is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_litefs"), dir.path().join("litefs")).unwrap();
    let mut primary = Node::primary_with(dir.path(), options(dir.path()));
    let mut replica = Node::replica_with(dir.path(), "replica", &primary, options(dir.path()));
    let modes = ["wal", "delete", "truncate", "persist", "memory", "off"];
    let count = |node: &Node, mode: &str| {
        sh(
            node,
            &format!(
                "[ ! -e {mode}.db ] || sqlite3 -readonly {mode}.db 'PRAGMA busy_timeout=9000; SELECT count(*) FROM t; PRAGMA integrity_check'"
            ),
        )
    };
    let mut want = String::new();
    for round in 1..=3 {
        for mode in modes {
            sh(
                &primary,
                &format!(
                    "sqlite3 {mode}.db 'PRAGMA journal_mode={mode}; CREATE TABLE IF NOT EXISTS t(x); \
                     INSERT INTO t VALUES(randomblob(5000)),(2)'"
                ),
            );
        }
        want = format!("9000\n{}\nok\n", 2 * round);
        for mode in modes {
            assert_eq!(count(&primary, mode), want, "{mode}");
            wait_for(mode, || count(&replica, mode) == want);
        }
        // The mount goes with its namespace, and that with its last process.
        primary.kill();
        primary.launch();
        if round == 2 {
            replica.kill();
            replica.launch();
        }
    }
    for mode in modes {
        assert_eq!(count(&primary, mode), want, "{mode}");
    }
    let script = "mkdir -p a/b; echo text >a/b/f; chmod 600 a/b/f; ln a/b/f g; ln -s a/b/f s; mv a c; cat c/b/f g; \
         ! cat s 2>/dev/null; truncate -s 3 g; stat -c '%s %h %a' c/b/f; rm g s; rm -r c; ls";
    let said = sh(&primary, script);
    assert!(said.starts_with("text\ntext\n3 2 600\n"), "{said}");
    assert!(
        primary.log().contains("slower"),
        "the kernel needs root for passthrough"
    );
}
