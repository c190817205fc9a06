"""Where a server is started that answers at an endpoint: two places, two names, and commands that work."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvmp._kvmp import default_socket
from kvmp.config import ConfigError, ConnectorConfig
from kvmp.endpoint import serve_flags, server_name, start_command

ENDPOINTS = [
    "tcp://localhost:5555",
    "tcp://localhost:6000",
    "unix:/a/x.sock",
    "unix:/b/x.sock",
    "unix:/a/kvmp.sock",
    "unix:/run/a b.sock",
    "unix:/run/c d.sock",
    f"unix:{default_socket('x')}",
]


def test_two_endpoints_give_two_names_that_a_server_takes() -> None:
    names = [server_name(endpoint) for endpoint in ENDPOINTS]
    assert len(set(names)) == len(names)
    assert names[0] == "kvmp"
    assert names[-1] == "x"
    assert all(len(name) <= 64 and name.isascii() and " " not in name for name in names)


def test_the_command_for_a_place_starts_a_server_there(tmp_path: Path) -> None:
    endpoint = f"unix:{tmp_path}/my server.sock"
    words = shlex.split(start_command(endpoint, "64MiB"))
    watched = ["--until-pid", str(os.getpid()), "--ephemeral"]
    with subprocess.Popen([sys.executable, "-m", *words, *watched], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert f"ready: {endpoint}" in server.stderr.readline()
        server.terminate()


@pytest.mark.parametrize(("host", "listens"), [("localhost", "localhost"), ("[::1]", "[::1]"), ("here", "127.0.0.1")])
def test_a_server_is_told_to_listen_on_loopback(host: str, listens: str) -> None:
    assert serve_flags(f"tcp://{host}:6000")[-1] == f"{listens}:6000"


@pytest.mark.parametrize("host", ["10.0.0.5", "0.0.0.0", "[fe80::1]"])
def test_an_address_where_no_server_can_answer_is_refused(host: str) -> None:
    for extra in ({"kvmp.endpoint": f"tcp://{host}:5555"}, {"lmcache.mp.host": host}):
        with pytest.raises(ConfigError, match="of this machine"):
            ConnectorConfig.read(extra, {})


@pytest.mark.parametrize("endpoint", ["unix://rel/x.sock", "unix:rel/x.sock", "unix:"])
def test_only_an_absolute_path_is_an_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="unix:/PATH"):
        ConnectorConfig.read({"kvmp.endpoint": endpoint}, {})


def test_two_slashes_more_are_the_same_endpoint() -> None:
    assert ConnectorConfig.read({"kvmp.endpoint": "unix:///a/x.sock"}, {})
    assert serve_flags("unix:///a/x.sock") == serve_flags("unix:/a/x.sock")


def test_a_short_address_listens_where_clients_arrive() -> None:
    assert serve_flags("tcp://127.1:6000")[-1] == "127.0.0.1:6000"
