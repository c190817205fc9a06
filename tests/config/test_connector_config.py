"""Settings: read from every source, an earlier one wins; refused by name."""

import contextlib
import copy
import dataclasses
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmp import KvmpError
from kvmp.config import ConfigError, ConnectorConfig
from kvmp.config.connector import connector_settings
from kvmp.config.size import parse_size, size_text

EVERY_KEY = {
    "kvmp.endpoint": "unix:/s",
    "kvmp.socket_dir": "/d",
    "kvmp.timeout_ms": 7,
    "kvmp.save_decode": False,
    "kvmp.on_unreachable": "spawn",
    "kvmp.spawn_size": "8GiB",
    "kvmp.verify": "always",
}
EVERY_VARIABLE = {
    "KVMP_ENDPOINT": "unix:/s",
    "KVMP_SOCKET_DIR": "/d",
    "KVMP_TIMEOUT_MS": "7",
    "KVMP_SAVE_DECODE": "0",
    "KVMP_ON_UNREACHABLE": "spawn",
    "KVMP_SPAWN_SIZE": "8GiB",
    "KVMP_VERIFY": "always",
}
EVERY_LINE = """[kvmp]
endpoint = "unix:/s"
socket_dir = "/d"
timeout_ms = 7
save_decode = false
on_unreachable = "spawn"
spawn_size = "8GiB"
verify = "always"
[other]
x = 1
"""
ALL_SET = ConnectorConfig("unix:/s", "/d", 7, False, "spawn", "8GiB", "always")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "kvmp.toml"
        path.write_text(text)
        return str(path)

    return write


def raised(extra_config, environ=None):
    with pytest.raises(ConfigError) as caught:
        ConnectorConfig.read(extra_config, environ or {})
    return str(caught.value)


def test_defaults():
    assert ConnectorConfig.read(None, {}) == ConnectorConfig.read({}, {}) == ConnectorConfig()
    assert ConnectorConfig() == ConnectorConfig("tcp://localhost:5555", None, 100, True, "degrade", None, "off")
    assert ConnectorConfig().timeout_s == 0.1


def test_every_field_in_every_source(file):
    assert ConnectorConfig.read(EVERY_KEY, {}) == ALL_SET
    assert ConnectorConfig.read({}, EVERY_VARIABLE) == ALL_SET
    assert ConnectorConfig.read({"kvmp.config_file": file(EVERY_LINE)}, {}) == ALL_SET
    assert {setting.key for setting in connector_settings()} == set(EVERY_KEY)
    assert {setting.variable for setting in connector_settings()} == set(EVERY_VARIABLE)


def test_extra_config_wins_over_the_environment_over_the_file_over_the_default(file):
    path = file("[kvmp]\ntimeout_ms = 1\n")
    environ = {"KVMP_CONFIG_FILE": path}
    assert ConnectorConfig.read({}, environ).timeout_ms == 1
    environ["KVMP_TIMEOUT_MS"] = "2"
    assert ConnectorConfig.read({}, environ).timeout_ms == 2
    assert ConnectorConfig.read({"kvmp.timeout_ms": 3}, environ).timeout_ms == 3
    assert ConnectorConfig.read({"kvmp.config_file": path}, {"KVMP_CONFIG_FILE": "/nowhere"}).timeout_ms == 1


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("KVMP_TIMEOUT_MS", "9")
    assert ConnectorConfig.read({}).timeout_ms == 9


def test_an_empty_variable_is_unset():
    assert ConnectorConfig.read({}, dict.fromkeys(EVERY_VARIABLE, "")) == ConnectorConfig()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_a_flag_as_text(text, value):
    assert ConnectorConfig.read({}, {"KVMP_SAVE_DECODE": text}).save_decode is value


