//! The configuration as the code uses it: typed, defaulted, checked.

use super::{
    ConfigError, DURABILITY_REMEDY, DatabaseFilter, ListenAddr, NodeUrl, Overrides, file,
    parse_durability,
};
use consensus::Durability;
use std::ffi::OsString;
use std::num::NonZeroU16;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

const DEFAULT_DATA_DIR: &str = "/var/lib/litefs";
const DEFAULT_FUSE_DIR: &str = "/litefs";
const DEFAULT_RETENTION: Duration = Duration::from_secs(10 * 60);
const DEFAULT_RETENTION_MONITOR_INTERVAL: Duration = Duration::from_secs(60);
const DEFAULT_RETENTION_SIZE_BYTES: u64 = 1 << 30;
const DEFAULT_SEGMENT_SIZE_BYTES: u64 = 16 << 20;
const DEFAULT_FUSE_THREADS: NonZeroU16 = NonZeroU16::new(4).expect("four is not zero");
const DEFAULT_HTTP_PORT: u16 = 20202;
const DEFAULT_RECONNECT_DELAY: Duration = Duration::from_secs(1);
/// Below, a pause of the operating system ends leases; above, a dead primary is missed for minutes.
const TTL_RANGE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(200)..=Duration::from_secs(60);

/// A segment holds at least one large transaction, and its offsets fit 32 bits.
const SEGMENT_SIZE_BYTES: std::ops::RangeInclusive<u64> = (64 << 10)..=(1 << 30);
const MAX_FUSE_THREADS: u16 = 256;

/// A valid configuration, with nothing left to decide.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resolved {
    /// Programs to run once the node is ready; the last stays in the background.
    pub exec: Vec<ExecCommand>,
    /// Whether a failure to start ends the process.
    pub exit_on_error: bool,
    /// Whether programs start without waiting for the primary.
    pub skip_sync: bool,
    /// Whether the whole database is verified after every commit.
    pub strict_verify: bool,
    /// Where and how data is kept.
    pub data: Data,
    /// The mount.
    pub fuse: Fuse,
    /// The node's API.
    pub http: Http,
    /// Who is primary.
    pub lease: Lease,
    /// When commits return, in a cluster that this node begins.
    pub durability: Durability,
    /// What is logged, and how.
    pub log: Log,
    /// The HTTP proxy, if there is to be one.
    pub proxy: Option<super::Proxy>,
}

/// One program to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecCommand {
    /// Program and arguments; never empty.
    pub argv: Vec<OsString>,
    /// Run only where the node is a candidate.
    pub if_candidate: bool,
}

/// Section `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Data {
    /// Absolute directory of databases and logs.
    pub dir: PathBuf,
    /// Whether page data is compressed.
    pub compress: bool,
    /// Age beyond which log segments go; `None` keeps them whatever their age.
    pub retention: Option<Duration>,
    /// How often retention is enforced; `None` never.
    pub retention_monitor_interval: Option<Duration>,
    /// Bytes of log kept per database, whatever their age; `None` for any number.
    pub retention_size_bytes: Option<u64>,
    /// Whether bursts are kept for the retention even while no replica is known.
    pub retain_without_replicas: bool,
    /// Bytes after which a log segment is closed.
    pub segment_size_bytes: u64,
}

/// Section `fuse`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fuse {
    /// Absolute mount point.
    pub dir: PathBuf,
    /// Whether other users may use the mount.
    pub allow_other: bool,
    /// Whether every request is logged.
    pub debug: bool,
    /// Whether listings of directories show `.primary`, `.lag` and `NAME-pos`.
    pub list_virtual: bool,
    /// Whether the kernel may serve files without us.
    pub passthrough: Passthrough,
    /// Threads that serve requests.
    pub threads: NonZeroU16,
    /// Whether a mount left over at `dir` is left alone (`-skip-unmount`).
    pub skip_unmount: bool,
}

/// `fuse.passthrough`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passthrough {
    /// Where kernel and backing file system allow it.
    Auto,
    /// Never: every file is served from user space.
    Off,
}

/// Section `http`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Http {
    /// Where the API listens.
    pub addr: ListenAddr,
    /// How long a snapshot may take to send (default: `data.retention`); `None` without limit.
    pub snapshot_timeout: Option<Duration>,
}

