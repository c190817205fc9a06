"""What importing kvmp brings, and what it must not."""

import json
import subprocess
import sys

import pytest

import kvmp


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_brings_neither_torch_nor_vllm_nor_numpy() -> None:
    loaded = json.loads(_run("import kvmp, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert not {"numpy", "torch", "vllm"} & set(loaded)


def test_command_reaches_its_program_before_numpy() -> None:
    code = (
        "import sys, kvmp._kvmp as program, kvmp.__main__ as command\n"
        "program.main = lambda argv: print(argv, 'numpy' in sys.modules)\n"
        "sys.argv = ['kvmp', 'stats', '--json']\n"
        "command.main()"
    )
    assert _run(code) == "['kvmp', 'stats', '--json'] False\n"


@pytest.mark.parametrize("name", kvmp.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvmp, name) is not None


def test_launch_stays_a_function_whatever_was_imported_first() -> None:
    assert _run("import kvmp; kvmp.Server; print(callable(kvmp.launch))") == "True\n"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvmp.nonsense


def test_another_platform_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'darwin'\ntry: import kvmp\nexcept ImportError as error: print(error)"
    assert _run(code) == (
        "kvmp runs on Linux only, for it shares memory by tmpfs, memfd and OFD locks: this is darwin\n"
    )