@pytest.mark.parametrize(
    ("extra_config", "endpoint"),
    [
        ({"lmcache.mp.host": "node7", "lmcache.mp.port": 6000}, "tcp://node7:6000"),
        ({"lmcache.mp.host": "tcp://node7"}, "tcp://node7:5555"),
        ({"lmcache.mp.host": "127.0.0.1"}, "tcp://127.0.0.1:5555"),
        ({"lmcache.mp.port": 6000}, "tcp://localhost:6000"),
        ({"lmcache.mp.port": "6000"}, "tcp://localhost:6000"),
        ({"lmcache.mp.port": 6000, "kvmp.endpoint": "unix:/s"}, "unix:/s"),
        ({"lmcache.mp.mq_timeout": 3, "lmcache.local_cpu": True}, "unix:/environment"),
    ],
)
def test_lmcaches_place_is_the_endpoint(extra_config, endpoint):
    assert ConnectorConfig.read(extra_config, {"KVMP_ENDPOINT": "unix:/environment"}).endpoint == endpoint


def test_what_belongs_to_others_is_left_alone():
    extra_config = {"cpu_bytes_to_use": 1, "vllm.endpoint": 2, "kvm.foo": 3, "connectors": [], "lmcache.x": 4, 5: 6}
    assert ConnectorConfig.read(extra_config, {}) == ConnectorConfig()


def test_what_kubernetes_and_others_set_is_left_alone():
    environ = {
        "KVMP_SERVICE_HOST": "10.0.0.1",
        "KVMP_SERVICE_PORT": "5555",
        "KVMP_SERVICE_PORT_RENDEZVOUS": "5555",
        "KVMP_PORT": "tcp://10.0.0.1:5555",
        "KVMP_PORT_5555_TCP": "tcp://10.0.0.1:5555",
        "KVMP_PORT_5555_TCP_ADDR": "10.0.0.1",
        "KVMP_PORT_5555_TCP_PORT": "5555",
        "KVMP_PORT_5555_TCP_PROTO": "tcp",
        "KVMP_LOG": "debug",
        "KVMP_REPLACE_LMCACHE": "1",
        "KVM_LOG": "x",
        "MY_ENDPOINT": "x",
    }
    assert ConnectorConfig.read({}, environ) == ConnectorConfig()