/// Section `lease`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// What this node is.
    pub role: Role,
    /// Of a static lease the primary's host name, as `.primary` shows it; else this node's.
    pub hostname: String,
    /// Of a static lease the primary's API; else this node's.
    pub advertise_url: NodeUrl,
    /// How this node meets the others that elect a primary.
    pub election: Election,
    /// Pause before a lost stream is opened again.
    pub reconnect_delay: Duration,
    /// Databases a replica follows; takes all on the primary.
    pub databases: DatabaseFilter,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Accepts writes, as its file says.
    Primary,
    /// Follows the primary that its file names.
    Replica,
    /// Has a vote, and may be elected primary.
    Candidate,
    /// Follows whom the candidates elect.
    Follower,
}

impl Role {
    /// Whether the primary is elected.
    #[must_use]
    pub fn is_elected(self) -> bool {
        matches!(self, Role::Candidate | Role::Follower)
    }
}

/// What `lease.type: raft` needs to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Election {
    /// APIs of nodes that may be members of the cluster, this one among them or not. None: a cluster of this node alone.
    pub peers: Vec<NodeUrl>,
    /// How long the primary may act by one answer of a quorum; the default of [`consensus::Timing`] if not set.
    pub ttl: Option<Duration>,
    /// Where this node is, for `status` and for the choice of a primary.
    pub region: String,
    /// Among healthy candidates the one with the highest number is preferred as primary.
    pub priority: u32,
    /// Asks for the primary's role once it is level with the primary.
    pub promote: bool,
}

/// Section `log`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Log {
    /// How events are written.
    pub format: LogFormat,
    /// Whether lines start with the time.
    pub timestamp: bool,
    /// The least important events shown.
    pub level: LogLevel,
    /// Whether a flag set the level, so that `RUST_LOG` does not change it.
    pub level_is_from_flag: bool,
}

/// `log.format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// State changes.
    Info,
    /// And decisions (`log.debug`, `-debug`).
    Debug,
    /// And every step (`-tracing`).
    Trace,
}

impl Resolved {
    /// Applies defaults and overrides, and checks every value against the others.
    pub(super) fn from_file(
        file: file::File,
        overrides: &Overrides,
        os_hostname: &str,
    ) -> Result<Self, ConfigError> {
        refuse_what_is_missing(&file)?;
        let data = Data::from_file(file.data.unwrap_or_default())?;
        let http = Http::from_file(file.http.unwrap_or_default(), data.retention)?;
        let durability = durability(file.durability.as_deref(), file.lease.as_ref())?;
        let resolved = Self {
            durability,
            exec: exec_commands(file.exec.unwrap_or_default(), overrides)?,
            exit_on_error: flag(file.exit_on_error, true),
            skip_sync: flag(file.skip_sync, false),
            strict_verify: flag(file.strict_verify, false),
            fuse: Fuse::from_file(file.fuse.unwrap_or_default(), overrides)?,
            lease: Lease::from_file(file.lease.unwrap_or_default(), os_hostname, &http.addr)?,
            log: Log::from_file(&file.log.unwrap_or_default(), overrides)?,
            proxy: super::Proxy::from_file(file.proxy.unwrap_or_default())?,
            data,
            http,
        };
        check_dirs_are_apart(&resolved.fuse.dir, &resolved.data.dir)?;
        Ok(resolved)
    }

    /// Whether commands with `if-candidate` run here.
    #[must_use]
    pub fn is_candidate(&self) -> bool {
        matches!(self.lease.role, Role::Primary | Role::Candidate)
    }
}

impl Data {
    fn from_file(file: file::Data) -> Result<Self, ConfigError> {
        let segment_size_bytes = file
            .segment_size
            .map_or(DEFAULT_SEGMENT_SIZE_BYTES, |size| size.0);
        if !SEGMENT_SIZE_BYTES.contains(&segment_size_bytes) {
            let problem = format!("{segment_size_bytes} bytes is out of range");
            return Err(ConfigError::setting(
                "data.segment-size",
                problem,
                "choose 64KiB to 1GiB",
            ));
        }
        let retention_size = file
            .retention_size
            .map_or(DEFAULT_RETENTION_SIZE_BYTES, |size| size.0);
        Ok(Self {
            dir: directory("data.dir", file.dir, DEFAULT_DATA_DIR)?,
            compress: flag(file.compress, true),
            retention: file
                .retention
                .map_or(Some(DEFAULT_RETENTION), |d| d.positive()),
            retention_monitor_interval: file
                .retention_monitor_interval
                .map_or(Some(DEFAULT_RETENTION_MONITOR_INTERVAL), |d| d.positive()),
            retention_size_bytes: (retention_size > 0).then_some(retention_size),
            retain_without_replicas: flag(file.retain_without_replicas, false),
            segment_size_bytes,
        })
    }
}

