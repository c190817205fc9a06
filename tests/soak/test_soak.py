"""A few seconds of the soak that `make soak MINUTES=10` runs for as long as it is told; and the one that must fail."""

import signal
import subprocess
import sys
import threading


def soak(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.soak", *options]
    # Interrupted, not killed, when it hangs: it then removes what it made.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        interrupt = threading.Timer(100, process.send_signal, (signal.SIGINT,))
        interrupt.start()
        said, complained = process.communicate()
        interrupt.cancel()
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def test_random_deaths_cost_no_byte_and_leave_nothing() -> None:
    done = soak("--minutes", "0.25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'upgrade the server': " in done.stdout


def test_a_flipped_byte_fails_it() -> None:
    """The control: whoever is given other bytes than were stored is heard."""
    done = soak("--spoil", "--minutes", "0.5")
    assert done.returncode == 1, done.stdout
    assert "WRONG BYTES" in done.stderr
    assert "was given another block's bytes" in done.stderr
