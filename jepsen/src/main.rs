//! See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    litefs_jepsen::cli::main()
}
