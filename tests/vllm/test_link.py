"""The scheduler's connection: what costs it the server, what does not, and what a user is told."""

import fakes
import pytest
from engine import PROMPT, stored, until

from kvmp.errors import NamespaceError, ProtocolError


def lora(folder, number=1):
    folder.mkdir()
    (folder / "weights").write_bytes(bytes([number]))
    return fakes.SimpleNamespace(lora_int_id=number, lora_name=f"a{number}", lora_path=str(folder), load_inplace=False)


def test_an_adapter_that_is_refused_costs_nobody_else_the_cache(make, server, tmp_path, caplog_vllm):
    engine = make()
    server.refuse_adapters = True
    req = fakes.request("r", PROMPT, lora_request=lora(tmp_path / "adapter"))
    assert engine.ask(req) == (0, False)
    until(lambda: server.refused_adapters, "the adapter's namespace refused")
    session = engine.side._link.session
    stored(engine)
    assert len(server.blocks) == 4
    assert engine.side._link.session == session
    # A new session attaches with the adapter still refused, and tries it once.
    engine.side._link.renew(frozenset({session.engine_token}))
    until(lambda: engine.attached() and engine.side._link.session != session, "attached anew")
    until(lambda: server.refused_adapters == 2, "tried again")
    stored(engine, "next", tokens=PROMPT[2:])
    assert len(server.blocks) == 8
    assert all("adapter a1" in warning for warning in caplog_vllm.warnings())
    # Room again: the next session serves it.
    server.refuse_adapters = False
    engine.side._link.renew(frozenset({engine.side._link.session.engine_token}))
    until(lambda: len(server.digests) == 2, "the adapter's namespace open")


@pytest.mark.parametrize("error", [ProtocolError("version 9"), NamespaceError("the table is full")])
def test_only_a_missing_server_is_called_one(make, monkeypatch, caplog_vllm, error):
    def refuse(self, spec, timeout_ms=1000):
        raise error

    monkeypatch.setattr(fakes.FakeClient, "open", refuse)
    engine = make(attach=False)
    until(lambda: caplog_vllm.warnings(), "the warning")
    (warning,) = caplog_vllm.warnings()
    assert str(error) in warning
    assert "no kvmp server" not in warning
    assert "this starts one" not in warning
    assert not engine.attached()
