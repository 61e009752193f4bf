//! One running node: store, mount, API and programs, from start to end.
//!
//! Start: lock the data directory, remove a dead mount, open every database, mount, follow or serve, and once the
//! node has what its primary has, run the programs. End: programs, API, capture of what is left, unmount, sync.

mod api;
mod cluster_api;
mod data_dir;
mod decide;
mod elected;
mod election;
mod lender;
mod lost;
mod members;
mod peers;
mod ports;
mod proxied;
mod quorum;
mod resolve;
mod roles;
#[cfg(test)]
mod sim;
mod status;
mod waits;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::{Mutex, RwLock};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, oneshot, watch};

use crate::config::{Passthrough, Resolved, Role};
use crate::db::log::{LogOptions, ltx_meta};
use crate::db::{NodeContext, Trust};
use crate::disk::RealDisk;
use crate::exec::{Signals, Supervisor, asks_to_stop};
use crate::history::History;
use crate::http::{HttpDial, Server};
use crate::lag::Lag;
use crate::replication::receive::{ReceiveConfig, Receiver};
use crate::replication::replicas::Replicas;
use crate::replication::send::{SendConfig, Sender};
use crate::replication::{ChangeHub, DbName};
use crate::store::{Store, chain};
use crate::survivors::{self, MountRecord, Survivor};
use crate::volume::LiteVolume;
use crate::watch::Watcher;
use api::Api;
use data_dir::DataDir;
pub use data_dir::steps;
use elected::Elected;
use lender::Lent;
use ports::{Ports, RoleNow};
use roles::Roles;

/// How long programs have to end after they were asked to.
const EXEC_GRACE: Duration = Duration::from_secs(30);
/// How often logs are compacted and idle databases closed; as often as retention is enforced, if that is more often.
const MAINTENANCE: Duration = Duration::from_secs(1);
const MIN_MAINTENANCE: Duration = Duration::from_millis(10);
/// How often page checksums are written down, so that a start after a crash has little to redo.
const PERSIST: Duration = Duration::from_secs(30);
/// How long a node that elects its primary waits at first before it connects to it again.
const ELECTED_RECONNECT: Duration = Duration::from_millis(20);
/// Epoch of the only tenure there is under a static lease.
const STATIC_EPOCH: u64 = 1;

