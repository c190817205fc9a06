"""The ``kvmp`` command: a shim over the Rust program, which the wheel carries inside its extension module."""

import signal
import sys


def main() -> int:
    """Run ``kvmp`` with this process's arguments and return its exit code."""
    from ._kvmp import main as run  # the extension alone: nothing here may import numpy

    # Python's own handler would turn a Ctrl-C that the server has drained for into a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return run(["kvmp", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
