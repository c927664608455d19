"""Where the values of a program lie: the memory plan and the packed weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hwopt.emit import Buffer, Call, Program, plan_memory
from hwopt.emit.check import check_program
from hwopt.emit.memory import least_bytes, lifetimes, root_of
from hwopt.emit.weights import pack_weights
from tests._emit import Model, ramp
from tests._kernels import constant, program


@st.composite
def random_programs(draw) -> Program:
    """Calls that read earlier values, of random sizes; some values are views of others, some are outputs."""
    count = draw(st.integers(1, 12))
    buffers = {"x": Buffer("x", "float32", (16,), "input")}
    values, calls = ["x"], []
    for index in range(count):
        name, size = f"v{index}", draw(st.integers(0, 70))
        buffers[name] = Buffer(name, "float32", (size,), "temporary")
        reads = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        calls.append(Call("k", (*reads, name)))
        values.append(name)
        if draw(st.booleans()):
            buffers[f"a{index}"] = Buffer(f"a{index}", "float32", (1, size), "temporary", alias=draw(st.sampled_from([name])))
            values.append(f"a{index}")
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
    return Program("m", buffers, tuple(calls), (("x", "x"),), tuple((f"out_{name}", name) for name in outputs), ())


@settings(max_examples=200, deadline=None)
@given(random_programs())
def test_no_two_buffers_that_live_at_the_same_time_share_bytes(made: Program):
    check_program(made)
    plan = plan_memory(made)
    spans = [(s, plan.offsets[s.name]) for s in lifetimes(made)]
    for span, offset in spans:
        assert offset % 64 == 0 and offset + span.bytes <= plan.arena_bytes
        for other, place in spans:
            together = span.start <= other.end and other.start <= span.end
            apart = offset + span.bytes <= place or place + other.bytes <= offset
            assert span is other or not together or apart
    assert plan.arena_bytes >= least_bytes(made)


@settings(max_examples=100, deadline=None)
@given(random_programs())
def test_every_value_keeps_its_bytes_from_its_first_to_its_last_use(made: Program):
    places = {span.name: span for span in lifetimes(made)}
    for index, call in enumerate(made.calls):
        for name in call.args:
            span = places.get(root_of(made, name))
            assert span is None or span.start <= index <= span.end


def test_a_chain_needs_room_for_two_values_only():
    made = program(("double", "x", "a"), ("double", "a", "b"), ("double", "b", "c"), ("double", "c", "d"), ("double", "d", "y"))
    assert plan_memory(made).arena_bytes == 2 * 192  # 160 bytes each, on 64-byte boundaries


def test_large_buffers_go_first_so_that_small_ones_fill_the_gaps():
    sizes = {"a": 64, "b": 1024, "c": 64, "d": 1024}
    buffers = {name: Buffer(name, "uint8", (size,), "temporary") for name, size in sizes.items()}
    calls = (Call("k", ("x", "a")), Call("k", ("a", "b")), Call("k", ("b", "c")), Call("k", ("c", "d")), Call("k", ("d", "y")))
    ends = {"x": Buffer("x", "uint8", (8,), "input"), "y": Buffer("y", "uint8", (8,), "output")}
    made = Program("m", {**buffers, **ends}, calls, (("x", "x"),), (("y", "y"),), ())
    assert plan_memory(made).arena_bytes == least_bytes(made) == 1024 + 64


def test_chance_finds_what_plain_greed_misses():
    sizes = [100352, 50176, 50176, 50176, 50176, 50176, 12544, 25088, 75264, 75264, 25088, 75264, 75264, 25088, 25088, 512]
    spans = [(0, 1), (1, 3), (2, 3), (3, 5), (4, 5), (5, 6), (6, 7), (7, 10), (8, 9), (9, 10), (10, 13), (11, 12), (12, 13)]
    spans += [(13, 14), (14, 15), (15, 16)]  # the demo model's values: from the call that writes one to the last that reads it
    buffers = {f"t{i}": Buffer(f"t{i}", "uint8", (size,), "temporary") for i, size in enumerate(sizes)}
    ends = {"x": Buffer("x", "uint8", (8,), "input"), "y": Buffer("y", "uint8", (8,), "output")}
    used = [[f"t{i}" for i, span in enumerate(spans) if call in span] for call in range(17)]
    calls = tuple(Call("k", ("x", *names, "y")) for names in used)
    made = Program("m", {**buffers, **ends}, calls, (("x", "x"),), (("y", "y"),), ())
    assert plan_memory(made).arena_bytes == least_bytes(made) == 175616
    assert plan_memory(made).offsets == plan_memory(made).offsets


def test_a_view_lies_where_its_buffer_lies_and_keeps_it_alive(tmp_path):
    view = Buffer("v", "float32", (4, 10), "temporary", alias="a")
    made = program(("double", "x", "a"), ("double", "x", "b"), ("add", "v", "b", "y"), buffers={"v": view})
    assert set(plan_memory(made).offsets) == {"a", "b"}
    (y,) = Model(made, tmp_path / "m").outputs(ramp())
    np.testing.assert_array_equal(y, ramp() * 4)


def test_a_call_may_write_over_its_argument_where_the_program_says_so(tmp_path):
    over = Buffer("b", "float32", (40,), "temporary", alias="a")
    made = program(("double", "x", "a"), ("double", "a", "b"), ("double", "b", "y"), buffers={"b": over})
    assert plan_memory(made).arena_bytes == 192
    np.testing.assert_array_equal(Model(made, tmp_path / "m").outputs(ramp())[0], ramp() * 8)


def test_equal_constants_are_stored_once_on_64_byte_boundaries():
    a, b = np.arange(5, dtype=np.float32), np.arange(7, dtype=np.int8)
    buffers = {n: constant(n, v) for n, v in {"a": a, "b": b, "c": a.copy(), "d": b + 1}.items()}
    packed = pack_weights(Program("m", buffers, (), (), (), ()))
    assert packed.offsets == {"a": 0, "b": 64, "c": 0, "d": 128}
    assert packed.bytes == 20 + 7 + 7
    assert packed.blob[64:71] == b.tobytes()


def test_constants_reach_the_kernels(tmp_path):
    weights = {"w": constant("w", ramp(40, 5)), "v": constant("v", ramp(40, 100))}
    made = program(("add", "x", "w", "t"), ("add", "t", "v", "y"), buffers=weights)
    np.testing.assert_array_equal(Model(made, tmp_path / "m").outputs(ramp())[0], ramp() * 3 + 105)