/// Runs a node until it is told to stop or its program ends; returns the exit code.
///
/// # Errors
/// Whatever keeps the node from starting or running; `crate::exit::code_of` maps it.
pub fn run(config: Resolved) -> anyhow::Result<i32> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()?;
    raise_file_limit();
    let result = runtime.block_on(run_node(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run_node(config: Resolved) -> anyhow::Result<i32> {
    let mut signals = Signals::install().context("install signal handlers")?;
    let role = config.lease.role;
    let data_dir = DataDir::open(&config.data.dir)?;
    for mount in data_dir.mounts() {
        mount.abort_if_dead();
    }
    let _lock = data_dir.lock()?;
    let mut former = data_dir.mounts();
    if let Some(stale) = DataDir::describe_mount(&config.fuse.dir, 0)
        && !former.iter().any(|m| m.mount_id == stale.mount_id)
    {
        former.push(stale);
    }
    prepare_mount_point(&config)?;
    let Some(outlived) = cut_off_survivors(&config, &data_dir, former, &mut signals).await? else {
        return Ok(0);
    };
    let listener = bind(&config).await?;

    let last_session = data_dir.last_session();
    // Who is to be elected first finds what its last tenure left behind.
    let opens_as_primary = match role {
        Role::Primary => true,
        Role::Replica => false,
        Role::Candidate | Role::Follower => !last_session.is_replica,
    };
    let was_replica = opens_as_primary && last_session.is_dead_replica;
    let node = make_context(&config, &data_dir, opens_as_primary, was_replica)?;
    node.survivors
        .remember(&outlived.mounts, &outlived.programs);
    let trust = match node.was_replica.load(Ordering::Acquire) {
        true => Trust::Nothing,
        false => last_session.trust,
    };
    let started = std::time::Instant::now();
    let store = {
        let node = node.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(node, trust)).await?;
        Arc::new(opened.context("open databases")?)
    };
    let is_primary = role == Role::Primary;
    if opens_as_primary && !is_primary {
        for db in store.all() {
            db.settle_as_replica()
                .with_context(|| format!("end the last tenure of {}", db.name()))?;
        }
        node.is_primary.store(false, Ordering::Release);
    }
    if store.has_broken() {
        data_dir.forget_session()?;
    } else {
        data_dir.files_are_compared(is_primary)?;
    }
    node.was_replica.store(false, Ordering::Release);
    tracing::info!(
        databases = store.all().len(),
        elapsed_ms = started.elapsed().as_millis(),
        ?trust,
        "databases are open"
    );

    let lag = Arc::new(Lag::default());
    let watcher = Watcher::new(node.clone());
    let volume = LiteVolume::new(
        node.clone(),
        store.clone(),
        watcher.clone(),
        lag.clone(),
        config.fuse.list_virtual,
    );
    let bare = clear_mount_point(&config)?;
    let mounted = fuse::mount(
        Arc::new(volume),
        &fuse::MountOptions {
            mount_point: config.fuse.dir.clone(),
            backing: data_dir.files(),
            allow_other: config.fuse.allow_other,
            passthrough: config.fuse.passthrough == Passthrough::Auto,
            threads: usize::from(config.fuse.threads.get()),
        },
    )?;
    drop(bare);
    let mut mounts = outlived.mounts;
    let daemon = i32::try_from(std::process::id()).unwrap_or(0);
    let own = DataDir::describe_mount(&config.fuse.dir, daemon);
    let guard = own
        .as_ref()
        .and_then(MountRecord::connection)
        .map(fuse::Guard::start)
        .transpose()
        .context("start the guard")?;
    mounts.extend(own);
    data_dir.set_mounts(&mounts)?;
    node.passthrough
        .store(mounted.passthrough(), Ordering::Release);
    *node.invalidator.lock() = Some(mounted.invalidator());
    let watching = if is_primary || role == Role::Candidate {
        Some(watcher.start(store.clone()).context("watch files")?)
    } else {
        None
    };
    tracing::info!(mount = %config.fuse.dir.display(), passthrough = mounted.passthrough(), "mounted");

    let cluster_id = data_dir.cluster_id()?;
    let ports = Arc::new_cyclic(|this| Ports {
        this: this.clone(),
        node: node.clone(),
        store: store.clone(),
        lag,
        cluster_id: Mutex::new(cluster_id),
        seen_epoch: RwLock::new(data_dir.epoch()),
        followed_epoch: AtomicU64::new(0),
        accepted_epoch: Arc::new(AtomicU64::new(data_dir.accepted_epoch())),
        is_accepting: Arc::default(),
        acceptance: watch::Sender::new(0),
        data_dir: data_dir.clone(),
        filter: config.lease.databases.clone(),
        histories: Mutex::default(),
        paused: Mutex::default(),
        has_own: AtomicBool::new(false),
        ready: watch::Sender::new(is_primary),
        is_connected: AtomicBool::new(false),
        role: watch::Sender::new(RoleNow {
            is_primary,
            followed: None,
            epoch: match is_primary {
                true => STATIC_EPOCH,
                false => data_dir.epoch(),
            },
        }),
        role_changes: AtomicU64::new(0),
    });
    let (events, _) = broadcast::channel(1024);
    let listeners = Arc::new(tokio::sync::Notify::new());
    let replicas = Replicas::new(node.history.clone());
    let hostname = node.hostname.clone();
    let sender = Sender::new(
        ports.clone(),
        replicas.clone(),
        SendConfig {
            hostname: hostname.clone(),
            ..SendConfig::default()
        },
    );
    let _ = node.on_lost.set(lost::teller(events.clone()));
    tokio::spawn(api::publish_roles(
        ports.clone(),
        events.clone(),
        hostname.clone(),
    ));
    tokio::spawn(api::publish_events(
        ports.clone(),
        events.clone(),
        listeners.clone(),
    ));
    let (target, targets) = watch::channel(None);
    let elected = match role.is_elected() {
        true => {
            let roles = Roles {
                ports: ports.clone(),
                data_dir: data_dir.clone(),
                watcher: watcher.clone(),
                changing: Mutex::new(()),
            };
            Some(Elected::start(&config, &data_dir, roles, replicas.clone(), target.clone()).await?)
        }
        false => None,
    };
    let lender = elected.as_ref().map(|_| {
        let config = SendConfig {
            hostname: hostname.clone(),
            ..SendConfig::default()
        };
        let readers = Replicas::new(node.history.clone());
        Sender::new(Arc::new(Lent(ports.clone())), readers, config)
    });
    let api = Arc::new(Api {
        ports: ports.clone(),
        hostname: hostname.clone(),
        is_candidate: config.is_candidate(),
        mount: config.fuse.dir.clone(),
        replicas: replicas.clone(),
        events,
        listeners,
        election: elected.as_ref().map(Elected::election),
    });
    let desk = status::Desk::new(
        &config,
        hostname.clone(),
        ports.clone(),
        replicas.clone(),
        elected.as_ref().map(Elected::election),
    )?;
    let front = crate::proxy::Front::new(
        Arc::new(proxied::Proxied {
            ports: ports.clone(),
            election: elected.as_ref().map(Elected::election),
            target: target.subscribe(),
        }),
        config.proxy.as_ref(),
    );
    let server = Server::new(api, sender.clone(), lender).with_forwarded(front.clone());
    let (stop_http, http_stopped) = oneshot::channel::<()>();
    let http = {
        let lost = crate::http::lost::router(Arc::new(lost::Lost(ports.clone())));
        let desk = crate::http::status::router(Arc::new(desk));
        let mut router = server
            .router()
            .merge(desk)
            .merge(lost)
            .merge(front.router());
        if let Some(elected) = &elected {
            router = router.merge(crate::http::cluster::router(elected.api()));
        }
        tokio::spawn(async move {
            server
                .serve(listener, router, async { drop(http_stopped.await) })
                .await
        })
    };
    let mut receiving = None;
    if !is_primary {
        let receiver = Receiver::new(
            ports.clone(),
            Arc::new(HttpDial::default()),
            ReceiveConfig {
                hostname,
                reconnect_delay: match role.is_elected() {
                    true => config.lease.reconnect_delay.min(ELECTED_RECONNECT),
                    false => config.lease.reconnect_delay,
                },
                ..ReceiveConfig::default()
            },
        );
        receiving = Some(tokio::spawn(receiver.run(targets)));
        if role == Role::Replica {
            target.send_replace(Some(config.lease.advertise_url.to_string()));
        }
    }
    let guard_of_lease = elected.as_ref().map(Elected::run).transpose()?;
    let (stop_upkeep, upkeep_stopped) = std::sync::mpsc::channel::<()>();
    let upkeep = {
        let store = store.clone();
        let pace = config.data.retention_monitor_interval;
        let attendance = Attendance {
            node: node.clone(),
            data_dir: data_dir.clone(),
            replicas,
            written_ms: i64::MIN,
        };
        std::thread::Builder::new()
            .name("upkeep".into())
            .spawn(move || upkeep(&store, pace, attendance, &upkeep_stopped))?
    };

    let code = supervise(&config, &mut signals, &ports, &front).await;

    tracing::info!("stopping");
    let clients = tokio::spawn(front.stop());
    if let Some(elected) = &elected {
        elected.leave().await;
    }
    if let Some(guard) = guard_of_lease {
        guard.stop();
    }
    let is_primary = node.is_primary();
    drop(target);
    sender.close();
    let _ = stop_http.send(());
    // Those that were cut off are in the log.
    let _ = clients.await;
    match http.await {
        Ok(Err(error)) => tracing::warn!(%error, "http server"),
        Err(error) => tracing::warn!(%error, "http server"),
        Ok(Ok(())) => {}
    }
    if let Some(elected) = &elected {
        elected.shutdown().await;
    }
    if let Some(receiving) = receiving {
        receiving.abort();
    }
    drop(stop_upkeep);
    let ended = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        if upkeep.join().is_err() {
            tracing::error!("the upkeep thread panicked");
        }
        if let Some(watching) = watching {
            watching.stop();
        }
        let mut is_in_use = false;
        for db in store.all() {
            is_in_use |= db.handles_in_mount() > 0;
            if let Err(error) = db.close_for_unmount() {
                tracing::error!(db = %db.name(), error = chain(&error), "close");
            }
        }
        // Who has a database open would make its next journal in the bare directory, and commit where nobody sees it.
        if mounted.unmount(!is_in_use).context("unmount")? {
            mounts.pop();
            data_dir.set_mounts(&mounts)?;
        }
        *node.invalidator.lock() = None;
        let mut is_clean = true;
        for db in store.all() {
            if let Err(error) = db.persist(true) {
                is_clean = false;
                tracing::error!(db = %db.name(), error = chain(&error), "write down the state");
            }
        }
        if store.has_broken() {
            data_dir.forget_session()?;
        } else if is_clean {
            data_dir.end_session(is_primary)?;
        }
        Ok(())
    })
    .await?;
    ended?;
    drop(guard);
    code
}

