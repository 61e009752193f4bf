//! The signals a node takes for its programs.

use rustix::process::Signal;
use std::future::poll_fn;
use std::io;
use std::task::Poll;
use tokio::signal::unix::{self, SignalKind};

/// Signals that are passed on to the running program.
const FORWARDED: [Signal; 7] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
];

/// Takes the signals of this process in place of their default actions.
///
/// Signals of one kind that come faster than they are taken count once, as always with signals.
/// From a terminal, Ctrl-C reaches the program twice: from the terminal and from us.
#[derive(Debug)]
pub struct Signals {
    streams: Vec<(Signal, unix::Signal)>,
}

impl Signals {
    /// Takes over from now on, for the life of the process. Needs a tokio runtime.
    ///
    /// # Errors
    /// If a handler cannot be installed.
    pub fn install() -> io::Result<Self> {
        let stream =
            |signal: Signal| Ok((signal, unix::signal(SignalKind::from_raw(signal.as_raw()))?));
        Ok(Self {
            streams: FORWARDED
                .into_iter()
                .map(stream)
                .collect::<io::Result<_>>()?,
        })
    }

    /// The next signal. Safe to cancel.
    pub async fn recv(&mut self) -> Signal {
        poll_fn(|cx| {
            for (signal, stream) in &mut self.streams {
                if let Poll::Ready(Some(())) = stream.poll_recv(cx) {
                    return Poll::Ready(*signal);
                }
            }
            Poll::Pending
        })
        .await
    }
}
