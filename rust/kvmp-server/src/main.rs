//! The binary `kvmp`: a shim over `kvmp_server::cli`.

fn main() {
    std::process::exit(kvmp_server::cli::main(std::env::args().collect()));
}
