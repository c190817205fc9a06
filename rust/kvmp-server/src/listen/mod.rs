//! The control plane: sockets, Hello and Welcome, `open` and `join`, hang-ups. Never on the data path.

mod control;
mod socket;
mod tcp;
mod watch;

pub(crate) use control::{Control, ControlStart};
pub(crate) use socket::{BoundSocket, Doors, canonical, is_full, who_listens};
pub(crate) use tcp::Rendezvous;