/// Waits for the node to be ready, runs the programs, and returns when it is time to stop.
async fn supervise(
    config: &Resolved,
    signals: &mut Signals,
    ports: &Ports,
    front: &crate::proxy::Front,
) -> anyhow::Result<i32> {
    let mut ready = ports.ready.subscribe();
    if !config.skip_sync {
        loop {
            tokio::select! {
                r = ready.wait_for(|r| *r) => { r?; break; }
                signal = signals.recv() => if asks_to_stop(signal) { return Ok(0); },
            }
        }
    }
    tracing::info!(primary = ports.node.is_primary(), "ready");
    front.start().await?;
    if config.exec.is_empty() {
        while !asks_to_stop(signals.recv().await) {}
        return Ok(0);
    }
    let supervisor =
        Supervisor::start(config.exec.clone(), config.is_candidate()).context("start programs")?;
    loop {
        tokio::select! {
            code = supervisor.wait() => return Ok(code?),
            signal = signals.recv() => {
                if !supervisor.signal(signal) && asks_to_stop(signal) {
                    return Ok(0);
                }
                if asks_to_stop(signal) {
                    return Ok(supervisor.shutdown(EXEC_GRACE).await?);
                }
            }
        }
    }
}

/// Who still has files of former mounts open.
struct Outlived {
    mounts: Vec<MountRecord>,
    programs: Vec<Survivor>,
}