impl Fuse {
    fn from_file(file: file::Fuse, overrides: &Overrides) -> Result<Self, ConfigError> {
        let passthrough = match file.passthrough.as_deref() {
            None | Some("auto") => Passthrough::Auto,
            // YAML readers take a bare `off` for a boolean; both spellings mean the same here.
            Some("off" | "false") => Passthrough::Off,
            Some(other) => {
                let problem = format!("`{other}` is not a mode");
                return Err(ConfigError::setting(
                    "fuse.passthrough",
                    problem,
                    "write auto or off",
                ));
            }
        };
        let threads = match file.threads {
            None => DEFAULT_FUSE_THREADS,
            Some(threads) => NonZeroU16::new(threads)
                .filter(|threads| threads.get() <= MAX_FUSE_THREADS)
                .ok_or_else(|| {
                    let problem = format!("{threads} threads cannot serve a mount");
                    ConfigError::setting("fuse.threads", problem, "choose 1 to 256")
                })?,
        };
        Ok(Self {
            dir: directory("fuse.dir", file.dir, DEFAULT_FUSE_DIR)?,
            allow_other: flag(file.allow_other, false),
            list_virtual: flag(file.list_virtual, false),
            debug: flag(file.debug, false) || overrides.fuse_debug,
            passthrough,
            threads,
            skip_unmount: overrides.skip_unmount,
        })
    }
}

impl Http {
    fn from_file(file: file::Http, retention: Option<Duration>) -> Result<Self, ConfigError> {
        let addr = match file.addr {
            None => ListenAddr::any(DEFAULT_HTTP_PORT),
            Some(addr) => addr.parse().map_err(|error| address("http.addr", &error))?,
        };
        // A snapshot that takes longer than transactions are kept cannot be caught up from.
        let timeout = file.snapshot_timeout.and_then(|timeout| timeout.positive());
        let snapshot_timeout = timeout.or(retention);
        Ok(Self {
            addr,
            snapshot_timeout,
        })
    }
}

