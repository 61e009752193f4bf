//! The `litefs` program: dispatches to one file per subcommand.

fn main() {
    std::process::exit(litefs::cmd::main(std::env::args_os()));
}
