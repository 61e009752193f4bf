//! A client that sends exactly the bytes it is told to, and a relay that holds the nodes' stream back.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::harness::PATIENCE;

pub(super) fn connect(port: u16) -> TcpStream {
    let tcp = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The token that the answer sets as a cookie.
    pub(super) fn cookie(&self) -> Option<String> {
        let cookie = self.header("set-cookie")?.strip_prefix("__txid=")?;
        Some(cookie.split(';').next().unwrap().to_owned())
    }
}

/// Sends bytes and reads to the end of the connection. Nothing if there is no answer.
pub(super) fn raw(port: u16, bytes: &[u8]) -> Option<Answer> {
    let mut tcp = connect(port);
    // Who refuses may close before all of it is sent.
    let _ = tcp.write_all(bytes);
    read_answer(&mut tcp)
}

pub(super) fn read_answer(tcp: &mut TcpStream) -> Option<Answer> {
    let mut all = Vec::new();
    let mut buf = [0; 16 << 10];
    while let Ok(n @ 1..) = tcp.read(&mut buf) {
        all.extend_from_slice(&buf[..n]);
    }
    parse(&all)
}

pub(super) fn parse(all: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(all).into_owned();
    let mut rest = text.as_str();
    loop {
        let (head, body) = rest.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        if status == 100 {
            rest = body;
            continue;
        }
        let is_chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        return Some(Answer {
            status,
            head: head.to_owned(),
            body: if is_chunked {
                dechunk(body)
            } else {
                body.to_owned()
            },
        });
    }
}

/// Takes the chunks apart; trailers stay at the end.
fn dechunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((len, rest)) = body.split_once("\r\n") {
        let len = usize::from_str_radix(len.trim(), 16).unwrap_or(0);
        if len == 0 {
            out.push_str(rest);
            break;
        }
        let Some(chunk) = rest.get(..len) else { break };
        out.push_str(chunk);
        body = rest.get(len + 2..).unwrap_or_default();
    }
    out
}

/// Makes a request of its own connection. `headers` end with CRLF each.
pub(super) fn ask(port: u16, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: app.example\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    raw(port, request.as_bytes()).unwrap_or_else(|| panic!("no answer to {method} {path}"))
}

pub(super) fn get(port: u16, path: &str, headers: &str) -> Answer {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: app.example\r\nConnection: close\r\n{headers}\r\n");
    raw(port, request.as_bytes()).unwrap_or_else(|| panic!("no answer to GET {path}"))
}

/// Passes connections on to a node; the stream of replication only while it is open.
pub(super) struct Relay {
    pub(super) port: u16,
    is_open: Arc<AtomicBool>,
}

impl Relay {
    pub(super) fn start(to: u16) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let is_open = Arc::new(AtomicBool::new(true));
        let gate = is_open.clone();
        std::thread::spawn(move || {
            for tcp in listener.incoming().map_while(Result::ok) {
                let gate = gate.clone();
                std::thread::spawn(move || pass(tcp, to, &gate));
            }
        });
        Relay { port, is_open }
    }

    pub(super) fn close(&self) {
        self.is_open.store(false, Ordering::Release);
    }

    pub(super) fn open(&self) {
        self.is_open.store(true, Ordering::Release);
    }
}

fn pass(mut from: TcpStream, to: u16, gate: &Arc<AtomicBool>) {
    let Ok(mut node) = TcpStream::connect(("127.0.0.1", to)) else {
        return;
    };
    let mut buf = vec![0; 64 << 10];
    let Ok(n) = from.read(&mut buf) else { return };
    let is_stream = buf[..n].starts_with(b"POST /stream ");
    if node.write_all(&buf[..n]).is_err() {
        return;
    }
    let (mut back_from, mut back_to) = (node.try_clone().unwrap(), from.try_clone().unwrap());
    let gate = gate.clone();
    std::thread::spawn(move || {
        let mut buf = vec![0; 64 << 10];
        while let Ok(n @ 1..) = back_from.read(&mut buf) {
            while is_stream && !gate.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(2));
            }
            if back_to.write_all(&buf[..n]).is_err() {
                break;
            }
        }
        let _ = back_to.shutdown(std::net::Shutdown::Write);
    });
    while let Ok(n @ 1..) = from.read(&mut buf) {
        if node.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = node.shutdown(std::net::Shutdown::Write);
}