@pytest.mark.parametrize(
    ("extra_config", "texts"),
    [
        ({"kvmp.endpont": "unix:/s"}, ["'kvmp.endpont'", "did you mean 'kvmp.endpoint'", "kvmp.save_decode"]),
        ({"kvmp.zzzzzzzzzzz": 1}, ["'kvmp.zzzzzzzzzzz'. Allowed", "kvmp.config_file"]),
        ({"kvmp.": 1}, ["'kvmp.'. Allowed"]),
        ({"kvmp.x": 1}, ["'kvmp.x'. Allowed"]),
        ({"kvmp.size": 1}, ["'kvmp.size'", "mean 'kvmp.spawn_size'"]),
        ({"timeout_ms": 5}, ["'timeout_ms'", "mean 'kvmp.timeout_ms'"]),
        ({"endpoint": "unix:/s"}, ["'endpoint'", "mean 'kvmp.endpoint'"]),
        ({"kvpm.endpoint": "unix:/s"}, ["'kvpm.endpoint'", "mean 'kvmp.endpoint'"]),
        ({"kvmp_endpoint": "unix:/s"}, ["'kvmp_endpoint'", "mean 'kvmp.endpoint'"]),
        ({"kvmpendpoint": "unix:/s"}, ["'kvmpendpoint'", "mean 'kvmp.endpoint'"]),
        ({"KVMP_TIMEOUT_MS": 1}, ["'KVMP_TIMEOUT_MS'", "mean 'kvmp.timeout_ms'"]),
        ({"kvmp.timeout_ms": "100"}, ["['kvmp.timeout_ms']", "'100' given", "milliseconds"]),
        ({"kvmp.timeout_ms": True}, ["kvmp.timeout_ms", "True"]),
        ({"kvmp.timeout_ms": 5.0}, ["kvmp.timeout_ms", "5.0"]),
        ({"kvmp.timeout_ms": 0}, ["kvmp.timeout_ms", "0 given", "1 to 60000"]),
        ({"kvmp.save_decode": 1}, ["kvmp.save_decode", "true or false"]),
        ({"kvmp.endpoint": "http://x"}, ["kvmp.endpoint", "'http://x'", "unix:/PATH"]),
        ({"kvmp.endpoint": "unix:s"}, ["'unix:s'"]),
        ({"kvmp.endpoint": "tcp://x:65536"}, ["'tcp://x:65536'"]),
        ({"kvmp.endpoint": None}, ["kvmp.endpoint", "None given"]),
        ({"kvmp.socket_dir": ""}, ["kvmp.socket_dir", "folder"]),
        ({"kvmp.config_file": 3}, ["kvmp.config_file", "TOML file"]),
        ({"kvmp.on_unreachable": "die"}, ["kvmp.on_unreachable", "'die' given", "'degrade' or 'fail' or 'spawn'"]),
        ({"kvmp.on_unreachable": "spawn"}, ["['kvmp.on_unreachable']", "without kvmp.spawn_size", "8GiB"]),
        ({"kvmp.spawn_size": "8 parsecs"}, ["kvmp.spawn_size", "'8 parsecs' given", "64GiB"]),
        ({"kvmp.spawn_size": 8}, ["kvmp.spawn_size", "8 given"]),
        ({"lmcache.mp.host": "ipc:///x"}, ["lmcache.mp.host", "'ipc:///x'"]),
        ({"lmcache.mp.host": 7}, ["lmcache.mp.host", "7 given"]),
        ({"lmcache.mp.port": "many"}, ["lmcache.mp.port", "'many' given", "65535"]),
    ],
)
def test_what_is_wrong_in_the_extra_config_is_named(extra_config, texts):
    error = raised(extra_config)
    assert all(text in error for text in ["kv_connector_extra_config", *texts]), error


