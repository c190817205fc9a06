"""The ``kvmp`` command: ``vllm`` and ``doctor`` are Python's, all else is the Rust program in the extension."""

import signal
import sys


def main() -> int:
    """Run ``kvmp`` with this process's arguments and return its exit code."""
    command, arguments = sys.argv[1:2], sys.argv[2:]
    if command == ["vllm"]:
        from .commands import vllm_serve

        return vllm_serve.main(arguments)
    if command == ["doctor"]:
        from .commands import doctor

        return doctor.main(arguments)
    from ._kvmp import main as run  # the extension alone: nothing here may import numpy

    # Python's own handler would turn a Ctrl-C that the server has drained for into a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return run(["kvmp", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
