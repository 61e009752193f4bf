//! The HTTP proxy, with real nodes, a real program behind each, and clients that send what they like.

mod app;
mod client;

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::harness::{Cluster, Node, Options, cannot_mount, free_ports, wait_for};
use app::{App, runtime};
use client::{Answer, Relay, ask, connect, get, parse, raw, read_answer};

/// A node with a program behind its proxy.
struct Site {
    node: Node,
    app: App,
    proxy: u16,
}

fn options(app: &App, proxy: u16, more: &str) -> Options {
    Options {
        keys: format!(
            "proxy: {{addr: '127.0.0.1:{proxy}', target: '127.0.0.1:{}', db: app.db{more}}}",
            app.port
        ),
        ..Options::default()
    }
}

const PRIMARY_ONLY: &str =
    ", always-forward: ['/ws', '/also-forwarded', '/events-of-primary'], passthrough: ['/pass*']";

impl Site {
    fn primary(dir: &Path, more: &str) -> Site {
        let app = App::start(dir.join("primary/mnt"), "primary");
        let proxy = free_ports(1)[0];
        let node = Node::primary_with(dir, options(&app, proxy, &format!("{PRIMARY_ONLY}{more}")));
        let db = node.open("app.db");
        db.execute_batch("PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT); INSERT INTO t(v) VALUES('first');")
            .unwrap();
        drop(db);
        let site = Site { node, app, proxy };
        site.wait_until_served();
        site
    }

    fn replica(dir: &Path, name: &str, port: u16, more: &str) -> Site {
        let app = App::start(dir.join(name).join("mnt"), name);
        let proxy = free_ports(1)[0];
        let options = options(&app, proxy, &format!("{PRIMARY_ONLY}{more}"));
        let mut node = Node::replica_of_port(dir, name, port, options);
        node.launch();
        let site = Site { node, app, proxy };
        site.wait_until_served();
        site
    }

    fn wait_until_served(&self) {
        wait_for("the proxy to listen", || {
            std::net::TcpStream::connect(("127.0.0.1", self.proxy)).is_ok()
        });
    }
}

/// A primary, and a replica whose stream comes through a relay.
fn pair(dir: &Path, more: &str) -> (Site, Relay, Site) {
    let primary = Site::primary(dir, more);
    let relay = Relay::start(primary.node.port);
    let replica = Site::replica(dir, "replica", relay.port, more);
    wait_for("the replica to be level", || {
        replica.node.pos("app.db").is_some()
            && replica.node.pos("app.db") == primary.node.pos("app.db")
    });
    (primary, relay, replica)
}

fn with(token: &str) -> String {
    format!("Cookie: theme=dark; __txid={token}\r\n")
}

fn rows(node: &Node, sql: &str) -> i64 {
    node.open("app.db")
        .query_row(sql, [], |r| r.get(0))
        .unwrap()
}

#[test]
fn a_client_reads_its_writes_on_a_replica_that_is_late() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, relay, replica) = pair(dir.path(), ", wait-timeout: 10s");
    let port = replica.proxy;
    let first = get(port, "/count", "");
    assert_eq!((first.status, first.body.as_str()), (200, "replica 1"));
    relay.close();
    let added = ask(port, "POST", "/add", "", "one");
    assert_eq!(
        (added.status, added.body.as_str()),
        (201, "primary added"),
        "{added:?}"
    );
    let token = added.cookie().unwrap();
    assert_eq!(added.header("litefs-position"), Some(token.as_str()));
    let attributes = added.header("set-cookie").unwrap();
    for attribute in ["Path=/", "HttpOnly", "Max-Age=300", "SameSite=Lax"] {
        assert!(attributes.contains(attribute), "{attributes}");
    }
    // Who asks for less sees the past, which shows that the replica is late.
    let stale = get(
        port,
        "/count",
        &format!("{}Litefs-Consistency: eventual\r\n", with(&token)),
    );
    assert_eq!(stale.body, "replica 1");
    let stale = get(
        port,
        "/count",
        &with(&format!("{token}; __litefs_consistency=eventual")),
    );
    assert_eq!(stale.body, "replica 1");
    // The read waits, and is answered by the replica once that has come level.
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| get(port, "/count", &with(&token)));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!reading.is_finished());
        relay.open();
        assert_eq!(reading.join().unwrap().body, "replica 2");
    });
    // LiteFS's cookie does the same, and so does the header.
    for (i, as_cookie) in [true, false].into_iter().enumerate() {
        relay.close();
        let added = ask(primary.proxy, "POST", "/add", "", "more");
        let txid = added.cookie().unwrap();
        let txid = txid.split([':', '/']).nth(1).unwrap().to_owned();
        let headers = match as_cookie {
            true => with(&txid),
            false => format!("Litefs-Position: {txid}\r\n"),
        };
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| get(port, "/count", &headers));
            std::thread::sleep(Duration::from_millis(200));
            assert!(!reading.is_finished(), "{headers}");
            relay.open();
            assert_eq!(reading.join().unwrap().body, format!("replica {}", 3 + i));
        });
    }
}

