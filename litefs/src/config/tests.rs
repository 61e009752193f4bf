//! The whole way from text to [`Resolved`], and every refusal with its exact text.

use super::*;
use std::time::Duration;

const STATIC: &str = "lease: {type: static}\n";

fn env() -> Env {
    let vars = [
        ("FLY_REGION", "ams"),
        ("PRIMARY_REGION", "ams"),
        ("HOME", "/home/app"),
    ];
    Env::new(
        vars.map(|(name, value)| (name.to_owned(), value.to_owned())),
        "box".to_owned(),
    )
}

fn ok(text: &str) -> Resolved {
    parse(text, &Overrides::default(), &env()).unwrap()
}

fn refusal(text: &str) -> String {
    parse(text, &Overrides::default(), &env())
        .unwrap_err()
        .to_string()
}

#[test]
fn defaults_are_those_of_litefs() {
    let config = ok(STATIC);
    assert_eq!(
        (config.exit_on_error, config.skip_sync, config.strict_verify),
        (true, false, false)
    );
    assert_eq!(config.data.dir, Path::new("/var/lib/litefs"));
    assert!(config.data.compress);
    assert_eq!(config.data.retention, Some(Duration::from_secs(600)));
    assert_eq!(
        config.data.retention_monitor_interval,
        Some(Duration::from_secs(60))
    );
    assert_eq!(config.data.retention_size_bytes, Some(1 << 30));
    assert_eq!(config.data.segment_size_bytes, 16 << 20);
    assert_eq!(config.fuse.dir, Path::new("/litefs"));
    assert_eq!((config.fuse.allow_other, config.fuse.debug), (false, false));
    assert_eq!(
        (config.fuse.passthrough, config.fuse.threads.get()),
        (Passthrough::Auto, 4)
    );
    assert_eq!(config.http.addr, ListenAddr::any(20202));
    assert_eq!(config.http.snapshot_timeout, Some(Duration::from_secs(600)));
    assert_eq!(config.lease.role, Role::Primary);
    assert_eq!(config.lease.hostname, "box");
    assert_eq!(config.lease.advertise_url, NodeUrl::new("box", 20202));
    assert_eq!(config.lease.reconnect_delay, Duration::from_secs(1));
    assert!(config.lease.databases.takes_all());
    let log = Log {
        format: LogFormat::Text,
        timestamp: false,
        level: LogLevel::Info,
        level_is_from_flag: false,
    };
    assert_eq!(config.log, log);
    assert!(config.exec.is_empty() && config.is_candidate());
}

