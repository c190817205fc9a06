"""Whether a connector's own method takes every call that a base signature allows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

Call = tuple[list[str], dict[str, str]]
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def refused(parameters: list[str], ours: inspect.Signature) -> str | None:
    """A call that the base's parameters allow and ours do not take, or put elsewhere; None when there is none.

    Args:
        parameters: as `facts` writes them, without `self`.
        ours: of a bound method or class.
    """
    for positional, by_name in _calls(parameters):
        text = ", ".join([*positional, *(f"{name}={value}" for name, value in by_name.items())])
        try:
            bound = ours.bind(*positional, **by_name)
        except TypeError as error:
            return f"({text}): {error}"
        misplaced = {name: value for name, value in _named(ours, bound) if name != value}
        if misplaced:
            return f"({text}): puts {misplaced}"
    return None


def _named(ours: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        kind = ours.parameters[name].kind
        if kind not in _ANY_NUMBER:
            yield name, value


def _calls(parameters: list[str]) -> Iterator[Call]:
    """Calls in which each argument is its own name: as few as may be and all, each by position as far as may be."""
    for every in (False, True):
        signature = _signature(parameters)
        chosen = [p for p in signature if every or (p.default is p.empty and p.kind not in _ANY_NUMBER)]
        ordered = [p.name for p in chosen if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        only_by_position = sum(p.kind is p.POSITIONAL_ONLY for p in chosen)
        by_name = {p.name: p.name for p in chosen if p.kind is p.KEYWORD_ONLY}
        if any(p.kind is p.VAR_KEYWORD for p in chosen):
            by_name["some_keyword"] = "some_keyword"
        more = ["one_more"] if any(p.kind is p.VAR_POSITIONAL for p in chosen) else []
        for split in range(only_by_position, len(ordered) + 1):
            at_the_end = more if split == len(ordered) else []
            yield ordered[:split] + at_the_end, {name: name for name in ordered[split:]} | by_name


def _signature(parameters: list[str]) -> list[inspect.Parameter]:
    kinds = inspect.Parameter
    positions = parameters.index("/") if "/" in parameters else 0
    made, kind = [], kinds.POSITIONAL_OR_KEYWORD
    for at, text in enumerate(parameters):
        name = text.strip("*=")
        if text.startswith("**"):
            made.append(kinds(name, kinds.VAR_KEYWORD))
        elif text.startswith("*"):
            made += [kinds(name, kinds.VAR_POSITIONAL)] if name else []
            kind = kinds.KEYWORD_ONLY
        elif text != "/":
            here = kinds.POSITIONAL_ONLY if at < positions else kind
            made.append(kinds(name, here, default=None if text.endswith("=") else kinds.empty))
    return made
