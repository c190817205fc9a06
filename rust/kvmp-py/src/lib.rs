//! kvmp._kvmp