/// Sees to it that no program writes to databases unseen; nothing if it is told to stop while it waits.
async fn cut_off_survivors(
    config: &Resolved,
    data_dir: &DataDir,
    mut mounts: Vec<MountRecord>,
    signals: &mut Signals,
) -> anyhow::Result<Option<Outlived>> {
    survivors::resume(&data_dir.fenced());
    let files = data_dir.files();
    let mut waits = 0_u32;
    loop {
        let holders = |mounts: &[MountRecord]| {
            survivors::of_databases(survivors::find(mounts, &config.fuse.dir), &files)
        };
        let fresh: Vec<MountRecord> = mounts.iter().filter(|m| !m.is_cut_off).cloned().collect();
        let found = holders(&fresh);
        if found.is_empty() {
            let programs = holders(&mounts);
            mounts.retain(|m| m.is_cut_off);
            if programs.is_empty() {
                mounts.clear();
            }
            return Ok(Some(Outlived { mounts, programs }));
        }
        let list: Vec<String> = found.iter().map(ToString::to_string).collect();
        let list = list.join(", ");
        let may_write = config.lease.role != Role::Replica;
        match survivors::cut_off(
            &found,
            &files,
            &data_dir.tmp(),
            &data_dir.fenced(),
            may_write,
        ) {
            Ok(()) => {
                tracing::error!(
                    programs = list,
                    "programs have databases open through the mount of a daemon that ended; what they committed is kept, \
                     their descriptors are cut off: restart them"
                );
                for mount in &mut mounts {
                    mount.is_cut_off = true;
                }
                data_dir.set_mounts(&mounts)?;
                return Ok(Some(Outlived {
                    mounts,
                    programs: found,
                }));
            }
            Err(error @ survivors::CutOffError::NotFenceable { .. }) => {
                if waits.is_multiple_of(50) {
                    tracing::error!(
                        programs = list,
                        error = chain(&error),
                        "programs have databases open through the mount of a daemon that ended, and could write to them \
                         unseen; waiting for them to end: stop them"
                    );
                }
            }
            Err(error) => return Err(error).context("cut off programs of a former mount"),
        }
        waits += 1;
        tokio::select! {
            () = tokio::time::sleep(SURVIVOR_POLL) => {}
            signal = signals.recv() => if asks_to_stop(signal) { return Ok(None); },
        }
    }
}

/// How often to look whether programs that are waited for have ended.
const SURVIVOR_POLL: Duration = Duration::from_millis(200);

