"""Two engines' worth of clients on one server, and random deaths: ``python -m tests.soak --minutes 10``.

Ends with code 1 at the first byte that is another block's, at an end that no deed explains, and at whatever is left
behind when the engines are gone: pins, open writes, sessions, descriptors, threads, memory.
"""

import argparse
import secrets
import sys

from tests.soak.run import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of the order of the deeds (default: random)")
    parser.add_argument("--spoil", action="store_true", help="flip bytes of the arena meanwhile: the run must fail")
    options = parser.parse_args()
    soak = Soak(options.seed, spoil=options.spoil)
    try:
        soak.run(options.minutes * 60)
    except AssertionError as error:
        print(f"soak: FAILED with seed {options.seed}: {error}", file=sys.stderr)
        return 1
    finally:
        soak.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