#[test]
fn a_read_goes_to_the_primary_when_waiting_is_in_vain() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, relay, replica) = pair(
        dir.path(),
        ", wait-timeout: 300ms, primary-redirect-timeout: 500ms",
    );
    let port = replica.proxy;
    let level = get(port, "/count", "Litefs-Consistency: strong\r\n");
    assert_eq!(level.body, "replica 1");
    relay.close();
    let token = ask(port, "POST", "/add", "", "one").cookie().unwrap();
    let began = Instant::now();
    let read = get(port, "/count", &with(&token));
    assert_eq!(read.body, "primary 2");
    assert!(
        began.elapsed() >= Duration::from_millis(290),
        "{:?}",
        began.elapsed()
    );
    // A bound and a confirmation do not wait for ever either.
    for level in ["bounded=100ms", "strong"] {
        let read = get(port, "/count", &format!("Litefs-Consistency: {level}\r\n"));
        assert_eq!(read.body, "primary 2", "{level}");
    }
    let read = get(port, "/count", "Litefs-Consistency: bounded=1h\r\n");
    assert_eq!(read.body, "replica 1");
    relay.open();
    wait_for("the replica to be level", || {
        get(port, "/count", "").body == "replica 2"
    });
    for level in ["bounded=100ms", "strong"] {
        let read = get(port, "/count", &format!("Litefs-Consistency: {level}\r\n"));
        assert_eq!(read.body, "replica 2", "{level}");
    }
    // Without any primary there is nothing left to try.
    relay.close();
    let token = ask(port, "POST", "/add", "", "two").cookie().unwrap();
    let direct = Site::replica(
        dir.path(),
        "direct",
        primary.node.port,
        ", primary-redirect-timeout: 500ms",
    );
    let Site { mut node, .. } = primary;
    node.kill();
    let read = get(port, "/count", &with(&token));
    assert_eq!(read.status, 504, "{read:?}");
    let written = ask(direct.proxy, "POST", "/add", "", "three");
    assert_eq!(written.status, 503, "{written:?}");
    assert_eq!(written.header("retry-after"), Some("1"));
    assert!(
        written.body.contains("nothing of this request was done"),
        "{written:?}"
    );
    relay.open();
}

#[test]
fn a_token_of_a_branch_that_was_lost_locks_nobody_out() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, _relay, replica) = pair(dir.path(), "");
    let here = get(primary.proxy, "/count", "").cookie().unwrap();
    for lost in [
        "app.db:00000000000fffff/8000000000000001@1",
        "app.db:00000000000fffff",
        "00000000000fffff",
    ] {
        for site in [&primary, &replica] {
            let began = Instant::now();
            let read = get(site.proxy, "/count", &with(lost));
            assert_eq!(
                (read.status, read.body.as_str()),
                (200, "primary 1"),
                "{lost}"
            );
            assert_eq!(read.cookie().as_deref(), Some(here.as_str()), "{lost}");
            assert!(
                began.elapsed() < Duration::from_secs(3),
                "{lost}: {:?}",
                began.elapsed()
            );
        }
        assert_eq!(get(replica.proxy, "/count", &with(&here)).body, "replica 1");
    }
    // The same transaction, but another one.
    let forged = format!("{}/8123456789abcdef@1", here.split('/').next().unwrap());
    let read = get(primary.proxy, "/count", &with(&forged));
    assert_eq!(read.cookie().as_deref(), Some(here.as_str()));
}

