//! The operators users write in YAML, one file each, and the one list of them.
