"""Passes, how they are written as text, and the manager that runs, verifies and records them."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from hwopt.errors import HwoptError, PassError, UsageError, VerifyError, closest, did_you_mean
from hwopt.ir import Graph, Node, descended, descends, verify
from hwopt.samples import Samples, batch_of
from hwopt.target import Target

T = typing.TypeVar("T")


class Phase(enum.IntEnum):
    """When a pass runs: the order in which families compose."""

    CLEAN = 0
    PRUNE = 1
    FACTOR = 2
    SHARE = 3
    QUANTIZE = 4


@dataclass(frozen=True)
class Refusal:
    """Why a pass leaves a place alone: `low-rank fc3: weight is shared with fc4`."""

    by: str
    site: str
    reason: str


@dataclass(frozen=True)
class Context:
    """Everything a pass may look at besides the graph. `refused` collects what passes declined to do, for the report."""

    target: Target | None = None
    calibration: Samples | None = None
    seed: int = 0
    refused: list[Refusal] = field(default_factory=list)
    rough: bool = False  # graphs are only priced: numbers need not be right where neither shapes nor operators follow them

    def roughly(self, graph: Graph) -> Context:
        """The same for graphs that are only priced, with one batch of calibration data; what is refused stays apart."""
        few = self.calibration.head(batch_of(graph)) if self.calibration else None
        return dataclasses.replace(self, calibration=few, refused=[], rough=True)

    def refuse(self, by: Pass, site: Node | str, reason: str) -> None:
        self.refused.append(Refusal(by.name, site.name if isinstance(site, Node) else site, reason))


@dataclass(frozen=True)
class Pass:
    """One transformation. Subclass it as a frozen dataclass whose fields are its options; its text form is `name{site=fc1}`.

    `site` names the nodes (or, for pruning, the group) to change; empty means every place where it applies.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = False  # True if outputs stay equal to float rounding
    saves: ClassVar[frozenset[str]] = frozenset({"seconds", "bytes"})  # what a family can make less of
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})  # fields for --search, the usual value first
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})  # fields whose words are known, and the words
    each: ClassVar[tuple[str, ...]] = ()  # fields that may hold one value for every name in `site`
    order: ClassVar[int] = 50  # among the passes of one phase that run together: low numbers first, then by name
    prepares: ClassVar[Phase | None] = None  # the phase whose changes err less behind it: offered in front of them, never alone

    site: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The transformed graph; the same object if nothing changed."""
        raise NotImplementedError(f"{type(self).__name__} lacks run")

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        """The instances of itself worth considering on this graph and target, and the places where it declines."""
        return iter(())

    def turned(self, **knobs: Any) -> Pass:
        """This candidate with some of its `knobs` set; a pass may ignore those that mean nothing to it."""
        return dataclasses.replace(self, **knobs)

    def finer(self) -> Iterator[Pass]:
        """The same change with more care: no slower and no larger, but it takes long. A chosen plan is tried with them."""
        return iter(())

    @property
    def apart(self) -> bool:
        """True if it hands floats to all neighbours: whatever these do, its conversions stay."""
        return False

    @property
    def prepared(self) -> bool:
        """True if passes that prepare its phase may make it err less."""
        return True

    def covers(self, node: Node) -> bool:
        """True if the node is in `site`, was split off a node in `site`, or there is no `site`."""
        return not self.site or any(descends(node.name, name) for name in self.site)

    def check(self) -> None:
        """Raise PassError for options that mean nothing on any graph. Known without one, so before any long work."""
        for option, known in self.choices.items():
            found = getattr(self, option)
            for value in found if isinstance(found, tuple) else (found,):
                if value not in known:
                    raise PassError(f"no {option} {value!r}", place=str(self), hint=did_you_mean(value, known))

    def check_stated(self) -> None:
        """The same for a pass that a user wrote out with braces, which may have to say more than a candidate."""
        self.check()

    def check_site(self, graph: Graph) -> None:
        """Raise PassError for a site that the graph does not have."""
        for name in self.site:
            if name not in graph.node and not descended(graph, name):
                hint = closest(name, graph.node, "hwopt print shows the nodes")
                raise PassError(f"no node {name} in {graph.name}", place=str(self), hint=hint)

    def __str__(self) -> str:
        return printed(self.name, self)


_BARE = r'[^\s,+=(){}"]+'
_ITEM = rf'(?:"(?:[^"\\]|\\.)*"|{_BARE})'
_PLAIN, _ATOM = re.compile(_BARE), re.compile(_ITEM)
_OPTION = re.compile(rf"\s*([\w-]+)\s*=\s*({_ITEM}(?:\+{_ITEM})*)\s*(,|$)")


def printed(name: str, options: Any) -> str:
    """`name{key=value,...}` of a dataclass whose fields are options; usual values are left out."""
    shown = ((f.name, getattr(options, f.name)) for f in dataclasses.fields(options) if getattr(options, f.name) != f.default)
    text = ",".join(f"{key}={printed_value(value)}" for key, value in shown)
    return f"{name}{{{text}}}" if text else name


def printed_value(value: Any) -> str:
    """The text of one option, as `parse` reads it."""
    if isinstance(value, tuple):
        return "+".join(printed_value(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) else repr(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def parse(text: str, passes: Mapping[str, type[Pass]]) -> Pass:
    """The inverse of `str(pass)`: `low-rank{site=fc1,rank=16}`. Raises UsageError that names the unknown part."""
    return parse_as(text, passes, "pass")


def parse_as(text: str, passes: Mapping[str, type[T]], what: str) -> T:
    """The same for any dataclasses by name; `what` they are called in errors."""
    head, brace, rest = text.strip().partition("{")
    if head not in passes:
        raise UsageError(f"unknown {what} {head!r}", place=text, hint=did_you_mean(head, passes))
    if brace and not rest.endswith("}"):
        raise UsageError("the closing } is missing", place=text)
    kind = passes[head]
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for key, raw in _options(rest.removesuffix("}"), text):
        if key not in known:
            raise UsageError(f"{head} has no option {key!r}", place=text, hint=did_you_mean(key, known))
        options[key] = _value(raw, known[key], text)
    return kind(**options)


def parse_list(text: str, passes: Mapping[str, type[Pass]]) -> list[tuple[Pass, bool]]:
    """Passes separated by commas; True for those written with braces, which state exactly what to do."""
    parts, depth, quoted = [""], 0, False
    for index, letter in enumerate(text):
        quoted ^= letter == '"' and text[index - 1 : index] != "\\"
        depth += 0 if quoted else (letter == "{") - (letter == "}")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [(parse(part, passes), "{" in part) for part in map(str.strip, parts) if part]


def _options(body: str, whole: str) -> Iterator[tuple[str, list[str]]]:
    position = 0
    while position < len(body.rstrip()):
        match = _OPTION.match(body, position)
        if match is None:
            raise UsageError(f"cannot read {body[position:]!r}", place=whole, hint="write name{key=value,key=value}")
        yield match[1], [json.loads(atom) if atom.startswith('"') else atom for atom in _ATOM.findall(match[2])]
        position = match.end()


def _value(atoms: list[str], kind: Any, whole: str) -> Any:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return tuple(_value([atom], arguments[0], whole) for atom in atoms)
    if len(atoms) != 1:
        raise UsageError(f"takes one value, not {'+'.join(atoms)}", place=whole)
    bases = [one for one in arguments if one is not type(None)] or [kind]  # of several the first that can read it
    for base in bases:
        try:
            return {"true": True, "false": False}[atoms[0].lower()] if base is bool else base(atoms[0])
        except (KeyError, ValueError):
            continue
    names = " or ".join(getattr(base, "__name__", str(base)) for base in bases)
    raise UsageError(f"{atoms[0]!r} is no {names}", place=whole)


@dataclass(frozen=True)
class Step:
    """What one pass did: sizes and time, for `Trace`."""

    by: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool


@dataclass(frozen=True)
class Trace:
    """The result of a pipeline and how it came about."""

    graph: Graph
    steps: tuple[Step, ...]


Observer = Callable[[Pass, Graph, Graph], None]


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order; verifies whatever changed. Observers see (pass, before, after) after each one."""

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Trace:
        """Raises PassError, naming the pass, if one fails or leaves an invalid graph."""
        steps = []
        for one in self.passes:
            started = time.perf_counter()
            after = run_pass(one, graph, ctx)
            changed = after is not graph
            steps.append(Step(str(one), time.perf_counter() - started, len(graph.nodes), len(after.nodes), changed))
            for observe in self.observers:
                observe(one, graph, after)
            graph = after
        return Trace(graph, tuple(steps))