fn make_context(
    config: &Resolved,
    data_dir: &DataDir,
    is_primary: bool,
    was_replica: bool,
) -> anyhow::Result<Arc<NodeContext>> {
    let role = config.lease.role;
    if role == Role::Primary {
        data_dir.set_was_primary(true)?;
        if data_dir.cluster_id()?.is_none() {
            data_dir.set_cluster_id(&format!("LFSC{:016X}", rand::random::<u64>()))?;
        }
        if data_dir.epoch() == 0 {
            data_dir.set_epoch(STATIC_EPOCH)?;
        }
    }
    let mut log_options = LogOptions::new(ltx_meta);
    log_options.segment_bytes = config.data.segment_size_bytes;
    log_options.retention_age = config.data.retention.unwrap_or(Duration::MAX);
    log_options.retention_bytes = config.data.retention_size_bytes.unwrap_or(u64::MAX);
    Ok(Arc::new(NodeContext {
        gate: std::sync::OnceLock::new(),
        disk: Arc::new(RealDisk),
        files: data_dir.files(),
        metas: data_dir.metas(),
        mount: config.fuse.dir.clone(),
        hub: ChangeHub::new(),
        is_primary: AtomicBool::new(is_primary),
        is_candidate: role == Role::Candidate,
        is_draining: AtomicBool::new(false),
        has_doubts: AtomicBool::new(false),
        has_unseen: AtomicBool::new(false),
        was_primary: AtomicBool::new(data_dir.was_primary()),
        was_replica: AtomicBool::new(was_replica),
        passthrough: AtomicBool::new(config.fuse.passthrough == Passthrough::Auto),
        epoch: AtomicU64::new(data_dir.epoch()),
        node_id: match role.is_elected() {
            true => data_dir.node_id()?,
            false => rand::random(),
        },
        invalidator: Mutex::new(None),
        own_threads: Mutex::new(HashSet::new()),
        survivors: survivors::Survivors::default(),
        history: Arc::new(History::new(
            config
                .data
                .retention
                .filter(|_| !config.data.retain_without_replicas),
            data_dir.replicas_seen_ms(),
        )),
        log_options,
        hostname: match role {
            Role::Replica => os_hostname(),
            _ => config.lease.hostname.clone(),
        },
        on_lost: std::sync::OnceLock::new(),
    }))
}

/// Looks whether a mount can be made. That of a killed daemon stays until it can be: programs are to find it or ours.
fn prepare_mount_point(config: &Resolved) -> anyhow::Result<()> {
    let dir = &config.fuse.dir;
    if !config.fuse.skip_unmount
        && fuse::is_stale_mount(dir)
            .with_context(|| format!("clean up the mount at {}", dir.display()))?
    {
        return Ok(());
    }
    if dir.metadata().is_ok_and(|m| !m.is_dir()) {
        anyhow::bail!(
            "fuse.dir {} is not a directory; move it away, or set another fuse.dir",
            dir.display()
        );
    }
    std::fs::create_dir_all(dir)
        .with_context(|| format!("create mount point {} (fuse.dir)", dir.display()))?;
    Ok(())
}