impl Lease {
    fn from_file(
        file: file::Lease,
        os_hostname: &str,
        listen: &ListenAddr,
    ) -> Result<Self, ConfigError> {
        let is_elected = is_elected(file.r#type.as_deref())?;
        let role = match (is_elected, flag(file.candidate, true)) {
            (false, true) => Role::Primary,
            (false, false) => Role::Replica,
            (true, true) => Role::Candidate,
            (true, false) => Role::Follower,
        };
        let peers = file.peers.unwrap_or_default();
        if !is_elected && !peers.is_empty() {
            let problem = "peers elect a primary, and a static lease names it";
            let remedy = "write `type: raft` under lease, or remove the list";
            return Err(ConfigError::setting("lease.peers", problem, remedy));
        }
        if role == Role::Follower && peers.is_empty() {
            let problem = "a node with `candidate: false` must know nodes that elect its primary";
            let remedy = "write peers: [\"http://CANDIDATE:20202\"] under lease";
            return Err(ConfigError::setting("lease.peers", problem, remedy));
        }
        let peers = peers
            .iter()
            .map(|peer| {
                peer.parse::<NodeUrl>()
                    .map_err(|error| address("lease.peers", &error))
            })
            .collect::<Result<_, ConfigError>>()?;
        let election = Election {
            peers,
            ttl: match file.ttl.and_then(|ttl| ttl.positive()) {
                Some(ttl) if !TTL_RANGE.contains(&ttl) => {
                    let problem = "it is not from 200ms to 1m";
                    let remedy = "write a bit more than five times the round trip between the voters that are farthest apart, \
                                  say 2s around the world; the same on all nodes";
                    return Err(ConfigError::setting("lease.ttl", problem, remedy));
                }
                ttl => ttl,
            },
            region: file.region.unwrap_or_default(),
            priority: file.priority.unwrap_or_default(),
            promote: flag(file.promote, false),
        };
        let hostname = file.hostname.filter(|hostname| !hostname.is_empty());
        let url = match file.advertise_url.filter(|url| !url.is_empty()) {
            Some(url) => Some(
                url.parse::<NodeUrl>()
                    .map_err(|error| address("lease.advertise-url", &error))?,
            ),
            None => None,
        };
        let (hostname, advertise_url) = match (role, hostname, url) {
            (_, Some(hostname), Some(url)) => (hostname, url),
            (Role::Primary | Role::Candidate | Role::Follower, hostname, url) => {
                let hostname = hostname.unwrap_or_else(|| os_hostname.to_owned());
                let url = url.unwrap_or_else(|| NodeUrl::new(&hostname, listen.port()));
                (hostname, url)
            }
            (Role::Replica, None, Some(url)) => (url.host().to_owned(), url),
            (Role::Replica, _, None) => return Err(primary_unnamed()),
        };
        let databases = database_filter(file.databases.unwrap_or_default())?;
        check_filter(role, &databases)?;
        Ok(Self {
            role,
            hostname,
            advertise_url,
            election,
            reconnect_delay: file
                .reconnect_delay
                .map_or(DEFAULT_RECONNECT_DELAY, |delay| {
                    delay.positive().unwrap_or_default()
                }),
            databases,
        })
    }
}

impl Log {
    fn from_file(file: &file::Log, overrides: &Overrides) -> Result<Self, ConfigError> {
        let format = match file.format.as_deref() {
            None | Some("" | "text") => LogFormat::Text,
            Some("json") => LogFormat::Json,
            Some(other) => {
                let problem = format!("`{other}` is not a format");
                return Err(ConfigError::setting(
                    "log.format",
                    problem,
                    "write text or json",
                ));
            }
        };
        let level = match (
            overrides.tracing,
            overrides.debug || flag(file.debug, false),
        ) {
            (true, _) => LogLevel::Trace,
            (false, true) => LogLevel::Debug,
            (false, false) => LogLevel::Info,
        };
        Ok(Self {
            format,
            timestamp: flag(file.timestamp, false),
            level,
            level_is_from_flag: overrides.tracing || overrides.debug,
        })
    }
}

/// Refuses settings that would switch on a part which does not exist yet.
fn refuse_what_is_missing(file: &file::File) -> Result<(), ConfigError> {
    let set = |value: Option<&String>| value.is_some_and(|value| !value.is_empty());
    let refuse = |key, feature, remedy| {
        Err(ConfigError::NotInThisVersion {
            key,
            feature,
            remedy,
        })
    };
    if file
        .backup
        .as_ref()
        .is_some_and(|backup| set(backup.r#type.as_ref()))
    {
        let remedy = "remove `backup.type` and copy databases with `litefs export`";
        return refuse("backup.type", "backup", remedy);
    }
    let traces =
        |tracing: &file::Tracing| flag(tracing.enabled, true) && set(tracing.path.as_ref());
    if file.tracing.as_ref().is_some_and(traces) {
        let remedy = "remove `tracing.path` and use `litefs mount -tracing`, which logs to stderr";
        return refuse("tracing.path", "the trace file", remedy);
    }
    Ok(())
}

const LEASE_REMEDY: &str = "write these three lines instead\n  \
    lease:\n    \
      type: raft\n    \
      advertise-url: \"http://THIS-NODE:20202\"\n    \
      peers: [\"http://NODE-1:20202\", \"http://NODE-2:20202\", \"http://NODE-3:20202\"]    # the same on every node";

/// Returns whether the primary is elected.
fn is_elected(lease_type: Option<&str>) -> Result<bool, ConfigError> {
    let problem = match lease_type {
        Some("static") => return Ok(false),
        Some("raft") => return Ok(true),
        Some("consul") => "Consul is neither needed nor supported".to_owned(),
        None | Some("") => "a type is required".to_owned(),
        Some(other) => format!("`{other}` is not a type of lease"),
    };
    Err(ConfigError::setting("lease.type", problem, LEASE_REMEDY))
}

fn durability(text: Option<&str>, lease: Option<&file::Lease>) -> Result<Durability, ConfigError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(Durability::Async);
    };
    let refuse = |problem: String, remedy| Err(ConfigError::setting("durability", problem, remedy));
    let durability = match parse_durability(text) {
        Ok(durability) => durability,
        Err(error) => return refuse(error.to_string(), DURABILITY_REMEDY),
    };
    let is_elected = lease.and_then(|lease| lease.r#type.as_deref()) == Some("raft");
    if durability != Durability::Async && !is_elected {
        let problem = format!("`{text}` needs nodes that vote");
        return refuse(
            problem,
            "write `type: raft` under lease, or `durability: async`",
        );
    }
    Ok(durability)
}

fn primary_unnamed() -> ConfigError {
    let problem = "a node with `candidate: false` must know its primary";
    let remedy = "write advertise-url: \"http://PRIMARY:20202\" under lease";
    ConfigError::setting("lease.advertise-url", problem, remedy)
}

fn check_filter(role: Role, databases: &DatabaseFilter) -> Result<(), ConfigError> {
    if matches!(role, Role::Primary | Role::Candidate) && !databases.takes_all() {
        let problem = "a primary holds every database";
        let remedy = "remove the list, or set `lease.candidate: false` to make this a replica";
        return Err(ConfigError::setting("lease.databases", problem, remedy));
    }
    Ok(())
}

fn database_filter(patterns: Vec<String>) -> Result<DatabaseFilter, ConfigError> {
    let parse = |text: String| {
        text.parse().map_err(|_| {
            let problem = format!("{text:?} is empty, too long, or not relative to the mount");
            let remedy = "write names relative to the mount, such as app.db or tenants/*";
            ConfigError::setting("lease.databases", problem, remedy)
        })
    };
    let patterns = patterns
        .into_iter()
        .map(parse)
        .collect::<Result<_, ConfigError>>()?;
    Ok(DatabaseFilter::new(patterns))
}

/// Splits command lines as a shell would; the command of the command line comes split.
fn exec_commands(exec: file::Exec, overrides: &Overrides) -> Result<Vec<ExecCommand>, ConfigError> {
    if !overrides.command.is_empty() {
        return Ok(vec![ExecCommand {
            argv: overrides.command.clone(),
            if_candidate: false,
        }]);
    }
    exec.0.iter().map(exec_command).collect()
}

fn exec_command(line: &file::ExecLine) -> Result<ExecCommand, ConfigError> {
    let argv = shlex::split(&line.cmd).ok_or_else(|| {
        let problem = format!("`{}` has a quote or backslash that does not end", line.cmd);
        ConfigError::setting("exec", problem, "close it")
    })?;
    if argv.first().is_none_or(String::is_empty) {
        let problem = format!("`{}` names no program", line.cmd);
        return Err(ConfigError::setting(
            "exec",
            problem,
            "write a command line",
        ));
    }
    let argv = argv.into_iter().map(OsString::from).collect();
    Ok(ExecCommand {
        argv,
        if_candidate: line.if_candidate,
    })
}

fn flag(value: Option<super::scalar::Flag>, default: bool) -> bool {
    value.map_or(default, |flag| flag.0)
}

fn address(key: &'static str, error: &super::AddrError) -> ConfigError {
    ConfigError::Yaml {
        line: None,
        problem: format!("{key}: {error}"),
    }
}

/// The directory a key names, made absolute.
fn directory(
    key: &'static str,
    value: Option<String>,
    default: &str,
) -> Result<PathBuf, ConfigError> {
    let dir = value.unwrap_or_else(|| default.to_owned());
    let remedy = || format!("name a directory, or remove the key for {default}");
    if dir.is_empty() {
        return Err(ConfigError::setting(
            key,
            "a directory is required",
            remedy(),
        ));
    }
    std::path::absolute(&dir).map_err(|error| {
        ConfigError::setting(
            key,
            format!("`{dir}` has no absolute path ({error})"),
            remedy(),
        )
    })
}

/// Refuses a mount point within the data directory, or the reverse: either would hang.
fn check_dirs_are_apart(fuse: &Path, data: &Path) -> Result<(), ConfigError> {
    let (fuse_place, data_place) = (place(fuse), place(data));
    let problem = if fuse_place == data_place {
        format!("it is the same directory as data.dir, {}", data.display())
    } else if fuse_place.starts_with(&data_place) {
        format!(
            "{} lies within data.dir, {}",
            fuse.display(),
            data.display()
        )
    } else if data_place.starts_with(&fuse_place) {
        format!("{} contains data.dir, {}", fuse.display(), data.display())
    } else {
        return Ok(());
    };
    Err(ConfigError::setting(
        "fuse.dir",
        problem,
        "choose two directories apart",
    ))
}

/// The directory's real place: links of its parents resolved as far as they exist.
///
/// The directory itself is not looked at, since a mount left there by a dead process may not answer.
fn place(dir: &Path) -> PathBuf {
    let dir = without_dots(dir);
    let mut missing = PathBuf::new();
    let mut at = dir.as_path();
    while let (Some(parent), Some(name)) = (at.parent(), at.file_name()) {
        missing = if missing.as_os_str().is_empty() {
            name.into()
        } else {
            Path::new(name).join(missing)
        };
        if let Ok(real) = parent.canonicalize() {
            return real.join(missing);
        }
        at = parent;
    }
    dir
}

fn without_dots(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(out.pop()),
            other => out.push(other),
        }
    }
    out
}