#[test]
fn a_get_that_writes_is_noticed_and_a_read_is_followed() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, _relay, replica) = pair(dir.path(), "");
    let before = get(primary.proxy, "/count", "").cookie().unwrap();
    // Nothing is new to who is level.
    let again = get(primary.proxy, "/count", &with(&before));
    assert_eq!(
        (again.cookie(), again.header("litefs-position")),
        (None, Some(before.as_str()))
    );
    let written = get(primary.proxy, "/add-by-get", &with(&before));
    assert_eq!(written.status, 201);
    let token = written.cookie().unwrap();
    assert!(token > before, "{token} {before}");
    assert_eq!(
        get(replica.proxy, "/count", &with(&token)).body,
        "replica 2"
    );
    let forwarded = get(replica.proxy, "/also-forwarded", &with(&token));
    assert_eq!(forwarded.body, "primary added");
    assert!(forwarded.cookie().unwrap() > token);
    // Caches that many share get no cookie of one.
    let shared = get(primary.proxy, "/public", "");
    assert_eq!(
        (shared.status, shared.cookie(), shared.header("x-private")),
        (200, None, None)
    );
    assert!(shared.header("litefs-position").is_some());
    // Paths that are passed through are nobody's business.
    let passed = get(replica.proxy, "/pass/x", &with("0000ffffffffffff"));
    assert_eq!(
        (passed.status, passed.body.as_str()),
        (404, "replica no /pass/x")
    );
    assert_eq!(
        (passed.cookie(), passed.header("litefs-position")),
        (None, None)
    );
    // A bad cookie is replaced.
    let read = get(primary.proxy, "/count", &with("..;%00"));
    assert_eq!((read.status, read.cookie().is_some()), (200, true));
}

#[test]
fn requests_arrive_as_they_were_sent_but_for_what_is_of_a_connection() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_primary, _relay, replica) = pair(dir.path(), "");
    let sent = "X-Secret: 1\r\nConnection: X-Secret\r\nKeep-Alive: 5\r\nLitefs-Forward: LFSC0\r\nX-Forwarded-For: 9.9.9.9\r\nX-Own: a\r\nX-Own: b\r\n";
    for method in ["GET", "POST"] {
        let seen = ask(replica.proxy, method, "/headers?a=1&b=%2F", sent, "");
        let lines: Vec<&str> = seen.body.lines().collect();
        assert_eq!(lines[0], format!("{method} /headers?a=1&b=%2F"));
        for want in [
            "host: app.example",
            "x-forwarded-for: 9.9.9.9, 127.0.0.1",
            "x-forwarded-host: app.example",
            "x-forwarded-proto: http",
            "forwarded: for=127.0.0.1;host=app.example;proto=http",
            "x-own: a",
            "x-own: b",
        ] {
            assert!(
                lines.contains(&want),
                "{method}: no {want:?} in {}",
                seen.body
            );
        }
        for bad in ["x-secret", "keep-alive", "litefs-forward", "connection"] {
            assert!(
                !lines.iter().any(|line| line.starts_with(bad)),
                "{method}: {bad} in {}",
                seen.body
            );
        }
    }
}

#[test]
fn large_bodies_are_streamed_and_refused_before_they_are_sent() {
    if cannot_mount() {
        return;
    }
    const CHUNK: usize = 256 << 10;
    const CHUNKS: usize = 256;
    let dir = tempfile::tempdir().unwrap();
    let (primary, _relay, replica) = pair(dir.path(), "");
    let chunk: Vec<u8> = (0..=250_u8).cycle().take(CHUNK).collect();
    let mut crc = crc32fast::Hasher::new();
    for _ in 0..CHUNKS {
        crc.update(&chunk);
    }
    let before = [&primary, &replica].map(|site| peak_kb(&site.node));
    let want = format!("primary {} {:08x}", CHUNK * CHUNKS, crc.finalize());
    for framing in [
        "Transfer-Encoding: chunked".to_owned(),
        format!("Content-Length: {}", CHUNK * CHUNKS),
    ] {
        let mut tcp = connect(replica.proxy);
        write!(
            tcp,
            "POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{framing}\r\n\r\n"
        )
        .unwrap();
        let is_chunked = framing.ends_with("chunked");
        for _ in 0..CHUNKS {
            if is_chunked {
                write!(tcp, "{CHUNK:x}\r\n").unwrap();
            }
            tcp.write_all(&chunk).unwrap();
            if is_chunked {
                tcp.write_all(b"\r\n").unwrap();
            }
        }
        if is_chunked {
            tcp.write_all(b"0\r\n\r\n").unwrap();
        }
        assert_eq!(read_answer(&mut tcp).unwrap().body, want, "{framing}");
    }
    for (site, before) in [&primary, &replica].into_iter().zip(before) {
        let grown = peak_kb(&site.node) - before;
        assert!(grown < 24 << 10, "{grown} KB more for a body of 64 MiB");
    }
    // Whoever waits to be asked is refused instead, by the program, over both nodes.
    let mut tcp = connect(replica.proxy);
    write!(tcp, "POST /refuse HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 5000000\r\n\r\n").unwrap();
    let refused = read_answer(&mut tcp).unwrap();
    assert_eq!(refused.status, 413);
    assert_eq!(refused.header("connection"), Some("close"));
    assert!(!refused.head.contains("100 Continue"));
    let mut tcp = connect(replica.proxy);
    write!(tcp, "POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").unwrap();
    let mut asked = [0; 25];
    tcp.read_exact(&mut asked).unwrap();
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    tcp.write_all(b"12345").unwrap();
    assert!(
        read_answer(&mut tcp)
            .unwrap()
            .body
            .starts_with("primary 5 ")
    );
}