#[test]
fn unmarshal_config_ok() {
    let config = ok(r#"
exec: "node server.js --name 'two words'"
exit-on-error: false
skip-sync: true
data: {dir: /data, compress: false, retention: 0, retention-monitor-interval: -1s, retention-size: 0, segment-size: 1MiB}
fuse: {dir: /mnt/db, allow-other: true, debug: true, passthrough: off, threads: 2}
http: {addr: "localhost:3000", snapshot-timeout: 1m30s}
lease:
  type: "static"
  candidate: ${FLY_REGION != PRIMARY_REGION}
  advertise-url: "http://primary.internal:20202"
  reconnect-delay: 250ms
  databases: [app.db, tenants/*]
log: {format: json, timestamp: true, debug: true}
proxy: {addr: ":8080", db: app.db, passthrough: ["*.png"]}
tracing: {enabled: false, path: /tmp/trace}
backup: {url: "https://x"}
"#);
    let argv = ["node", "server.js", "--name", "two words"]
        .map(Into::into)
        .to_vec();
    assert_eq!(
        config.exec,
        [ExecCommand {
            argv,
            if_candidate: false
        }]
    );
    assert_eq!((config.exit_on_error, config.skip_sync), (false, true));
    assert_eq!(config.data.retention, None);
    assert_eq!(config.data.retention_monitor_interval, None);
    assert_eq!(config.data.retention_size_bytes, None);
    assert_eq!(config.data.segment_size_bytes, 1 << 20);
    assert_eq!(
        (config.fuse.passthrough, config.fuse.threads.get()),
        (Passthrough::Off, 2)
    );
    assert_eq!(config.http.addr.to_string(), "localhost:3000");
    assert_eq!(config.http.snapshot_timeout, Some(Duration::from_secs(90)));
    assert_eq!(config.lease.role, Role::Replica);
    assert_eq!(config.lease.hostname, "primary.internal");
    assert_eq!(
        config.lease.advertise_url,
        NodeUrl::new("primary.internal", 20202)
    );
    assert_eq!(config.lease.reconnect_delay, Duration::from_millis(250));
    assert!(
        config
            .lease
            .databases
            .matches(&"tenants/7.db".parse().unwrap())
    );
    assert_eq!(
        (config.log.format, config.log.level),
        (LogFormat::Json, LogLevel::Debug)
    );
    assert!(!config.is_candidate());
}

#[test]
fn flags_override_the_file() {
    let overrides = Overrides {
        fuse_debug: true,
        tracing: true,
        skip_unmount: true,
        no_expand_env: true,
        command: vec!["sh".into(), "-c".into(), "a b".into()],
        ..Overrides::default()
    };
    let text =
        "exec: [{cmd: x, if-candidate: true}, {cmd: y}]\nlease: {type: static, hostname: $X}";
    let config = parse(text, &overrides, &env()).unwrap();
    assert_eq!(
        config.exec,
        [ExecCommand {
            argv: overrides.command.clone(),
            if_candidate: false
        }]
    );
    assert!(config.fuse.debug && config.fuse.skip_unmount);
    assert!(config.log.level == LogLevel::Trace && config.log.level_is_from_flag);
    assert_eq!(config.lease.hostname, "$X");
}

#[test]
fn the_primary_is_advertised_at_the_port_it_listens_on() {
    let config = ok("lease: {type: static, hostname: db1}\nhttp: {addr: ':3000'}");
    assert_eq!(config.lease.advertise_url.to_string(), "http://db1:3000");
}

#[test]
fn mount_command_validate_directories() {
    for (section, want) in [
        (
            "fuse: {dir: ''}",
            "fuse.dir: a directory is required: name a directory, or remove the key for /litefs",
        ),
        (
            "data: {dir: ''}",
            "data.dir: a directory is required: name a directory, or remove the key for /var/lib/litefs",
        ),
        (
            "data: {dir: /a}\nfuse: {dir: /b/../a/}",
            "fuse.dir: it is the same directory as data.dir, /a: choose two directories apart",
        ),
        (
            "data: {dir: /a}\nfuse: {dir: /a/mnt}",
            "fuse.dir: /a/mnt lies within data.dir, /a: choose two directories apart",
        ),
        (
            "data: {dir: /litefs/data}",
            "fuse.dir: /litefs contains data.dir, /litefs/data: choose two directories apart",
        ),
    ] {
        assert_eq!(refusal(&format!("{STATIC}{section}")), want);
    }
    ok(&format!(
        "{STATIC}data: {{dir: /a/bc}}\nfuse: {{dir: /a/b}}"
    ));
}

#[test]
fn a_link_does_not_hide_that_directories_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("real"), dir.path().join("link")).unwrap();
    let base = dir.path().display();
    let text = format!("{STATIC}data: {{dir: {base}/real/d}}\nfuse: {{dir: {base}/link/d/mnt}}");
    assert!(refusal(&text).contains("lies within data.dir"));
}

#[test]
fn refusals_say_what_where_and_what_to_do() {
    let lease = "write these three lines instead\n  lease:\n    type: raft\n    \
        advertise-url: \"http://THIS-NODE:20202\"\n    \
        peers: [\"http://NODE-1:20202\", \"http://NODE-2:20202\", \"http://NODE-3:20202\"]    # the same on every node";
    let table = [
        ("", format!("lease.type: a type is required: {lease}")),
        (
            "lease: {type: consul, consul: {url: 'http://c:8500'}}",
            format!("lease.type: Consul is neither needed nor supported: {lease}"),
        ),
        (
            "lease: {type: etcd}",
            format!("lease.type: `etcd` is not a type of lease: {lease}"),
        ),
        (
            "lease: {type: raft, candidate: false}",
            "lease.peers: a node with `candidate: false` must know nodes that elect its primary: \
             write peers: [\"http://CANDIDATE:20202\"] under lease"
                .to_owned(),
        ),
        (
            "lease: {type: static, peers: ['http://a:1']}",
            "lease.peers: peers elect a primary, and a static lease names it: \
             write `type: raft` under lease, or remove the list"
                .to_owned(),
        ),
        (
            "lease: {type: raft, peers: ['a:1']}",
            "lease.peers: `a:1` is not a node's URL: write http://HOST:20202, without a path"
                .to_owned(),
        ),
        (
            "lease: {type: static, candidate: false}",
            "lease.advertise-url: a node with `candidate: false` must know its primary: \
             write advertise-url: \"http://PRIMARY:20202\" under lease"
                .to_owned(),
        ),
        (
            "lease: {type: static, advertise-url: 'primary:20202'}",
            "lease.advertise-url: `primary:20202` is not a node's URL: \
             write http://HOST:20202, without a path"
                .to_owned(),
        ),
        (
            "lease: {type: static, databases: [a]}",
            "lease.databases: a primary holds every database: \
             remove the list, or set `lease.candidate: false` to make this a replica"
                .to_owned(),
        ),
        (
            "lease: {type: static, candidate: false, advertise-url: 'http://a:1', databases: [/a]}",
            "lease.databases: \"/a\" is empty, too long, or not relative to the mount: \
             write names relative to the mount, such as app.db or tenants/*"
                .to_owned(),
        ),
        (
            "lease: {type: static}\nproxy: {target: 'localhost:3000'}",
            "proxy.addr: the proxy needs an address of its own, beside proxy.target: \
             write HOST:PORT, or :8080 for all interfaces"
                .to_owned(),
        ),
        (
            "lease: {type: static}\nbackup: {type: litefs-cloud}",
            "backup.type: backup is not in this version: \
             remove `backup.type` and copy databases with `litefs export`"
                .to_owned(),
        ),
        (
            "lease: {type: static}\ntracing: {path: /tmp/t}",
            "tracing.path: the trace file is not in this version: \
             remove `tracing.path` and use `litefs mount -tracing`, which logs to stderr"
                .to_owned(),
        ),
        (
            "lease: {type: static}\nhttp: {addr: '20202'}",
            "http.addr: `20202` is not an address: write HOST:PORT, or :PORT for all interfaces"
                .to_owned(),
        ),
        (
            "lease: {type: static}\nfuse: {passthrough: on}",
            "fuse.passthrough: `on` is not a mode: write auto or off".to_owned(),
        ),
        (
            "lease: {type: static}\nfuse: {threads: 0}",
            "fuse.threads: 0 threads cannot serve a mount: choose 1 to 256".to_owned(),
        ),
        (
            "lease: {type: static}\ndata: {segment-size: 1}",
            "data.segment-size: 1 bytes is out of range: choose 64KiB to 1GiB".to_owned(),
        ),
        (
            "lease: {type: static}\nlog: {format: xml}",
            "log.format: `xml` is not a format: write text or json".to_owned(),
        ),
        (
            "lease: {type: static}\nexec: \"sh -c 'x\"",
            "exec: `sh -c 'x` has a quote or backslash that does not end: close it".to_owned(),
        ),
        (
            "lease: {type: static}\nexec: [{if-candidate: true}]",
            "exec: `` names no program: write a command line".to_owned(),
        ),
    ];
    for (text, want) in table {
        assert_eq!(refusal(text), want);
    }
}

#[test]
fn files_are_searched_in_order_and_named_in_errors() {
    let paths = search_paths(&env());
    let want = ["litefs.yml", "/home/app/litefs.yml", "/etc/litefs.yml"];
    assert_eq!(paths, want.map(PathBuf::from));

    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["a.yml", "b.yml"].map(|name| dir.path().join(name));
    let error = find(&[first.clone(), second.clone()])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("no config file found (searched "),
        "{error}"
    );
    std::fs::write(&second, STATIC).unwrap();
    assert_eq!(find(&[first.clone(), second.clone()]).unwrap().0, second);

    std::fs::write(&first, "\nlease: {typ: static}\n").unwrap();
    let error = load(Some(&first), &Overrides::default(), &env()).unwrap_err();
    let chain = format!("{:#}", anyhow::Error::from(error));
    let want = "line 2: unknown key `lease.typ`: did you mean `lease.type`?";
    assert_eq!(chain, format!("config file {}: {want}", first.display()));
}

#[test]
fn the_sample_file_is_valid_and_says_the_defaults() {
    let sample = ok(include_str!("../../../docs/litefs.example.yml"));
    let mut defaults = ok("lease: {type: static, advertise-url: 'http://box:20202'}");
    defaults.exec.clone_from(&sample.exec);
    assert_eq!(sample, defaults);
}

#[test]
fn the_manual_has_a_row_for_every_key() {
    let manual = include_str!("../../../docs/configuration.md");
    for key in KEYS {
        assert!(
            manual.contains(&format!("| `{}` |", key.path)),
            "no row for {}",
            key.path
        );
    }
}
