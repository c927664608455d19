"""The generated C: a header for the user, and a driver that is tables and one call into the runtime."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.check import C_TYPES, kernel_symbol
from hwopt.emit.memory import MemoryPlan, bytes_of, delivered, root_of, rounded
from hwopt.emit.program import Program
from hwopt.emit.weights import Weights
from hwopt.errors import UsageError

TYPES_HEADER = Path(__file__).with_name("hwopt_types.h")

_KEYWORDS = """
    alignas alignof and asm auto bool break case catch char class compl concept const constexpr continue decltype
    default delete do double else enum explicit export extern false final float for friend goto if inline int long
    mutable namespace new noexcept not nullptr operator or private protected public register requires restrict return
    short signed sizeof static struct switch template this throw true try typedef typeid typename typeof union
    unsigned using virtual void volatile wchar_t while xor linux unix errno
"""
_OWN = ("workspace", "in", "out", "model", "hwopt_run", "NULL")  # what a generated function uses itself
_RESERVED = frozenset([*_KEYWORDS.split(), *_OWN, *(spelled for spelled, _, _ in C_TYPES.values())])


@dataclass(frozen=True)
class Variant:
    """The model for one instruction set: what it needs of the processor, and the C function that asks for it (see cpu.py)."""

    layout: Layout
    features: tuple[str, ...]
    check: str
    suffix: str = ""  # of the names of its tables


@dataclass(frozen=True)
class Layout:
    """Everything that the tables and the header are printed from. Sizes in bytes."""

    program: Program
    memory: MemoryPlan
    weights: Weights
    symbols: frozenset[str]  # functions that the kernel objects define
    scratch_bytes: int = 0

    @property
    def slots(self) -> tuple[str, ...]:
        """The buffers that kernels see, in the order of their first use; a DLTensor each."""
        return tuple(dict.fromkeys(name for call in self.program.calls for name in call.args))

    @property
    def arguments_most(self) -> int:
        return max((len(call.args) for call in self.program.calls), default=0)

    @property
    def table_bytes(self) -> int:
        """Room for the run's own tables: DLTensor is at most 48 bytes, TVMFFIAny 16, a pointer 8."""
        pointers = len(self.program.inputs) + len(self.program.outputs)
        return rounded(48 * len(self.slots)) + rounded(16 * self.arguments_most) + rounded(8 * pointers)

    def place(self, name: str) -> tuple[str, int]:
        """Where a buffer lies: the kind of memory, and the offset or index there."""
        root = root_of(self.program, name)
        if root in self.memory.offsets:
            return "HWOPT_ARENA", self.memory.offsets[root]
        if root in self.weights.offsets:
            return "HWOPT_WEIGHTS", self.weights.offsets[root]
        sources = {root_of(self.program, buffer): index for index, (_, buffer) in reversed(list(enumerate(self.program.inputs)))}
        return ("HWOPT_INPUT", sources[root]) if root in sources else ("HWOPT_OUTPUT", delivered(self.program)[root])


def identifier(text: str) -> str:
    """A C and C++ identifier that resembles `text`: `input.1` -> `input_1`."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII).strip("_") or "x"
    name = re.sub(r"__+", "_", name)
    return f"x{name}" if name[0].isdigit() else f"{name}_" if name in _RESERVED else name


def check_name(name: str | None) -> None:
    """Raise UsageError for a stated name of a model that is a word of C or C++, or has no letter to begin with."""
    if name is not None and name in _KEYWORDS.split():
        raise UsageError(f"{name!r} is a word of C or C++", place="--name", hint=f"write --name {name}_model")
    if name is not None and not re.search(r"[A-Za-z0-9]", name):
        raise UsageError(f"{name!r} has no letter", place="--name", hint="use letters, digits and _")


def parameter_names(program: Program) -> tuple[str, ...]:
    """One distinct C name for every input, then every output."""
    taken: list[str] = []
    for name, _ in (*program.inputs, *program.outputs):
        base = identifier(name)
        suffix = "" if base not in taken else next(f"_{n}" for n in range(2, 10**6) if f"{base}_{n}" not in taken)
        taken.append(base + suffix)
    return tuple(taken)


def signature(program: Program) -> str:
    """`int m_run(const float *x, float *y, void *workspace)`"""
    names = parameter_names(program)
    count = len(program.inputs)
    kinds = [_c_type(program, buffer) for _, buffer in (*program.inputs, *program.outputs)]
    inputs = [f"const {kind} *{name}" for kind, name in zip(kinds[:count], names[:count], strict=True)]
    outputs = [f"{kind} *{name}" for kind, name in zip(kinds[count:], names[count:], strict=True)]
    return f"int {program.name}_run({', '.join([*inputs, *outputs, 'void *workspace'])})"


def arena_bytes(variants: Sequence[Variant]) -> int:
    """Peak activation memory, whichever of the variants runs."""
    return max(one.layout.memory.arena_bytes for one in variants)


def workspace_bytes(variants: Sequence[Variant]) -> int:
    """What the caller of any variant provides: activations, tables and scratch, which begin at the same places."""
    tables = max(one.layout.table_bytes for one in variants)
    return rounded(arena_bytes(variants)) + tables + max(rounded(one.layout.scratch_bytes) for one in variants)


def header(variants: Sequence[Variant], threads: int = 1) -> str:
    """The header a user includes: self-contained, C11 and C++, documents every buffer."""
    layout = variants[0].layout
    program, upper = layout.program, layout.program.name.upper()
    return f"""/* {program.name}: a model compiled by hwopt. This file is generated.
 *
{document(program)}{_choice(variants)}
 * {program.name}_run is re-entrant: threads may call it at the same time if each brings its own workspace, or NULL.
 * Tensors are dense, in C order. On 64-byte boundaries they are used in place, elsewhere through an aligned copy on the heap.
 */