fn peak_kb(node: &Node) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn websockets_go_where_they_should() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut primary, _relay, replica) = pair(dir.path(), "");
    let open = |path: &str, name: &str| {
        let mut tcp = connect(replica.proxy);
        write!(
            tcp,
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            tcp.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.to_lowercase().contains("upgrade: websocket"), "{head}");
        let mut hello = vec![0; name.len()];
        tcp.read_exact(&mut hello).unwrap();
        assert_eq!(hello, name.as_bytes());
        tcp
    };
    let mut forwarded = open("/ws", "primary");
    let mut local = open("/ws-here", "replica");
    for message in ["a", "bc", &"x".repeat(100_000)] {
        for tcp in [&mut forwarded, &mut local] {
            let mut from = tcp.try_clone().unwrap();
            let mut back = vec![0; message.len()];
            std::thread::scope(|scope| {
                scope.spawn(|| tcp.write_all(message.as_bytes()).unwrap());
                from.read_exact(&mut back).unwrap();
            });
            assert_eq!(back, message.as_bytes());
        }
    }
    // Its end is heard on both sides.
    primary.node.kill();
    assert_eq!(forwarded.read(&mut [0]).unwrap_or(0), 0);
    local.write_all(b"still").unwrap();
    let mut back = [0; 5];
    local.read_exact(&mut back).unwrap();
}

#[test]
fn events_arrive_one_by_one_and_trailers_at_the_end() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, _relay, replica) = pair(dir.path(), "");
    for (path, site, name) in [
        ("/events", &replica, "replica"),
        ("/events-of-primary", &primary, "primary"),
    ] {
        let mut tcp = connect(replica.proxy);
        write!(
            tcp,
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut seen = Vec::new();
        let first = format!("data: {name} 1\n\n");
        while !String::from_utf8_lossy(&seen).contains(&first) {
            let mut buf = [0; 1024];
            let n = tcp.read(&mut buf).unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buf[..n]);
        }
        assert!(!String::from_utf8_lossy(&seen).contains("data: 2"));
        site.app.release();
        tcp.read_to_end(&mut seen).unwrap();
        let all = parse(&seen).unwrap();
        assert_eq!(all.body.trim_end(), format!("{first}data: 2"), "{path}");
    }
    for (method, name) in [("GET", "replica"), ("POST", "primary")] {
        let request = format!(
            "{method} /trailers HTTP/1.1\r\nHost: a\r\nConnection: close, TE\r\nTE: trailers\r\nTrailer: X-Sum\r\n\
             Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 42\r\n\r\n"
        );
        let answer = raw(replica.proxy, request.as_bytes()).unwrap();
        assert!(
            answer.body.starts_with(&format!("{name} body")),
            "{answer:?}"
        );
        assert!(answer.body.contains("x-back: 42"), "{answer:?}");
    }
}

#[test]
fn http2_by_prior_knowledge() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_primary, _relay, replica) = pair(dir.path(), "");
    runtime().block_on(async {
        let tcp = tokio::net::TcpStream::connect(("127.0.0.1", replica.proxy))
            .await
            .unwrap();
        let (send, http) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tcp))
                .await
                .unwrap();
        tokio::spawn(http);
        let request = |method: &str, path: &str, body: &'static str| {
            hyper::Request::builder()
                .method(method)
                .uri(format!("http://app.example{path}"))
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .body(Full::new(bytes::Bytes::from(body)))
                .unwrap()
        };
        let many = (0..50).map(|i| {
            let mut send = send.clone();
            let request = match i % 2 {
                0 => request("POST", "/add", "two"),
                _ => request("GET", "/count", ""),
            };
            async move { send.send_request(request).await.unwrap().status().as_u16() }
        });
        let statuses = futures_util::future::join_all(many).await;
        let count = |want| statuses.iter().filter(|s| **s == want).count();
        assert_eq!((count(201), count(200)), (25, 25), "{statuses:?}");
        let mut send = send.clone();
        let seen = send
            .send_request(request("POST", "/headers", "x"))
            .await
            .unwrap();
        assert!(seen.headers().contains_key("litefs-position"));
        let body = seen.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        for want in [
            "host: app.example",
            "cookie: a=1; b=2",
            "x-forwarded-for: 127.0.0.1",
        ] {
            assert!(body.lines().any(|line| line == want), "{want}: {body}");
        }
    });
    let read = get(replica.proxy, "/count", "Litefs-Consistency: strong\r\n");
    assert_eq!(read.body, "replica 26");
}

