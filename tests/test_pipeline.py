"""Passes as text, the manager, merging, refusals, plug-ins, and the directions of imports."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwopt import plugins
from hwopt.errors import PassError, UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Phase, merged, parse, parse_list, run_pass
from hwopt.plugins import find_passes, find_target
from tests.random_graphs import Builder

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Rename(Pass):
    """f(x) -> g(x) for the nodes of the site."""

    name: ClassVar[str] = "rename"
    phase: ClassVar[Phase] = Phase.FACTOR

    to: str = "Tanh"
    rank: int = 0
    share: float = 0.5
    bits: int | None = None
    deep: bool = False
    ranks: tuple[int, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        edit = graph.edit()
        for node in graph.nodes:
            if not self.covers(node):
                ctx.refuse(self, node, "not named by the site")
            elif node.op != self.to:
                edit.replace(node, op=self.to)
        return edit.finish(str(self))


@dataclass(frozen=True)
class Early(Rename):
    name: ClassVar[str] = "early"
    phase: ClassVar[Phase] = Phase.CLEAN


KNOWN = {"rename": Rename, "early": Early}


def graph() -> Graph:
    build = Builder()
    build.outputs = [build.same("Relu", build.same("Relu", build.input((2, 3))))]
    return build.graph()


@given(
    site=st.lists(st.text(min_size=1)).map(tuple),
    to=st.text(),
    rank=st.integers(),
    share=st.floats(allow_nan=False),
    bits=st.none() | st.integers(),
    deep=st.booleans(),
    ranks=st.lists(st.integers()).map(tuple),
)
def test_whatever_prints_parses(**fields: Any) -> None:
    one = Rename(**fields)
    if one.to == "":  # an empty text has no spelling of its own but quotes
        assert '""' in str(one)
    assert parse(str(one), KNOWN) == one


def test_text_form_shows_only_what_differs_from_the_defaults() -> None:
    assert str(Rename()) == "rename"
    assert str(Rename(site=("fc1", "fc 2"), rank=3, deep=True)) == 'rename{site=fc1+"fc 2",rank=3,deep=true}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("renam", "renam: unknown pass 'renam'; did you mean rename?"),
        ("rename{rank=2", "rename{rank=2: the closing } is missing"),
        ("rename{rang=2}", "rename{rang=2}: rename has no option 'rang'; did you mean rank?"),
        ("rename{rank=two}", "rename{rank=two}: 'two' is no int"),
        ("rename{rank=1+2}", "rename{rank=1+2}: takes one value, not 1+2"),
        ("rename{deep=maybe}", "rename{deep=maybe}: 'maybe' is no bool"),
        ("rename{rank}", "rename{rank}: cannot read 'rank'; write name{key=value,key=value}"),
    ],
)
def test_text_that_is_no_pass_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, KNOWN)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_list_of_passes_tells_plain_names_from_stated_ones() -> None:
    found = parse_list('rename, early{to=Sin,ranks=1+2},rename{site="a,b"}', KNOWN)
    assert found == [(Rename(), False), (Early(to="Sin", ranks=(1, 2)), True), (Rename(site=("a,b",)), True)]


def test_equal_passes_merge_into_one_with_all_sites_in_phase_order() -> None:
    given_passes = [Rename(site=("a",)), Early(site=("x",)), Rename(site=("b", "a")), Rename(site=("c",), rank=2)]
    assert merged(given_passes) == (Early(site=("x",)), Rename(site=("a", "b")), Rename(site=("c",), rank=2))


def test_manager_runs_in_order_records_steps_and_tells_observers() -> None:
    seen = []
    before = graph()
    manager = PassManager((Rename(), Rename(), Early(to="Sin")), (lambda one, old, new: seen.append((str(one), old is new)),))
    trace = manager.run(before, Context())
    assert [node.op for node in trace.graph.nodes] == ["Sin", "Sin"]
    assert [(step.by, step.changed, step.nodes_before) for step in trace.steps] == [
        ("rename", True, 2), ("rename", False, 2), ("early{to=Sin}", True, 2),
    ]  # fmt: skip
    assert seen == [("rename", False), ("rename", True), ("early{to=Sin}", False)]
    assert trace.graph.nodes[0].history == ("rename", "early{to=Sin}")
    assert [node.op for node in before.nodes] == ["Relu", "Relu"]


def test_manager_names_the_pass_that_leaves_an_invalid_graph() -> None:
    with pytest.raises(PassError, match=r"rename\{to=Gemm\}: left an invalid graph: node relu0 \(Gemm\): breaks its ONNX schema"):
        PassManager((Rename(to="Gemm"),)).run(graph(), Context())


def test_any_exception_of_a_plug_in_names_the_plug_in() -> None:
    class Broken(Pass):
        name = "broken"

        def run(self, graph: Graph, ctx: Context) -> Graph:
            return {}["missing"]

    with pytest.raises(PassError, match="broken: failed: KeyError: 'missing'") as caught:
        run_pass(Broken(), graph(), Context())
    assert isinstance(caught.value.__cause__, KeyError)


def test_refusals_are_collected_with_their_reasons() -> None:
    ctx = Context()
    run_pass(Rename(site=("relu0",)), graph(), ctx)
    assert [(refusal.by, refusal.site, refusal.reason) for refusal in ctx.refused] == [
        ("rename", "relu1", "not named by the site")
    ]


def test_site_that_the_graph_lacks_names_the_nearest() -> None:
    with pytest.raises(PassError, match=r"no node rel0 in graph; did you mean relu0"):
        Rename(site=("rel0",)).check_site(graph())


# Plug-ins


@dataclass(frozen=True)
class Entry:
    """An entry point that gives a module."""

    name: str
    module: Any

    def load(self) -> Any:
        return self.module


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """The entry points that discovery will see; its caches are emptied before and after."""
    found: list[Entry] = []
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    monkeypatch.setattr(plugins, "find_passes", find_passes.__wrapped__)
    return found


def test_lists_of_passes_split_at_commas_outside_of_braces_and_quotes() -> None:
    text = 'quantize,low-rank{site="a,b{}c",rank=3}, quantize{}'
    found = parse_list(text, find_passes())
    assert [(str(one), exactly) for one, exactly in found] == [
        ("quantize", False), ('low-rank{site="a,b{}c",rank=3}', True), ("quantize", True)
    ]  # fmt: skip


def test_a_plug_in_that_cannot_be_imported_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("theirs", "no_such_module", group)])
    with pytest.raises(UsageError, match="no_such_module cannot be imported: ModuleNotFoundError"):
        find_passes.__wrapped__()


def module_with(**values: Any) -> ModuleType:
    module = ModuleType("theirs")
    for name, value in values.items():
        if isinstance(value, type) and value is not Pass:  # Pass was only imported there
            value.__module__ = "theirs"
        setattr(module, name, value)
    return module


def test_anybodys_module_gives_its_passes_in_the_order_they_run(entries: list[Entry]) -> None:
    late = type("Late", (Rename,), {"name": "late", "order": 60})
    soon = type("Soon", (Rename,), {"name": "soon", "order": 10})
    clean = type("Cleaner", (Early,), {"name": "zz-clean"})
    entries.append(Entry("theirs", module_with(late=late, soon=soon, clean=clean, Imported=Pass)))
    assert list(plugins.find_passes()) == ["zz-clean", "soon", "late"]


def test_two_plug_ins_of_one_name_are_an_error(entries: list[Entry]) -> None:
    entries.append(Entry("a", module_with(one=type("One", (Rename,), {"name": "same"}))))
    entries.append(Entry("b", module_with(two=type("Two", (Rename,), {"name": "same"}))))
    with pytest.raises(UsageError, match="two plug-ins are called 'same'"):
        plugins.find_passes()


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'hots'; did you mean host\?"):
        find_target("hots")


# Layers

# Each imports only those before it. target stands before analysis: it needs nothing, and analysis counts work in its terms.
ORDER = ("errors", "ir", "target", "analysis", "pipeline", "plan", "artifact", "cli")
BESIDE = {"io": ("errors", "ir", "analysis", "io"), "backends": ("errors", "ir", "io", "analysis", "target", "backends", "emit")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside functions, by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "hwopt")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def layers(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("hwopt.")}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_compiler_never_imports_passes_or_targets() -> None:
    for path in sources("hwopt"):
        assert not {name.split(".")[0] for name in imports(path)} & {"passes", "targets", "tests", "benchmarks"}, path


@pytest.mark.parametrize(("folder", "other"), [("passes", "targets"), ("targets", "passes")])
def test_passes_and_targets_import_only_the_compiler_and_their_own_helpers(folder: str, other: str) -> None:
    for path in sources(folder):
        own = {name.split(".")[1] for name in imports(path) if name.startswith(f"{folder}.")}
        assert all(name.startswith("_") for name in own), f"{path} imports another plug-in"
        assert not {name.split(".")[0] for name in imports(path)} & {other, "tests", "benchmarks"}, path


@pytest.mark.parametrize("layer", [*ORDER, *BESIDE])
def test_imports_go_one_way(layer: str) -> None:
    above = set(ORDER[ORDER.index(layer) + 1 :]) if layer in ORDER else {*ORDER, *BESIDE} - set(BESIDE[layer])
    files = sources(f"hwopt/{layer}") or [ROOT / "hwopt" / f"{layer}.py"]
    for path in files:
        assert not layers(path) & above, f"{path} imports {layers(path) & above}"


def test_torch_and_tvm_are_imported_where_they_are_used() -> None:
    for path in [*sources("hwopt"), *sources("passes"), *sources("targets")]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"torch", "onnxscript"}
            assert not heavy or "torch" in path.stem or path.parent.name == "torch", f"{path} imports {heavy} at the top"
