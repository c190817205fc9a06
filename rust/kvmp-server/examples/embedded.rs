//! A kvmp server inside another Rust program, and a client of it: `cargo run -p kvmp-server --example embedded`.

use kvmp_client::{Bound, Client, ConnectOptions};
use kvmp_core::wire::Role;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server =
        kvmp_server::Server::builder().size(64 << 20).name("embedded-example").tcp("off").ephemeral(true).start()?;
    println!("engines connect to {}", server.endpoint());
    let client = Client::connect(&server.endpoint(), &ConnectOptions::new(Role::Tool), &Bound::ms(1000))?;
    println!("a round trip takes {:?}", client.ping(&Bound::ms(100))?);
    server.stop();
    Ok(())
}
