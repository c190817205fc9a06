"""Settings: parsed once, refused by name."""

import dataclasses

import pytest

from kvmp.vllm.options import Options, parse_options


def test_defaults():
    assert parse_options({}, {}) == Options("tcp://localhost:5555", None, 100, True)


def test_every_key():
    given = {"kvmp.endpoint": "unix:/s", "kvmp.socket_dir": "/d", "kvmp.timeout_ms": 7, "kvmp.save_decode": False}
    assert parse_options(given, {}) == Options("unix:/s", "/d", 7, False)
    assert {f"kvmp.{field.name}" for field in dataclasses.fields(Options)} == set(given)


def test_the_environment_names_the_server_and_the_configuration_wins():
    environ = {"KVMP_ENDPOINT": "unix:/from-environment"}
    assert parse_options({}, environ).endpoint == "unix:/from-environment"
    assert parse_options({"kvmp.endpoint": "unix:/s"}, environ).endpoint == "unix:/s"


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"kvmp.endpont": "unix:/s"}, ["'kvmp.endpont'", "did you mean 'kvmp.endpoint'", "kvmp.save_decode"]),
        ({"timeout_ms": 5}, ["'timeout_ms'", "'kvmp.timeout_ms'"]),
        ({"zzz": 5}, ["'zzz'", "kvmp.endpoint"]),
        ({"kvmp.timeout_ms": "100"}, ["kvmp.timeout_ms", "'100'", "milliseconds"]),
        ({"kvmp.timeout_ms": True}, ["kvmp.timeout_ms", "True"]),
        ({"kvmp.timeout_ms": 0}, ["kvmp.timeout_ms", "0 given", "1 to 60000"]),
        ({"kvmp.save_decode": 1}, ["kvmp.save_decode", "true or false"]),
        ({"kvmp.endpoint": "http://x"}, ["kvmp.endpoint", "'http://x'", "unix:PATH"]),
        ({"kvmp.socket_dir": ""}, ["kvmp.socket_dir", "folder"]),
    ],
)
def test_what_is_wrong_is_named(given, texts):
    with pytest.raises(ValueError, match=r"given|unknown key") as caught:
        parse_options(given, {})
    for text in texts:
        assert text in str(caught.value)


def test_a_wrong_environment_is_named():
    with pytest.raises(ValueError, match="KVMP_ENDPOINT: 'x' given"):
        parse_options({}, {"KVMP_ENDPOINT": "x"})
