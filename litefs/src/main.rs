//! The `litefs` program: dispatches to one file per subcommand.

fn main() {}