#ifndef {upper}_H
#define {upper}_H
{TYPES_HEADER.read_text()}
#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_WORKSPACE_BYTES {workspace_bytes(variants)}u

/* Runs the model once. `workspace`: {upper}_WORKSPACE_BYTES on a 64-byte boundary, or NULL to use memory of the library's own.
 * Returns HWOPT_OK or an error code. */
{signature(program)};

/* Names, shapes and sizes; never NULL. */
const hwopt_info *{program.name}_info(void);

/* How many threads one run uses, 1 to 256; {threads} until this is called. */
int {program.name}_set_threads(int threads);

/* Frees the memory that runs with a NULL workspace, or unaligned tensors, left for the next one. */
void {program.name}_release(void);

/* What an error code means, in English. */
const char *{program.name}_error(int code);

#ifdef __cplusplus
}}
#endif
#endif
"""


def _choice(variants: Sequence[Variant]) -> str:
    if len(variants) == 1:
        return ""
    lines = "".join(f"\n *   {' '.join(one.features) or 'any processor of its family'}" for one in variants)
    return f"\n * It runs the first of these sets of kernels that the processor has:{lines}\n *"


def source(variants: Sequence[Variant], threads: int) -> str:
    """The driver: tables for every variant, and the entry that takes the first one which the processor can run."""
    name = variants[0].layout.program.name
    called = [kernel_symbol(call, one.layout.symbols) for one in variants for call in one.layout.program.calls]
    symbols = list(dict.fromkeys(called))
    parts = [
        "#define _GNU_SOURCE\n",
        f'#include "{name}.h"\n#include "hwopt_runtime.h"\n\n',
        f'__attribute__((visibility("hidden"))) extern const unsigned char {name}_weights[];\n',
        *(f"int {symbol}(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);\n" for symbol in symbols),
        *("\n" + one.check + "\n" + _tables(one.layout, one.suffix) for one in variants),
        _description(variants[0].layout.program, _dimensions(variants[0].layout)[1]),
        _entry(variants, threads),
    ]
    return "".join(parts)


def _c_type(program: Program, buffer: str) -> str:
    return C_TYPES[program.buffers[buffer].dtype][0]


def document(program: Program) -> str:
    """The tensors, for the header's comment."""
    names = parameter_names(program)
    lines = []
    for index, (name, key) in enumerate((*program.inputs, *program.outputs)):
        buffer = program.buffers[key]
        role = "input" if index < len(program.inputs) else "output"
        shown = f' ("{_comment(name)}")' if name != names[index] else ""
        note = f", {_comment(program.notes[name])}" if name in program.notes else ""
        lines.append(f" *   {role:6} {names[index]}{shown}: {buffer.dtype}[{', '.join(map(str, buffer.shape))}]{note}\n")
    return "".join(lines) + " *"


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("\n", " ")


def quoted(text: str) -> str:
    """A C string literal of UTF-8 bytes."""
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'


def _rows(kind: str, name: str, rows: Iterable[str]) -> str:
    """A table; C knows no empty arrays, so an empty one gets a row of zeros."""
    body = "".join(f"    {row},\n" for row in rows) or "    {0},\n"
    return f"static const {kind} {name}[] = {{\n{body}}};\n"


def _tables(layout: Layout, suffix: str) -> str:
    program = layout.program
    dims, where = _dimensions(layout)
    numbers = {name: index for index, name in enumerate(layout.slots)}
    slots: list[str] = []
    arguments: list[str] = []
    calls: list[str] = []
    for name in layout.slots:
        place, offset = layout.place(name)
        buffer = program.buffers[name]
        _, code, bits = C_TYPES[buffer.dtype]
        row = f"{{{offset}u, {where[buffer.shape]}u, {place}, {code}, {bits}, {len(buffer.shape)}}}"
        slots.append(f"{row} /* {_comment(name)} {buffer.dtype}[{','.join(map(str, buffer.shape))}] */")
    for call in program.calls:
        row = f"{{{kernel_symbol(call, layout.symbols)}, {len(arguments)}u, {len(call.args)}u}}"
        calls.append(f"{row} /* {_comment(call.label or call.symbol)} */")
        arguments += [str(numbers[name]) for name in call.args]
    lines = [", ".join(arguments[at : at + 24]) for at in range(0, len(arguments), 24)]
    return (
        _rows("int64_t", f"dims{suffix}", [", ".join(map(str, dims)) or "0"])
        + _rows("hwopt_slot", f"slots{suffix}", slots)
        + _rows("uint32_t", f"arguments{suffix}", lines or ["0"])
        + _rows("hwopt_call", f"calls{suffix}", calls)
        + _rows("hwopt_copy", f"copies{suffix}", _copies(layout))
    )


