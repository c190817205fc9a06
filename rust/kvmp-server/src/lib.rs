//! kvmp server
