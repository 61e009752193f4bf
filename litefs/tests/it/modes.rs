//! What SQLite can do to a database, followed by a replica.