#[test]
fn what_is_no_request_is_refused_and_harms_nobody() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, _relay, replica) =
        pair(dir.path(), ", read-header-timeout: 500ms, idle-timeout: 1s");
    let requests = || primary.app.state.requests.load(Ordering::Acquire);
    let before = requests();
    let long = "a".repeat(100_000);
    let many: String = (0..300).map(|i| format!("H{i}: x\r\n")).collect();
    let huge_token = "a:0000000000000001~".repeat(150);
    let table: Vec<(String, &[u16])> = vec![
        ("nonsense\r\n\r\n".into(), &[400]),
        ("GET / HTTP/9.9\r\nHost: a\r\n\r\n".into(), &[400, 505]),
        ("GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n".into(), &[400]),
        ("GET / HTTP/1.1\r\n\r\n".into(), &[400]),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".into(),
            &[400],
        ),
        ("POST / HTTP/1.1\r\nHost: a b\r\n\r\n".into(), &[400]),
        ("POST / HTTP/1.1\r\nHost: a@b\r\n\r\n".into(), &[400]),
        ("POST / HTTP/1.1\r\nHost : a\r\n\r\n".into(), &[400]),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nX: 1\r\n folded\r\nContent-Length: 0\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\n: x\r\nContent-Length: 0\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 6\r\n\r\nhello".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
                .into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n".into(),
            &[400],
        ),
        (
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            &[400],
        ),
        ("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n".into(), &[405]),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 0\r\n\r\n".into(),
            &[417],
        ),
        (
            "GET /count HTTP/1.1\r\nHost: a\r\nLitefs-Position: ../../etc\r\n\r\n".into(),
            &[400],
        ),
        (
            format!("GET /count HTTP/1.1\r\nHost: a\r\nLitefs-Position: {huge_token}\r\n\r\n"),
            &[400],
        ),
        (
            "GET /count HTTP/1.1\r\nHost: a\r\nLitefs-Consistency: perfect\r\n\r\n".into(),
            &[400],
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n"),
            &[431],
        ),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n"), &[431]),
        (
            format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"),
            &[414, 431],
        ),
    ];
    for site in [&primary, &replica] {
        for (request, want) in &table {
            let shown: String = request.chars().take(120).collect();
            let answer = raw(site.proxy, request.as_bytes());
            let status = answer.as_ref().map(|answer| answer.status);
            assert!(
                status.is_some_and(|s| want.contains(&s)),
                "{shown:?}: {answer:?}"
            );
        }
    }
    assert_eq!(requests(), before, "the program saw something of that");
    // What two servers could understand in two ways is understood in one: nothing is left over for a second request.
    for framing in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let smuggled = format!(
            "POST /upload HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n0\r\n\r\nGET /add-by-get HTTP/1.1\r\nHost: a\r\n\r\n"
        );
        for site in [&primary, &replica] {
            let answer = raw(site.proxy, smuggled.as_bytes());
            let status = answer.as_ref().map(|a| a.status);
            assert!(
                matches!(status, Some(400))
                    || answer.as_ref().is_some_and(
                        |a| a.body.starts_with("primary 0 ") && !a.body.contains("HTTP/1.1")
                    ),
                "{answer:?}"
            );
        }
    }
    for chunks in [
        "zz\r\nabc\r\n0\r\n\r\n",
        "-1\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "fffffffffffffffff\r\n",
        "3;\nx\r\nabc\r\n0\r\n\r\n",
    ] {
        for site in [&primary, &replica] {
            let request = format!(
                "POST /add HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
            );
            let answer = raw(site.proxy, request.as_bytes());
            assert!(
                answer.as_ref().is_some_and(|a| a.status == 400),
                "{chunks:?}: {answer:?}"
            );
        }
    }
    assert_eq!(rows(&primary.node, "SELECT count(*) FROM t"), 1);
    // Slow ones are cut off, with or without a beginning.
    for beginning in ["", "GET / HTTP/1.1\r\nHost", "PRI * HT"] {
        let began = Instant::now();
        let mut tcp = connect(replica.proxy);
        tcp.write_all(beginning.as_bytes()).unwrap();
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest);
        let took = began.elapsed();
        assert!(
            took >= Duration::from_millis(400) && took < Duration::from_secs(5),
            "{beginning:?}: {took:?}"
        );
    }
    // A client that stays is served again and again, until it is silent for too long.
    let mut tcp = connect(replica.proxy);
    for _ in 0..3 {
        tcp.write_all(b"GET /count HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let mut buf = [0; 4096];
        let n = tcp.read(&mut buf).unwrap();
        assert!(buf[..n].starts_with(b"HTTP/1.1 200"));
        std::thread::sleep(Duration::from_millis(700));
    }
    assert_eq!(tcp.read(&mut [0; 16]).unwrap_or(0), 0);
    assert_eq!(get(replica.proxy, "/count", "").body, "replica 1");
}

