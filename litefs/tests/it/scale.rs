//! Many databases, large databases.
