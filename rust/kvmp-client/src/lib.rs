//! kvmp client