#[test]
fn thousands_of_silent_clients_cost_little() {
    if cannot_mount() {
        return;
    }
    let clients = match raise_files(11_000) {
        Some(11_000..) => 10_000,
        _ => 500,
    };
    let dir = tempfile::tempdir().unwrap();
    let primary = Site::primary(dir.path(), ", read-header-timeout: 60s, idle-timeout: 60s");
    let before = peak_kb(&primary.node);
    let mut silent = Vec::new();
    for i in 0..clients {
        let mut tcp = connect(primary.proxy);
        // Half of them said something once.
        if i % 2 == 0 {
            tcp.write_all(b"GET /litefs/health HTTP/1.1\r\nHost: a\r\n\r\n")
                .unwrap();
        }
        silent.push(tcp);
    }
    for tcp in silent.iter_mut().step_by(2) {
        let mut buf = [0; 1024];
        let n = tcp.read(&mut buf).unwrap();
        assert!(buf[..n].starts_with(b"HTTP/1.1 200"));
    }
    let read = get(primary.proxy, "/count", "");
    assert_eq!(read.body, "primary 1");
    let grown = peak_kb(&primary.node) - before;
    eprintln!("{clients} clients: {grown} KB");
    assert!(
        grown < 20 * clients,
        "{grown} KB for {clients} silent clients"
    );
}

fn raise_files(want: u64) -> Option<i64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(want).min(want);
    let raised = Rlimit {
        current: Some(most.max(limit.current.unwrap_or(0))),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).ok()?;
    i64::try_from(most).ok()
}

#[test]
fn a_write_that_is_cut_off_is_not_done_twice() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut primary, _relay, replica) = pair(dir.path(), ", primary-redirect-timeout: 2s");
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask(replica.proxy, "POST", "/slow", "", "x"));
        wait_for("the program to have it", || {
            primary.app.state.entered.load(Ordering::Acquire) == 1
        });
        primary.node.kill();
        let answer = asked.join().unwrap();
        primary.app.release();
        answer
    });
    assert_eq!(answer.status, 502, "{answer:?}");
    assert!(answer.body.contains("is not known"), "{answer:?}");
    assert_eq!(primary.app.state.entered.load(Ordering::Acquire), 1);
    assert_eq!(replica.app.state.entered.load(Ordering::Acquire), 0);
}

#[test]
fn a_program_that_comes_later_is_waited_for() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = free_ports(2);
    let options = Options {
        keys: format!(
            "proxy: {{addr: '127.0.0.1:{}', target: '127.0.0.1:{}', db: app.db}}",
            ports[0], ports[1]
        ),
        ..Options::default()
    };
    let _node = Node::primary_with(dir.path(), options);
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            wait_for("the proxy", || {
                std::net::TcpStream::connect(("127.0.0.1", ports[0])).is_ok()
            });
            ask(ports[0], "POST", "/", "", "x")
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!asked.is_finished());
        let listener = std::net::TcpListener::bind(("127.0.0.1", ports[1])).unwrap();
        let (mut tcp, _) = listener.accept().unwrap();
        let mut seen = [0; 4096];
        let n = tcp.read(&mut seen).unwrap();
        assert!(seen[..n].starts_with(b"POST / HTTP/1.1\r\n"));
        tcp.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        asked.join().unwrap()
    });
    assert_eq!(answer.status, 204);
}

