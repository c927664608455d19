"""What an object file defines and needs, read from its ELF symbol table (System V ABI, chapter 4): no tools, any machine."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping
from dataclasses import dataclass

MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}

_SYMTAB, _RELA, _REL = 2, 4, 9  # section types
_FUNCTION, _WEAK = 2, 2  # symbol type and binding


@dataclass(frozen=True)
class Object:
    """`functions` are defined here and global; `needs` maps an undefined symbol to the functions that refer to it.

    `slots` are weak variables, which TVM's kernels expect their runtime to fill, in the same form.
    """

    machine: str
    functions: frozenset[str]
    needs: Mapping[str, tuple[str, ...]]
    slots: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int
    info: int


@dataclass(frozen=True)
class _Symbol:
    name: str
    info: int
    section: int
    value: int

    @property
    def type(self) -> int:
        return self.info & 15

    @property
    def binding(self) -> int:
        return self.info >> 4


def machine_of(data: bytes) -> str:
    """The processor family an ELF file is for; raises ValueError for what is no ELF file."""
    if data[:4] != b"\x7fELF" or len(data) < 52:
        raise ValueError("not an ELF file")
    return MACHINES.get(struct.unpack_from(_order(data) + "H", data, 18)[0], "unknown")


def functions_of(data: bytes) -> tuple[int, frozenset[str]]:
    """ELF's number of the machine, and the global functions that are defined; raises ValueError for what is no ELF file."""
    machine_of(data)
    try:
        found = _symbols(data, _sections(data))
    except (struct.error, IndexError) as error:
        raise ValueError("damaged ELF file") from error
    names = frozenset(one.name for one in found if one.section and one.binding and one.type == _FUNCTION)
    return struct.unpack_from(_order(data) + "H", data, 18)[0], names


def read_object(data: bytes) -> Object:
    """Parse a relocatable object file; raises ValueError if it is none."""
    machine = machine_of(data)
    try:
        sections = _sections(data)
        symbols = _symbols(data, sections)
        users = _users(data, sections, symbols)
    except (struct.error, IndexError) as error:
        raise ValueError("damaged ELF file") from error
    named = [symbol for symbol in symbols if symbol.name and symbol.binding]
    functions = frozenset(s.name for s in named if s.section and s.type == _FUNCTION)
    needs = {s.name: users.get(s.name, ()) for s in named if not s.section}
    slots = {s.name: users.get(s.name, ()) for s in named if s.section and s.type != _FUNCTION and s.binding == _WEAK}
    return Object(machine, functions, needs, slots)


def _order(data: bytes) -> str:
    return "<" if data[5] == 1 else ">"


def _wide(data: bytes) -> bool:
    return data[4] == 2


def _sections(data: bytes) -> list[_Section]:
    order = _order(data)
    if _wide(data):
        (start,), (size, count) = struct.unpack_from(order + "Q", data, 40), struct.unpack_from(order + "HH", data, 58)
        form, pick = order + "IIQQQQIIQQ", (1, 4, 5, 6, 7)
    else:
        (start,), (size, count) = struct.unpack_from(order + "I", data, 32), struct.unpack_from(order + "HH", data, 46)
        form, pick = order + "IIIIIIIIII", (1, 4, 5, 6, 7)
    rows = [struct.unpack_from(form, data, start + index * size) for index in range(count)]
    return [_Section(*(row[field] for field in pick)) for row in rows]


def _symbols(data: bytes, sections: list[_Section]) -> list[_Symbol]:
    table = next((section for section in sections if section.kind == _SYMTAB), None)
    if table is None:
        return []
    strings = sections[table.link].offset
    form = _order(data) + ("IBBHQQ" if _wide(data) else "IIIBBH")
    found = []
    for row in struct.iter_unpack(form, data[table.offset : table.offset + table.size]):
        name, info, section, value = (row[0], row[1], row[3], row[4]) if _wide(data) else (row[0], row[3], row[5], row[1])
        end = data.index(b"\0", strings + name)
        found.append(_Symbol(data[strings + name : end].decode("latin-1"), info, section, value))
    return found


def _users(data: bytes, sections: list[_Section], symbols: list[_Symbol]) -> dict[str, tuple[str, ...]]:
    """Symbol -> the functions with a relocation against it. A function without a symbol counts as the one in front of it."""
    users: dict[str, dict[str, None]] = {}
    for section in sections:
        if section.kind not in (_RELA, _REL):
            continue
        inside = sorted((s.value, s.name) for s in symbols if s.type == _FUNCTION and s.section == section.info)
        for offset, index in _relocations(data, section):
            at = bisect.bisect_right(inside, (offset, "\U0010ffff")) - 1
            if at >= 0 and symbols[index].name:
                users.setdefault(symbols[index].name, {})[inside[at][1]] = None
    return {name: tuple(found) for name, found in users.items()}


def _relocations(data: bytes, section: _Section) -> list[tuple[int, int]]:
    """(offset in the section, index of the symbol)."""
    word = "Q" if _wide(data) else "I"
    form = _order(data) + word * (3 if section.kind == _RELA else 2)
    raw = data[section.offset : section.offset + section.size]
    return [(row[0], row[1] >> (32 if _wide(data) else 8)) for row in struct.iter_unpack(form, raw)]
