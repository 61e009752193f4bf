//! The command line: one file per subcommand, each with its flags, its help and `run`.
//!
//! Flags may be written as LiteFS writes them, `-config x` ([`dashes`]). Exit codes are in
//! [`crate::exit`]. Errors are printed here, once, with their whole chain.

mod bench;
mod cluster;
mod dashes;
mod export;
mod handoff;
mod import;
mod lost;
mod mount;
mod run;
mod status;
mod table;
mod version;
mod wait;

use crate::config::NodeUrl;
use crate::exit;
use clap::{Parser, Subcommand};
use std::ffi::OsString;

/// SQLite databases in a directory, replicated to every node.
#[derive(Debug, Parser)]
#[command(name = "litefs", version = version::number(), subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::Args),
    Run(run::Args),
    Export(export::Args),
    Import(import::Args),
    Status(status::Args),
    Cluster(cluster::Args),
    Handoff(handoff::HandoffArgs),
    Promote(handoff::PromoteArgs),
    Bench(bench::Args),
    Lost(lost::Args),
    Wait(wait::Args),
    Version(version::Args),
}

/// Which node to ask.
#[derive(Debug, Clone, clap::Args)]
struct NodeArgs {
    /// URL of the node's API.
    #[arg(long, value_name = "URL", default_value_t = NodeUrl::new("localhost", 20202))]
    url: NodeUrl,
}

/// Parses the command line, runs the command, prints its error; returns the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    let cli = match Cli::try_parse_from(dashes::normalize(args)) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to tell the user if even this cannot be printed.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let end = match cli.command {
        Command::Mount(args) => mount::run(&args, crate::node::run),
        Command::Run(args) => run::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Cluster(args) => cluster::run(&args),
        Command::Handoff(args) => handoff::handoff(&args),
        Command::Promote(args) => handoff::promote(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Lost(args) => lost::run(&args),
        Command::Wait(args) => wait::run(&args),
        Command::Version(args) => version::run(&args),
    };
    end.unwrap_or_else(|error| {
        eprintln!("litefs: {error:#}");
        exit::code_of(&error)
    })
}

/// Runs a command that only asks a node: one thread is enough.
fn block_on<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;

    /// Serves `router` until the test ends.
    pub(super) async fn serve(router: Router) -> NodeUrl {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async { axum::serve(listener, router).await });
        NodeUrl::new("127.0.0.1", port)
    }

    fn code(line: &str) -> i32 {
        main(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_flags_end_with_2_and_help_with_0() {
        for line in [
            "litefs",
            "litefs unknown",
            "litefs mount -unknown",
            "litefs mount app",
            "litefs mount -config",
            "litefs export -name x",
            "litefs export path",
            "litefs import -name x -url nowhere path",
            "litefs run",
            "litefs run app",
            "litefs run -promote -with-halt-lock-on x -- app",
            "litefs run -wait soon -- app",
            "litefs wait -db app.db",
            "litefs wait -pos 0000000000000001",
            "litefs wait -db app.db -pos 0000000000000001 -consistency strong",
            "litefs wait -db app.db -consistency sometimes",
        ] {
            assert_eq!(code(line), exit::USAGE, "{line}");
        }
        for line in [
            "litefs version",
            "litefs help",
            "litefs mount -help",
            "litefs mount -h",
        ] {
            assert_eq!(code(line), 0, "{line}");
        }
    }

    #[test]
    fn errors_while_running_end_with_1() {
        assert_eq!(code("litefs import -name x /no/such/file"), exit::RUNTIME);
        assert_eq!(code("litefs wait -db app.db -pos 1"), exit::RUNTIME);
        assert_eq!(
            code("litefs run -with-halt-lock-on /db -- app"),
            exit::RUNTIME
        );
    }
}