#[test]
fn nodes_without_a_program_say_so() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    primary
        .open("app.db")
        .execute_batch("PRAGMA journal_mode=wal; CREATE TABLE t(v)")
        .unwrap();
    let replica = Site::replica(dir.path(), "replica", primary.port, "");
    let answer = ask(replica.proxy, "POST", "/add", "", "x");
    assert_eq!(answer.status, 502);
    assert!(
        answer.body.contains("has no proxy") && answer.body.contains("proxy.target"),
        "{answer:?}"
    );
    assert_eq!(get(replica.proxy, "/litefs/health", "").status, 200);
    // Another node's word is only taken within a cluster, and never passed on.
    let marked = |cluster: &str| {
        ask(
            replica.node.port,
            "POST",
            "/add",
            &format!("Litefs-Forward: {cluster}\r\n"),
            "x",
        )
    };
    assert_eq!(
        marked("LFSC0000000000000000").header("litefs-refused"),
        Some("other-cluster")
    );
    let info = replica.node.ask("GET", "/info").unwrap();
    let cluster = info
        .split("\"clusterID\":\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    assert_eq!(
        marked(&cluster).header("litefs-refused"),
        Some("not-primary")
    );
    assert_eq!(replica.app.state.requests.load(Ordering::Acquire), 0);
    let flying = Site::replica(dir.path(), "flying", primary.port, ", redirect: fly-replay");
    let answer = ask(flying.proxy, "POST", "/add", "", "x");
    assert_eq!(
        (answer.status, answer.header("fly-replay")),
        (200, Some("instance=primary"))
    );
    assert_eq!(flying.app.state.requests.load(Ordering::Acquire), 0);
    // Health follows the lag.
    let late = Site::replica(dir.path(), "late", primary.port, ", max-lag: 100ms");
    assert_eq!(get(late.proxy, "/litefs/health", "").status, 200);
    let mut primary = primary;
    primary.kill();
    wait_for("the lag to show", || {
        get(late.proxy, "/litefs/health", "").status == 503
    });
}

