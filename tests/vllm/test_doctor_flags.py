"""What `kvmp doctor --model` makes of flags of vLLM's."""

import pytest

from kvmp.doctor import match

# vLLM imports parts of itself while it makes a config; what torch warns of then is its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


def test_flags_of_the_api_server_are_told_apart():
    ignored = []
    with pytest.raises(Exception, match="/no/such/model") as error:
        match.engine(["--model", "/no/such/model", "--port", "8000", "--dtype", "float32"], ignored)
    assert ignored == ["--port", "8000"]
    assert "unrecognized" not in str(error.value)


def test_a_value_that_vllm_refuses_is_said_in_its_words():
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        match.engine(["--model", "m", "--tensor-parallel-size", "two"], [])