@pytest.mark.parametrize(
    ("environ", "texts"),
    [
        ({"KVMP_ENDPOINT": "x"}, ["KVMP_ENDPOINT: 'x' given", "tcp://HOST:PORT"]),
        ({"KVMP_TIMEOUT_MS": "1.5"}, ["KVMP_TIMEOUT_MS: '1.5' given", "whole number"]),
        ({"KVMP_TIMEOUT_MS": "-1"}, ["KVMP_TIMEOUT_MS: '-1' given"]),
        ({"KVMP_SAVE_DECODE": "yes"}, ["KVMP_SAVE_DECODE: 'yes' given", "true, false, 1 or 0"]),
        ({"KVMP_ON_UNREACHABLE": "spawn"}, ["KVMP_ON_UNREACHABLE", "KVMP_SPAWN_SIZE"]),
        ({"KVMP_ENDPOINTS": "unix:/s"}, ["'KVMP_ENDPOINTS'", "mean 'KVMP_ENDPOINT'"]),
        ({"KVPM_ENDPOINT": "unix:/s"}, ["'KVPM_ENDPOINT'", "mean 'KVMP_ENDPOINT'"]),
        ({"kvmp_endpoint": "unix:/s"}, ["'kvmp_endpoint'", "mean 'KVMP_ENDPOINT'"]),
        ({"KVMP_TIMEOUT": "5"}, ["'KVMP_TIMEOUT'", "mean 'KVMP_TIMEOUT_MS'"]),
        ({"KVMP_REPLACE_LMCACH": "1"}, ["mean 'KVMP_REPLACE_LMCACHE'"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(environ, texts):
    error = raised({}, environ)
    assert all(text in error for text in texts), error


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("[kvmp]\ntimeout = 5", ["unknown name 'timeout'", "mean 'timeout_ms'"]),
        ("[kvmp]\nconfig_file = 'x'", ["unknown name 'config_file'"]),
        ("[kvmp]\ntimeout_ms = '5'", ["[kvmp] timeout_ms: '5' given", "milliseconds"]),
        ("[kvmp]\non_unreachable = 'spawn'", ["[kvmp] on_unreachable", "kvmp.spawn_size"]),
        ("timeout_ms = 5", ["no table [kvmp]"]),
        ("kvmp = 5", ["no table [kvmp]"]),
        ("[kvmp", ["is no TOML"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(file, content, texts):
    path = file(content)
    error = raised({}, {"KVMP_CONFIG_FILE": path})
    assert all(text in error for text in [path, *texts]), error


def test_a_file_that_is_not_there_is_named_with_who_named_it(tmp_path):
    path = str(tmp_path / "none.toml")
    assert re.match(f"KVMP_CONFIG_FILE: '{path}' cannot be read: No such file", raised({}, {"KVMP_CONFIG_FILE": path}))
    assert "['kvmp.config_file']" in raised({"kvmp.config_file": path})


def test_an_error_is_kvmps_and_a_value_error():
    assert issubclass(ConfigError, KvmpError)
    assert issubclass(ConfigError, ValueError)


def test_what_is_made_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="timeout_ms: 0 given"):
        ConnectorConfig(timeout_ms=0)
    with pytest.raises(ConfigError, match=r"without kvmp\.spawn_size"):
        ConnectorConfig(on_unreachable="spawn")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConnectorConfig().timeout_ms = 5


_KEYS = st.one_of(st.sampled_from([*EVERY_KEY, "lmcache.mp.host", "lmcache.mp.port", "timeout_ms"]), st.text())
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.sampled_from(list(EVERY_KEY.values())))


@given(st.dictionaries(_KEYS, _VALUES), st.dictionaries(st.sampled_from(list(EVERY_VARIABLE)), st.text()))
def test_reading_changes_nothing_and_fails_in_one_way_only(extra_config, environ):
    before = copy.deepcopy((extra_config, environ))
    with contextlib.suppress(ConfigError):
        ConnectorConfig.read(extra_config, environ)
    assert (extra_config, environ) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64GiB", 64 << 30),
        ("500MB", 500_000_000),
        ("4096", 4096),
        (" 2 mib ", 2 << 20),
        ("1.5G", 3 << 29),
        (".5K", 512),
        ("1T", 1 << 40),
        ("7 B", 7),
    ],
)
def test_sizes_parse_as_the_server_parses_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "4 parsecs", "1..2G", "99999999999TiB", "nan", "1e3", ".", "1G\u0131B"]
)
def test_what_is_no_size_is_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_size(text)


@given(st.integers(0, 2**63))
def test_a_written_size_reads_back(size):
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize(
    ("name", "value", "meant"), [("on_unreachable", "degrad", "degrade"), ("verify", "Always", "always")]
)
def test_a_near_miss_of_a_choice_is_named(name, value, meant):
    for extra, environ in [({f"kvmp.{name}": value}, {}), ({}, {f"KVMP_{name.upper()}": value})]:
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            ConnectorConfig.read(extra, environ)


def test_only_a_regular_file_of_some_size_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n#")
    (tmp_path / "deep").write_text("a = " + "[" * 100_000)
    for name, text in [("pipe", "no regular file"), ("large", "of at most"), ("deep", "is no TOML")]:
        with pytest.raises(ConfigError, match=text):
            ConnectorConfig.read({}, {"KVMP_CONFIG_FILE": str(tmp_path / name)})
    with pytest.raises(ConfigError, match="no regular file"):
        ConnectorConfig.read({}, {"KVMP_CONFIG_FILE": "/dev/zero"})


def test_settings_nested_under_one_key_are_not_lost_in_silence():
    with pytest.raises(ConfigError, match="unknown name 'kvmp'"):
        ConnectorConfig.read({"kvmp": {"timeout_ms": 3}}, {})


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="kv_connector_extra_config"):
        ConnectorConfig.read([1], {})
