"""Long steps, told as they go: what runs, a dot every few seconds, how long it took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_DOT_S = 2.0


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show that `what` runs, for as long as the block lasts."""
    print(f"  {what} ", end="", flush=True)
    started, over = time.monotonic(), threading.Event()
    dots = threading.Thread(target=_print_dots, args=(over,), daemon=True)
    dots.start()
    try:
        yield
    finally:
        over.set()
        dots.join()
        print(f" {time.monotonic() - started:.1f} s", flush=True)


def _print_dots(over: threading.Event) -> None:
    while not over.wait(_DOT_S):
        print(".", end="", flush=True)
