//! What is borrowed from the kernel, so that nothing is left behind however the suite ends.
//!
//! | thing | how it goes away |
//! |---|---|
//! | network namespaces | they have no names, and live as long as a process in them or our descriptor |
//! | mounts | they are in a mount namespace of ours |
//! | loop devices | attached by `mount -o loop`, which lets them go with the mount |
//! | nodes and clients | the kernel kills them when we die |
//!
//! Only the directory with images and logs stays when the suite is killed.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Says why clusters cannot be run here, if so.
pub(crate) fn cannot_run() -> Option<String> {
    // SAFETY: it has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        return Some("namespaces and mounts need root".into());
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse".into());
    }
    for (program, package) in [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("mkfs.ext4", "e2fsprogs"),
    ] {
        let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
        if !found
            .iter()
            .any(|dir| Path::new(dir).join(program).exists())
        {
            return Some(format!("{program} is missing: install {package}"));
        }
    }
    NetNs::new()
        .err()
        .map(|e| format!("network namespaces cannot be made: {e}"))
}

/// Moves this process into a mount namespace of its own. Before any thread is started.
pub(crate) fn own_mounts() -> Result<()> {
    // SAFETY: no memory is touched.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    anyhow::ensure!(moved == 0, "unshare mounts: {}", io::Error::last_os_error());
    run(Command::new("mount").args(["--make-rprivate", "/"]))
}

/// Runs a program to its end, which must be success.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Has the kernel kill the program when the suite dies.
pub(crate) fn die_with_us(command: &mut Command) {
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
        );
    }
}

/// Starts the program in a time namespace: its monotonic clock is ahead by so much.
pub(crate) fn with_monotonic_ahead(command: &mut Command, by: Duration) {
    let offsets = format!("monotonic {0} 0\nboottime {0} 0\n", by.as_secs());
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            if libc::unshare(libc::CLONE_NEWTIME) != 0 {
                return Err(io::Error::last_os_error());
            }
            let path = c"/proc/self/timens_offsets";
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            let written = libc::write(fd, offsets.as_ptr().cast(), offsets.len());
            match usize::try_from(written) {
                Ok(n) if n == offsets.len() => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
}

/// A network of its own.
#[derive(Debug)]
pub(crate) struct NetNs(File);

impl NetNs {
    pub(crate) fn new() -> io::Result<NetNs> {
        let made = std::thread::spawn(|| {
            // SAFETY: no memory is touched; only this thread moves, and it ends.
            match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                0 => File::open("/proc/thread-self/ns/net").map(NetNs),
                _ => Err(io::Error::last_os_error()),
            }
        });
        made.join()
            .map_err(|_| io::Error::other("the thread panicked"))?
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Where `ip` finds it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd())
    }

    /// A program that will run in it.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let fd = self.fd();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only a system call is made.
        unsafe { command.pre_exec(move || enter(fd)) };
        command
    }

    /// Runs a command line in it.
    pub(crate) fn run(&self, line: &str) -> Result<()> {
        let mut words = line.split_whitespace();
        run(self.command(words.next().unwrap_or_default()).args(words))
    }

    /// Replaces the rules for packets that come in: those of the given addresses are dropped.
    pub(crate) fn drop_from(&self, addresses: &[String]) -> Result<()> {
        let mut rules = "table inet jepsen {}\ndelete table inet jepsen\n".to_owned();
        if !addresses.is_empty() {
            let set = addresses.join(", ");
            rules += &format!(
                "table inet jepsen {{\nchain in {{\ntype filter hook input priority 0;\nip saddr {{ {set} }} drop;\n}}\n}}\n"
            );
        }
        let mut nft = self.command("nft");
        nft.args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        let mut nft = nft.spawn().context("nft")?;
        nft.stdin
            .take()
            .context("nft")?
            .write_all(rules.as_bytes())?;
        let output = nft.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "nft: {said}");
        Ok(())
    }

    /// Asks the node in it, by its own loopback, which no partition reaches. Returns status and body.
    pub(crate) fn ask(
        &self,
        port: u16,
        method: &str,
        path: &str,
        patience: Duration,
    ) -> Result<(u16, String)> {
        let fd = self.fd();
        let connect = std::thread::spawn(move || {
            enter(fd)?;
            TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), patience)
        });
        let mut tcp = connect
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        tcp.set_read_timeout(Some(patience))?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        tcp.write_all(request.as_bytes())?;
        let mut answer = String::new();
        tcp.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let status = head.split_whitespace().nth(1).context("no status")?;
        Ok((status.parse()?, body.to_owned()))
    }
}

