//! Plain files, other users, and the command line.
