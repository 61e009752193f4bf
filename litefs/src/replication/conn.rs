//! A connection after the upgrade: two halves of bytes, tuned for latency where it is plain TCP.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::frame::WireBuf;

/// Unsent bytes the kernel may hold before it calls the socket full. Live records wait behind no more than this.
const NOTSENT_LOWAT: libc::c_int = 256 << 10;
const VALUE_LEN: libc::socklen_t = 4;
const _: () = assert!(size_of::<libc::c_int>() == VALUE_LEN as usize);

/// Both halves of a connection.
pub struct Conn {
    /// Where bytes come from.
    pub read: Box<dyn AsyncRead + Send + Unpin>,
    /// Where bytes go.
    pub write: Box<dyn AsyncWrite + Send + Unpin>,
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Conn")
    }
}

impl Conn {
    /// Takes an upgraded HTTP connection; plain TCP loses hyper's layers on the way.
    #[must_use]
    pub fn from_upgraded(upgraded: Upgraded) -> Conn {
        match upgraded.downcast::<TokioIo<TcpStream>>() {
            Ok(parts) => Conn::from_tcp(parts.io.into_inner(), parts.read_buf),
            Err(upgraded) => Conn::from_io(TokioIo::new(upgraded)),
        }
    }

    /// Takes a TCP connection and the bytes already read from it.
    #[must_use]
    pub fn from_tcp(tcp: TcpStream, already_read: Bytes) -> Conn {
        tune(&tcp);
        let (read, write) = tcp.into_split();
        Conn {
            read: if already_read.is_empty() {
                Box::new(read)
            } else {
                Box::new(AsyncReadExt::chain(io::Cursor::new(already_read), read))
            },
            write: Box::new(write),
        }
    }

    /// Takes any pair of bytes, for instance TLS.
    #[must_use]
    pub fn from_io(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Conn {
        let (read, write) = tokio::io::split(io);
        Conn {
            read: Box::new(read),
            write: Box::new(write),
        }
    }
}

/// Turns off Nagle's delay and bounds what the kernel queues. Best effort: a socket without them is only slower.
pub fn tune(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    let value: libc::c_int = NOTSENT_LOWAT;
    // SAFETY: the descriptor is open for the length of the call, and the pointer and length are those of `value`.
    // The standard library, tokio and rustix have no call for this option.
    unsafe {
        libc::setsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const value).cast(),
            VALUE_LEN,
        );
    }
}

/// Writes all of `wire`; gives up when not a byte is taken for `stall`.
///
/// # Errors
/// `TimedOut`, or what the connection says.
pub async fn write_all(
    io: &mut (impl AsyncWrite + Unpin),
    wire: &mut WireBuf,
    stall: Duration,
) -> io::Result<()> {
    while wire.has_remaining() {
        match timeout(stall, io.write_buf(wire)).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return Err(e),
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    match timeout(stall, io.flush()).await {
        Ok(flushed) => flushed,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