def _dimensions(layout: Layout) -> tuple[Sequence[int], Mapping[tuple[int, ...], int]]:
    """Every shape once, one after the other, and where each begins."""
    program = layout.program
    ends = (buffer for _, buffer in (*program.inputs, *program.outputs))
    return _shapes(program.buffers[name].shape for name in (*layout.slots, *ends))


def _shapes(shapes: Iterable[tuple[int, ...]]) -> tuple[Sequence[int], Mapping[tuple[int, ...], int]]:
    dims: list[int] = []
    where: dict[tuple[int, ...], int] = {}
    for shape in shapes:
        if shape not in where:
            where[shape] = len(dims)
            dims += shape
    return dims, where


def _copies(layout: Layout) -> list[str]:
    """Outputs that no kernel computes in place: inputs, constants, and values that are an output already."""
    rows = []
    for index, (name, buffer) in enumerate(layout.program.outputs):
        place, offset = layout.place(buffer)
        if (place, offset) != ("HWOPT_OUTPUT", index):
            size = bytes_of(layout.program.buffers[buffer])
            rows.append(f"{{{offset}u, {size}u, {index}u, {place}}} /* {_comment(name)} */")
    return rows


def tensor_tables(program: Program) -> str:
    """Tables that describe the inputs and outputs, with their shapes."""
    dims, where = _shapes(program.buffers[key].shape for _, key in (*program.inputs, *program.outputs))
    return _rows("int64_t", "dims", [", ".join(map(str, dims)) or "0"]) + _description(program, where)


def _description(program: Program, where: Mapping[tuple[int, ...], int]) -> str:
    texts = []
    for table, values in (("inputs", program.inputs), ("outputs", program.outputs)):
        rows = []
        for name, key in values:
            buffer = program.buffers[key]
            size = bytes_of(buffer)
            rows.append(f'{{{quoted(name)}, "{buffer.dtype}", dims + {where[buffer.shape]}, {len(buffer.shape)}, {size}u}}')
        texts.append(_rows("hwopt_tensor_info", table, rows))
    return "".join(texts)


def shared_features(variants: Sequence[Variant]) -> tuple[str, ...]:
    """What a processor must have, whichever of the variants it runs."""
    return tuple(sorted(frozenset.intersection(*(frozenset(one.features) for one in variants))))


def _entry(variants: Sequence[Variant], threads: int) -> str:
    program, name = variants[0].layout.program, variants[0].layout.program.name
    parameters = parameter_names(program)
    count = len(program.inputs)
    sets = ", ".join(quoted(" ".join(one.features)) for one in variants)
    return f"""static const char *const sets[] = {{{sets}}};
static const hwopt_info info = {{
    {quoted(name)}, {quoted(" ".join(shared_features(variants)))}, {count}u, {len(program.outputs)}u, inputs, outputs,
    {arena_bytes(variants)}u, {name.upper()}_WORKSPACE_BYTES, {variants[0].layout.weights.bytes}u, {len(variants)}u, sets}};
static atomic_int thread_count = {threads};
static atomic_int cpu[{len(variants)}];
static _Atomic(hwopt_pool *) idle;
static const hwopt_model models[] = {{
{",".join(_model(name, one, index) for index, one in enumerate(variants))}}};

{signature(program)} {{
  const void *in[] = {{{", ".join(parameters[:count]) or "NULL"}}};
  void *out[] = {{{", ".join(parameters[count:]) or "NULL"}}};
  return hwopt_run(hwopt_choose(models, {len(variants)}u), in, out, workspace);
}}

const hwopt_info *{name}_info(void) {{ return &info; }}
int {name}_set_threads(int threads) {{ return hwopt_set_threads(models, threads); }}
void {name}_release(void) {{ hwopt_release(models); }}
const char *{name}_error(int code) {{ return hwopt_error_text(code); }}

#if !defined(HWOPT_NO_HEAP)
__attribute__((destructor)) static void unload(void) {{ hwopt_release(models); }}
#endif
"""


def _model(name: str, variant: Variant, index: int) -> str:
    layout, tables = variant.layout, ("dims", "slots", "arguments", "calls", "copies")
    return f"""    {{&info, {name}_weights, {", ".join(table + variant.suffix for table in tables)}, {len(layout.slots)}u,
     {layout.arguments_most}u, {len(layout.program.calls)}u, {len(_copies(layout))}u, {rounded(layout.scratch_bytes)}u,
     supported{variant.suffix}, &thread_count, &cpu[{index}], &idle}}"""
