"""The commands that only the wheel has: `kvmp vllm serve` and `kvmp doctor`; all others are the Rust program's."""
