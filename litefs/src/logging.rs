//! Where log events go, and which: set up once, from section `log` and `RUST_LOG`.

use crate::config::{LogFormat, LogLevel, Resolved};
use std::io;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoggingError {
    /// `RUST_LOG` is not a list of levels.
    #[error("RUST_LOG is not understood; write a level or a list such as info,litefs=debug")]
    Filter(#[source] tracing_subscriber::filter::ParseError),
    /// Logging was set up before.
    #[error("logging is already set up")]
    Again(#[source] tracing::subscriber::SetGlobalDefaultError),
}

/// Sends events to stderr for the rest of the process's life.
///
/// # Errors
/// [`LoggingError`], with nothing changed.
pub fn init(config: &Resolved) -> Result<(), LoggingError> {
    let rust_log = std::env::var("RUST_LOG").ok();
    let subscriber = subscriber(config, rust_log.as_deref(), io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(LoggingError::Again)
}

fn subscriber<W>(
    config: &Resolved,
    rust_log: Option<&str>,
    writer: W,
) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, LoggingError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(directives(config, rust_log)).map_err(LoggingError::Filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    Ok(match (config.log.format, config.log.timestamp) {
        (LogFormat::Text, true) => Box::new(builder.with_ansi(false).finish()),
        (LogFormat::Text, false) => Box::new(builder.with_ansi(false).without_time().finish()),
        (LogFormat::Json, true) => Box::new(builder.json().finish()),
        (LogFormat::Json, false) => Box::new(builder.json().without_time().finish()),
    })
}

/// Flags beat `RUST_LOG`, which beats the file. `fuse.debug` adds the mount's requests to either.
fn directives(config: &Resolved, rust_log: Option<&str>) -> String {
    let rust_log = rust_log.filter(|value| !value.is_empty() && !config.log.level_is_from_flag);
    let base = rust_log.unwrap_or(match config.log.level {
        LogLevel::Info => "info,openraft=error",
        LogLevel::Debug => "info,litefs=debug,fuse=debug,consensus=debug,openraft=error",
        LogLevel::Trace => "info,litefs=trace,fuse=trace,consensus=trace",
    });
    let fuse = if config.fuse.debug {
        ",fuse=trace,fuser=debug"
    } else {
        ""
    };
    format!("{base}{fuse}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Env, Overrides, parse};
    use parking_lot::Mutex;
    use std::sync::Arc;

    fn config(log: &str, overrides: &Overrides) -> Resolved {
        let text = format!("lease: {{type: static}}\nlog: {{{log}}}");
        parse(&text, overrides, &Env::new([], "box".to_owned())).unwrap()
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let none = Overrides::default();
        let debug = Overrides {
            debug: true,
            ..Overrides::default()
        };
        let fuse = Overrides {
            fuse_debug: true,
            ..Overrides::default()
        };
        for (log, overrides, rust_log, want) in [
            ("", &none, None, "info,openraft=error"),
            ("", &none, Some(""), "info,openraft=error"),
            (
                "debug: true",
                &none,
                None,
                "info,litefs=debug,fuse=debug,consensus=debug,openraft=error",
            ),
            ("debug: true", &none, Some("warn"), "warn"),
            (
                "",
                &debug,
                Some("warn"),
                "info,litefs=debug,fuse=debug,consensus=debug,openraft=error",
            ),
            ("", &fuse, Some("warn"), "warn,fuse=trace,fuser=debug"),
        ] {
            assert_eq!(directives(&config(log, overrides), rust_log), want);
        }
    }

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(log: &str) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let config = config(log, &Overrides::default());
        let subscriber = subscriber(&config, None, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(db = "app.db", "snapshot sent");
            tracing::debug!("not shown by default");
        });
        let bytes = buffer.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn text_and_json() {
        assert_eq!(
            logged(""),
            " INFO litefs::logging::tests: snapshot sent db=\"app.db\"\n"
        );
        let json: serde_json::Value = serde_json::from_str(&logged("format: json")).unwrap();
        assert_eq!(json["fields"]["db"], "app.db");
        assert!(json.get("timestamp").is_none());
        let stamped = logged("format: json, timestamp: true");
        let json: serde_json::Value = serde_json::from_str(&stamped).unwrap();
        assert!(json["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!(logged("debug: true").lines().count(), 2);
    }

    #[test]
    fn a_bad_rust_log_is_an_error() {
        let config = config("", &Overrides::default());
        assert!(subscriber(&config, Some("litefs=loud"), io::stderr).is_err());
    }
}