def run_pass(one: Pass, graph: Graph, ctx: Context) -> Graph:
    """Run one pass and verify what it changed."""
    try:
        after = one.run(graph, ctx)
        if after is not graph:
            verify(after)
    except VerifyError as error:
        raise PassError(f"left an invalid graph: {error}", place=str(one), hint="this is an error in the pass") from error
    except HwoptError:
        raise
    except Exception as error:  # whatever a plug-in raises must name the plug-in
        raise PassError(f"failed: {type(error).__name__}: {error}", place=str(one)) from error
    return after


def merged(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Passes in the order of phases, and inside these in their own, equal ones with different sites joined into one.

    Equal but for the fields that hold a value for each site: these are put one behind the other.
    """
    alike: dict[Pass, list[Pass]] = {}
    for one in passes:
        blank = dict.fromkeys(one.each, ()) if one.site else {}
        alike.setdefault(dataclasses.replace(one, site=(), **blank), []).append(one)
    joined = [_joined(members) for members in alike.values()]
    return tuple(sorted(joined, key=lambda one: (one.phase, one.order)))


def _joined(members: Sequence[Pass]) -> Pass:
    """One for all of them; of a site that is named twice the first counts."""
    first = members[0]
    values: dict[str, tuple[Any, ...]] = {}
    for one in members:
        for place, name in enumerate(one.site):
            values.setdefault(name, tuple(at_site(getattr(one, option), place) for option in one.each))
    columns = dict(zip(first.each, zip(*values.values(), strict=True), strict=True)) if values else {}
    return dataclasses.replace(first, site=tuple(values), **columns)


def at_site(values: tuple[T, ...], place: int) -> T | None:
    """The value for the site at this place: its own, or the one for all; None if there is none."""
    return values[place if len(values) > 1 else 0] if values else None