fn enter(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is touched.
    match unsafe { libc::setns(fd, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A disk: an ext4 file system in a file.
#[derive(Debug)]
pub(crate) struct Disk {
    file: PathBuf,
    /// Where it is mounted.
    pub(crate) at: PathBuf,
    bytes: u64,
}

impl Disk {
    pub(crate) fn new(dir: &Path, bytes: u64) -> Result<Disk> {
        let disk = Disk {
            file: dir.join("disk.img"),
            at: dir.join("disk"),
            bytes,
        };
        std::fs::create_dir_all(&disk.at)?;
        disk.format()?;
        disk.mount()?;
        Ok(disk)
    }

    fn format(&self) -> Result<()> {
        let file = File::create(&self.file)?;
        file.set_len(self.bytes)?;
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0"])
            .arg(&self.file))
    }

    fn mount(&self) -> Result<()> {
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .arg(&self.file)
            .arg(&self.at))
    }

    pub(crate) fn unmount(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match run(Command::new("umount").arg(&self.at)) {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The power fails: what was not synced is forgotten, and nothing works until the machine is up again.
    pub(crate) fn cut(&self) -> Result<()> {
        const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
        let no_log_flush: u32 = 2;
        let dir = File::open(&self.at)?;
        // SAFETY: the descriptor is open, and the argument is a pointer to a u32.
        let done =
            unsafe { libc::ioctl(dir.as_raw_fd(), EXT4_IOC_SHUTDOWN, &raw const no_log_flush) };
        anyhow::ensure!(done == 0, "cut: {}", io::Error::last_os_error());
        Ok(())
    }

    /// The machine is up again: the journal is replayed.
    pub(crate) fn come_back(&self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    /// The disk is replaced by an empty one.
    pub(crate) fn replace(&self) -> Result<()> {
        self.unmount()?;
        std::fs::remove_file(&self.file)?;
        self.format()?;
        self.mount()
    }

    /// Takes all space that is free.
    pub(crate) fn fill(&self) -> Result<()> {
        let ballast = File::create(self.ballast())?;
        // In ever smaller bites; the file system keeps a little for itself.
        let (mut at, mut bite) = (0_i64, 64_i64 << 20);
        while bite >= 4096 {
            // SAFETY: the descriptor is open.
            let done = unsafe { libc::fallocate(ballast.as_raw_fd(), 0, at, bite) };
            match done {
                0 => at += bite,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::StorageFull => bite /= 2,
                _ => bail!("fill: {}", io::Error::last_os_error()),
            }
        }
        Ok(())
    }

    pub(crate) fn free(&self) -> Result<()> {
        match std::fs::remove_file(self.ballast()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        // Blocks come back when the removal is committed.
        File::open(&self.at)?.sync_all()?;
        Ok(())
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }
}

/// Ends a FUSE mount as a reboot would: whoever waits for its daemon gets an error.
pub(crate) fn abort_fuse(at: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let at = at.display().to_string();
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let is_fuse = line
            .split(" - ")
            .nth(1)
            .is_some_and(|kind| kind.starts_with("fuse"));
        if let (true, Some(&device), true) =
            (fields.get(4) == Some(&at.as_str()), fields.get(2), is_fuse)
            && let Some(connection) = device.strip_prefix("0:")
        {
            let abort = format!("/sys/fs/fuse/connections/{connection}/abort");
            let _ = std::fs::write(abort, "1");
        }
    }
}

/// Takes away all that is mounted at a place.
pub(crate) fn detach(at: &Path) {
    while run(Command::new("umount").arg("-l").arg(at)).is_ok() {}
}

/// Sends a signal to a child that has not been waited for.
pub(crate) fn signal(child: &Child, signal: i32) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // SAFETY: the child is ours and not yet waited for.
        unsafe { libc::kill(pid, signal) };
    }
}

/// Waits for a child's end.
pub(crate) fn wait_end(child: &mut Child, patience: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            _ if Instant::now() > deadline => return None,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