/// Makes room for a mount; programs make no files there before the result is dropped.
fn clear_mount_point(config: &Resolved) -> anyhow::Result<fuse::BareDir> {
    let dir = &config.fuse.dir;
    let bare = fuse::BareDir::hold(dir);
    if !config.fuse.skip_unmount
        && fuse::clean_stale_mount(dir)
            .with_context(|| format!("clean up the mount at {}", dir.display()))?
    {
        tracing::warn!(mount = %dir.display(), "removed the mount of a daemon that was killed");
    }
    let hidden: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .collect();
    let databases: Vec<String> = hidden
        .iter()
        .filter(|entry| crate::store::is_database(&entry.path()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if !databases.is_empty() {
        tracing::error!(
            mount = %dir.display(), databases = databases.join(", "),
            "databases were made in the mount point while nothing was mounted, and are hidden now: stop litefs, move them \
             away, and bring what is in them back with `litefs import` or by hand"
        );
    } else if !hidden.is_empty() {
        tracing::warn!(mount = %dir.display(), "the mount point is not empty; what is in it is hidden while litefs runs");
    }
    Ok(bare)
}

async fn bind(config: &Resolved) -> anyhow::Result<TcpListener> {
    let mut last = None;
    for (host, port) in config.http.addr.bind_hosts() {
        match TcpListener::bind((host.as_str(), port)).await {
            Ok(listener) => {
                tracing::info!(addr = %listener.local_addr()?, "http api");
                return Ok(listener);
            }
            Err(e) => last = Some(e),
        }
    }
    let why = last.map_or_else(|| "no address".to_owned(), |e| e.to_string());
    anyhow::bail!(
        "cannot listen on http.addr {}: {why}; stop what uses it, or set another http.addr",
        config.http.addr
    )
}

fn os_hostname() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// A database takes a few descriptors; a thousand take more than the usual soft limit.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    ) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

const UPKEEP_NICE: i32 = 10;
/// A replica's database that nobody has had open for so many rounds is closed.
const IDLE_TICKS: u32 = 10;

/// Writes down when a replica was last here: history is kept for it.
struct Attendance {
    node: Arc<NodeContext>,
    data_dir: DataDir,
    replicas: Arc<Replicas>,
    written_ms: i64,
}

impl Attendance {
    fn note(&mut self) {
        if self.replicas.connected_count() > 0 {
            self.node.history.replica_is_here();
        }
        let Some(seen) = self.node.history.seen_ms() else {
            return;
        };
        if seen.abs_diff(self.written_ms) < ATTENDANCE_MS {
            return;
        }
        match self.data_dir.set_replicas_seen_ms(seen) {
            Ok(()) => self.written_ms = seen,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "note that a replica follows");
            }
        }
    }
}

/// How exactly it is known after a restart when a replica followed last.
const ATTENDANCE_MS: u64 = 60_000;

/// Compacts logs, enforces retention, closes idle databases of a replica, writes checksums down.
fn upkeep(
    store: &Store,
    pace: Option<Duration>,
    mut attendance: Attendance,
    stopped: &std::sync::mpsc::Receiver<()>,
) {
    use std::sync::mpsc::RecvTimeoutError;
    // SAFETY: changes the priority of this thread alone, by value. It can wait for programs, they should not for it.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, UPKEEP_NICE) };
    let mut last_persist = std::time::Instant::now();
    let mut persisted: HashMap<DbName, crate::ltx::Pos> = HashMap::new();
    let mut idle_since: HashMap<DbName, std::time::Instant> = HashMap::new();
    let mut last_seen: HashMap<DbName, crate::ltx::Pos> = HashMap::new();
    let tick = pace.map_or(MAINTENANCE, |pace| pace.clamp(MIN_MAINTENANCE, MAINTENANCE));
    while stopped.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
        attendance.note();
        let persist_now = last_persist.elapsed() >= PERSIST;
        for db in store.all() {
            match db.repair_log() {
                Ok(false) => {}
                Ok(true) => tracing::info!(db = %db.name(), "the log is sound again"),
                Err(error) => {
                    tracing::error!(db = %db.name(), error = chain(&error), "the log could not be synced and takes nothing before it can be");
                    continue;
                }
            }
            if let Err(error) = db.sync_log() {
                tracing::error!(db = %db.name(), error = chain(&error), "sync the log");
            }
            if let Err(error) = db.maintain_log(pace.is_some()) {
                tracing::warn!(db = %db.name(), error = chain(&error), "log upkeep");
            }
            let pos = db.pos();
            if last_seen.get(db.name()) == Some(&pos) {
                db.release_buffers();
            } else {
                last_seen.insert(db.name().clone(), pos);
            }
            if db.serves_readers() {
                let now = std::time::Instant::now();
                let since = *idle_since.entry(db.name().clone()).or_insert(now);
                if db.reader_count() > 0 {
                    idle_since.remove(db.name());
                } else if now - since >= IDLE_TICKS * tick
                    && let Err(error) = db.release_readers()
                {
                    tracing::warn!(db = %db.name(), error = chain(&error), "close an idle database");
                }
            }
            if persist_now && persisted.get(db.name()) != Some(&db.pos()) {
                match db.persist(false) {
                    Ok(()) => {
                        persisted.insert(db.name().clone(), db.pos());
                    }
                    Err(error) => {
                        tracing::warn!(db = %db.name(), error = chain(&error), "write checksums")
                    }
                }
            }
        }
        if persist_now {
            last_persist = std::time::Instant::now();
        }
    }
}
