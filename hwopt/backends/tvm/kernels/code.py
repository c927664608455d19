"""Writing TIR statements from Python: a list of statements that grows, with loops, bindings and vector accesses.

Kernels are built as plain loops over flat buffers (no schedulable blocks): what is written is what LLVM gets. One PrimFunc
takes about 10 ms to build and 50 ms to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.tirx.op import masked_load

Value = Any  # a tirx expression or a Python number
OVERWRITES = "hwopt.overwrites"  # the argument that a kernel reads element by element right before it writes that element


def vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def span(index: Value, lanes: int) -> Value:
    """The index of `lanes` neighbours from `index` on."""
    return index if lanes == 1 else tirx.Ramp(index, 1, lanes)


def stored(dtype: str) -> str:
    """How kernels hold an element type in registers and workspace: bfloat16 as its bits (see kernels.bfloat16)."""
    return "uint16" if dtype == "bfloat16" else dtype


def load(buffer: Value, index: Value, lanes: int = 1) -> Value:
    value = tirx.BufferLoad(buffer, [span(index, lanes)])
    return tirx.reinterpret(vector("uint16", lanes), value) if buffer.dtype == "bfloat16" else value


def load_part(buffer: Value, index: Value, lanes: int, valid: int) -> Value:
    """A vector of which only the first `valid` lanes are read; the others are undefined."""
    if valid == lanes:
        return load(buffer, index, lanes)
    if buffer.dtype == "bfloat16":
        parts = [load(buffer, index + offset, count) for offset, count in pieces(valid, lanes)]
        parts.append(splat(0, lanes - valid, "uint16"))
        return tirx.Shuffle(parts, list(range(lanes)))
    mask = tirx.LT(tirx.Ramp(0, 1, lanes), tirx.Broadcast(valid, lanes))
    return masked_load(vector(buffer.dtype, lanes), buffer, span(index, lanes), mask)


def splat(value: Value, lanes: int, dtype: str = "float32") -> Value:
    """A scalar in every lane; Python numbers become constants of `dtype`."""
    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def cast(value: Value, dtype: str, lanes: int) -> Value:
    return tirx.Cast(vector(dtype, lanes), value)


def intrinsic(dtype: str, name: str, *arguments: Value) -> Value:
    """A call of a pure LLVM intrinsic."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def interleaved(rows: Sequence[Value], lanes: int) -> Value:
    """[depth][lanes] -> [lanes][depth]."""
    if len(rows) == 1:
        return rows[0]
    return tirx.Shuffle(list(rows), [row * lanes + lane for lane in range(lanes) for row in range(len(rows))])


def pieces(count: int, widest: int) -> Iterator[tuple[int, int]]:
    """Splits `count` elements into (offset, lanes), lanes powers of two up to `widest`."""
    offset, lanes = 0, widest
    while offset < count:
        while lanes > count - offset:
            lanes //= 2
        yield offset, lanes
        offset += lanes


class Code:
    """Statements under construction. Allocations and bindings are visible to everything that follows in the same Code."""

    def __init__(self) -> None:
        self.statements: list[Any] = []

    def store(self, buffer: Value, index: Value, value: Value, lanes: int = 1) -> None:
        value = tirx.reinterpret(vector("bfloat16", lanes), value) if buffer.dtype == "bfloat16" else value
        self.statements.append(tirx.BufferStore(buffer, value, [span(index, lanes)]))

    def bind(self, name: str, value: Value) -> Value:
        """Names a value so that it is computed once; returns the name. A Python number needs none."""
        if isinstance(value, int | float):
            return value
        variable = tirx.Var(name, value.ty)
        self.statements.append(tirx.Bind(variable, value))
        return variable

    def alloc(self, name: str, size: int, dtype: str) -> Value:
        """A buffer: workspace memory; up to 1 KiB stack, which becomes registers where every index is constant.

        (TVM puts only scope "global" on the stack: a small "local" buffer would be a call of TVMBackendAllocWorkspace.)
        """
        buffer = tirx.decl_buffer((size,), stored(dtype), name)
        self.statements.append(tirx.AllocBuffer(buffer))
        return buffer

    def loop(
        self, name: str, extent: Value, body: Callable[[Code, Value], None], start: Value = 0, parallel: bool = False
    ) -> None:
        """for name in range(start, start + extent): body. A constant extent of 1 makes no loop, of 0 nothing."""
        if isinstance(extent, int) and extent <= 1:
            if extent == 1:
                body(self, start)
            return
        variable, inner = tirx.Var(name, "int32"), Code()
        body(inner, variable)
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        self.statements.append(tirx.For(variable, start, extent, kind, inner.done()))

    def when(self, condition: Value, body: Callable[[Code], None], otherwise: Callable[[Code], None] | None = None) -> None:
        """if condition: body, else: otherwise. A condition that Python knows makes no branch."""
        if isinstance(condition, bool):
            chosen = body if condition else otherwise
            if chosen:
                chosen(self)
            return
        inner, other = Code(), Code()
        body(inner)
        if otherwise:
            otherwise(other)
        self.statements.append(tirx.IfThenElse(condition, inner.done(), other.done() if otherwise else None))

    def done(self) -> Any:
        """The statements as one."""
        if not self.statements:
            return tirx.Evaluate(0)
        return self.statements[0] if len(self.statements) == 1 else tirx.SeqStmt(self.statements)


def function(symbol: str, parameters: list[Value], body: Code, library: str = "", overwrites: int | None = None) -> tirx.PrimFunc:
    """The kernel: buffers in, nothing returned. `library` is LLVM code that it calls.

    No two buffers overlap, but the last one may be the one that `overwrites` names.
    """
    whole = body.done()
    if library:
        whole = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(library), whole)
    over = {} if overwrites is None else {OVERWRITES: overwrites}
    return tirx.PrimFunc(parameters, whole).with_attr({"global_symbol": symbol, "tirx.noalias": not over, **over})