#[test]
fn waiting_without_the_proxy() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (primary, relay, replica) = pair(dir.path(), "");
    let wait = |site: &Site, query: &str| -> Answer {
        get(site.node.port, &format!("/v1/wait?{query}"), "")
    };
    let pos = primary.node.pos("app.db").unwrap();
    let pos = pos.trim();
    assert_eq!(wait(&replica, &format!("db=app.db&pos={pos}")).status, 200);
    relay.close();
    primary
        .node
        .open("app.db")
        .execute("INSERT INTO t(v) VALUES('x')", [])
        .unwrap();
    let next = primary.node.pos("app.db").unwrap();
    let next = next.trim();
    for query in [
        format!("pos={next}"),
        format!("pos={}", &next[..16]),
        "consistency=strong".into(),
        "consistency=bounded%3D10ms".into(),
    ] {
        let late = wait(&replica, &format!("db=app.db&timeout=100ms&{query}"));
        assert_eq!(late.status, 504, "{query}: {late:?}");
        assert!(late.body.contains(pos), "{late:?}");
    }
    assert_eq!(wait(&replica, "db=app.db&consistency=eventual").status, 200);
    std::thread::scope(|scope| {
        let there = scope.spawn(|| wait(&replica, &format!("db=app.db&pos={next}")));
        let strong = scope.spawn(|| wait(&replica, "db=app.db&consistency=strong"));
        let run = scope.spawn(|| {
            std::process::Command::new(env!("CARGO_BIN_EXE_litefs"))
                .args([
                    "wait", "-db", "app.db", "-pos", next, "-timeout", "20s", "-url",
                ])
                .arg(format!("http://127.0.0.1:{}", replica.node.port))
                .output()
                .unwrap()
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!there.is_finished() && !strong.is_finished() && !run.is_finished());
        relay.open();
        for answer in [there.join().unwrap(), strong.join().unwrap()] {
            assert_eq!(answer.status, 200, "{answer:?}");
            assert!(answer.body.contains(next), "{answer:?}");
        }
        let run = run.join().unwrap();
        assert!(run.status.success(), "{run:?}");
        assert_eq!(String::from_utf8_lossy(&run.stdout).trim(), next);
    });
    // A database that is not there yet may come.
    std::thread::scope(|scope| {
        let coming = scope.spawn(|| wait(&replica, "db=new.db&pos=0000000000000001"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!coming.is_finished());
        primary
            .node
            .open("new.db")
            .execute_batch("PRAGMA journal_mode=wal; CREATE TABLE t(v)")
            .unwrap();
        assert_eq!(coming.join().unwrap().status, 200);
    });
    for (query, status) in [
        ("", 400),
        ("db=app.db", 400),
        ("db=../x&pos=0000000000000001", 400),
        ("db=app.db&pos=1", 400),
        ("db=app.db&pos=other.db:0000000000000001", 400),
        ("db=app.db&pos=0000000000000001&timeout=soon", 400),
        ("db=app.db&pos=0000000000000001&consistency=strong", 400),
        ("db=app.db&consistency=session", 400),
        ("db=app.db&consistency=perfect", 400),
        ("db=app.db-wal&pos=0000000000000001", 404),
    ] {
        assert_eq!(wait(&replica, query).status, status, "{query}");
    }
}

/// Three nodes that elect their primary, each with a program.
struct Sites {
    cluster: Cluster,
    apps: Vec<App>,
    proxies: Vec<u16>,
}

fn three(dir: &Path, more: &str) -> Sites {
    let proxies = free_ports(3);
    let ports = free_ports(3);
    let apps: Vec<App> = (0..3)
        .map(|i| App::start(dir.join(format!("node{i}/mnt")), &format!("node{i}")))
        .collect();
    let mut nodes: Vec<Node> = (0..3)
        .map(|i| {
            Node::elector(
                dir,
                i,
                &ports,
                options(&apps[i], proxies[i], &format!("{PRIMARY_ONLY}{more}")),
            )
        })
        .collect();
    for node in &mut nodes {
        node.spawn();
    }
    for node in &mut nodes {
        node.wait_until_ready();
    }
    let cluster = Cluster { nodes };
    wait_for("all nodes to vote", || {
        let answer = cluster.nodes[cluster.primary()]
            .ask("GET", "/v1/cluster")
            .unwrap_or_default();
        let voters = answer.split("\"voters\":").nth(1).unwrap_or_default();
        let voters = voters.split(']').next().unwrap_or_default();
        answer.contains("\"isChanging\":false") && voters.matches("\"id\"").count() == 3
    });
    let primary = cluster.primary();
    cluster.nodes[primary]
        .open("app.db")
        .execute_batch(
            "PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT UNIQUE)",
        )
        .unwrap();
    cluster.wait_until_level("app.db");
    Sites {
        cluster,
        apps,
        proxies,
    }
}

#[test]
fn writes_wait_for_the_next_primary() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut sites = three(dir.path(), ", primary-redirect-timeout: 20s");
    let old = sites.cluster.primary();
    let others = sites.cluster.others(old);
    let (a, b) = (others[0], others[1]);
    let first = ask(sites.proxies[a], "POST", "/add", "", "first");
    assert_eq!(
        (first.status, first.body),
        (201, format!("node{old} added"))
    );
    // By a handoff nothing is lost, and nobody is told to come back.
    sites.cluster.wait_until_level("app.db");
    let statuses = std::thread::scope(|scope| {
        let proxies = &sites.proxies;
        let writers: Vec<_> = (0..3)
            .map(|i| {
                scope.spawn(move || {
                    (0..30)
                        .map(|n| {
                            ask(proxies[i], "POST", "/add", "", &format!("handoff {i} {n}")).status
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        sites.cluster.promote(a);
        writers
            .into_iter()
            .flat_map(|w| w.join().unwrap())
            .collect::<Vec<_>>()
    });
    // A program that was in the middle of it may say so itself.
    let done = statuses.iter().filter(|s| **s == 201).count();
    assert!(
        statuses.iter().all(|s| [201, 500].contains(s)) && done > 60,
        "{statuses:?}"
    );
    let primary = sites.cluster.primary();
    let kept = rows(
        &sites.cluster.nodes[primary],
        "SELECT count(*) FROM t WHERE v LIKE 'handoff%'",
    );
    assert_eq!(kept, i64::try_from(done).unwrap());
    // The primary dies: writes are held, and done once.
    sites.cluster.wait_until_level("app.db");
    sites.cluster.nodes[primary].kill();
    let survivors: Vec<usize> = [old, a, b].into_iter().filter(|i| *i != primary).collect();
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let proxies = &sites.proxies;
        let asked: Vec<_> = survivors
            .iter()
            .map(|i| {
                scope.spawn(move || ask(proxies[*i], "POST", "/add", "", &format!("held {i}")))
            })
            .collect();
        asked.into_iter().map(|a| a.join().unwrap()).collect()
    });
    let new = sites.cluster.primary();
    for answer in &answers {
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(answer.body, format!("node{new} added"));
    }
    let held = rows(
        &sites.cluster.nodes[new],
        "SELECT count(*) FROM t WHERE v LIKE 'held%'",
    );
    assert_eq!(held, 2);
    // Its reader finds it on the other node, and what is confirmed is confirmed there.
    let other = survivors.iter().copied().find(|i| *i != new).unwrap();
    let token = answers[0].cookie().unwrap();
    let all = rows(&sites.cluster.nodes[new], "SELECT count(*) FROM t");
    let read = get(sites.proxies[other], "/count", &with(&token));
    assert_eq!(read.body, format!("node{other} {all}"));
    for i in [new, other] {
        let read = get(sites.proxies[i], "/count", "Litefs-Consistency: strong\r\n");
        assert_eq!(read.body, format!("node{i} {all}"));
    }
    drop(sites.apps);
}
