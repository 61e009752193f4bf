//! A mount that only mirrors a directory: what the kernel and this crate cost without any meaning of files.
//!
//! usage: mirror BACKING MOUNTPOINT [passthrough|cached|direct]

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use fuse::{
    Caller, Errno, Flow, MountOptions, Op, OpenAnswer, OpenRequest, Serve, VirtualFile, Volume,
};

struct Plain(Serve);

impl Volume for Plain {
    fn virtual_file(&self, _path: &Path) -> Option<VirtualFile> {
        None
    }
    fn is_virtual_name(&self, _path: &Path) -> bool {
        false
    }
    fn virtual_names(&self, _dir: &Path) -> Vec<OsString> {
        Vec::new()
    }
    fn open_may_block(&self, _request: &OpenRequest<'_>) -> bool {
        false
    }
    fn open(&self, request: &OpenRequest<'_>) -> Result<OpenAnswer, Errno> {
        let journal = request.path.to_string_lossy().ends_with("-journal");
        Ok(OpenAnswer {
            serve: if journal && std::env::var_os("J").is_none() {
                Serve::Cached
            } else {
                self.0
            },
            mark: 0,
        })
    }
    fn released(&self, _path: &Path, _writable: bool, _mark: u8) {}
    fn before(&self, _op: &Op<'_>, _caller: Caller) -> Result<Flow, Errno> {
        Ok(Flow::Proceed)
    }
    fn after(&self, _op: &Op<'_>, _caller: Caller) {}
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let serve = match args.get(3).map(String::as_str) {
        Some("cached") => Serve::Cached,
        Some("direct") => Serve::Direct,
        _ => Serve::Passthrough,
    };
    let options = MountOptions {
        mount_point: args[2].clone().into(),
        backing: args[1].clone().into(),
        allow_other: false,
        passthrough: serve == Serve::Passthrough,
        threads: 4,
    };
    fuse::clean_stale_mount(&options.mount_point)?;
    let mounted = fuse::mount(Arc::new(Plain(serve)), &options)?;
    println!(
        "mounted, passthrough {}; end of input unmounts",
        mounted.passthrough()
    );
    std::io::stdin().lines().for_each(drop);
    mounted.unmount(true).map(drop)
}
