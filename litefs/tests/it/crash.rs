//! Nodes and programs killed at every labelled step.
