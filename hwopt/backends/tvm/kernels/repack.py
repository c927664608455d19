"""Packing a matmul's computed right side inside the kernel, into the layout that constant weights get at compile time.

Lanes beyond n keep whatever the workspace holds: their accumulators are never stored. Elements beyond k are zero.
"""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.beside import begin, stride
from hwopt.backends.tvm.kernels.code import Code, Value, interleaved, load, pieces, splat, stored, vector
from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.target import MicroKernel

WORDS = {1: "float32", 2: "int16", 4: "int32", 8: "int64"}  # how `depth` elements move as one


class Repack:
    """[k, n] or, transposed, [n, k] at element `base` of `right` -> [vectors, words, lanes, depth] in `space`."""

    def __init__(self, spec: MatmulSpec, micro: MicroKernel, right: Value, base: Value, space: Value) -> None:
        self.spec, self.micro, self.right, self.base, self.space = spec, micro, right, base, space
        self.words = -(-spec.k // micro.depth)
        self.stride = stride(spec, "right", spec.k if spec.transposed else spec.n)  # elements between rows
        self.step = micro.lanes * micro.depth

    @staticmethod
    def begin(spec: MatmulSpec, image: Value) -> Value:
        """The element where an image's right side begins."""
        rows, size = (spec.n, spec.k) if spec.transposed else (spec.k, spec.n)
        return begin(spec, "right", image, rows, size)

    def emit(self, code: Code, first: Value, count: int) -> None:
        """Packs vectors [first, first + count), as far as they exist, to the start of the space."""
        whole, rest = divmod(self.spec.n, self.micro.lanes)
        everything = isinstance(first, int) and first == 0 and count * self.micro.lanes >= self.spec.n
        many = whole if everything else tirx.Max(0, tirx.Min(count, whole - first))
        code.loop("vector", many, lambda inner, v: self._vector(inner, v, v - first, self.micro.lanes), start=first)
        if rest:
            here = True if everything else tirx.And(tirx.LE(first, whole), tirx.GT(first + count, whole))
            code.when(here, lambda inner: self._vector(inner, whole, whole - first, rest))

    def _vector(self, code: Code, v: Value, place: Value, valid: int) -> None:
        target = place * (self.words * self.step)
        pack = self._transposed if self.spec.transposed else self._plain
        pack(code, v * self.micro.lanes, target, valid)

    def _plain(self, code: Code, column: Value, target: Value, valid: int) -> None:
        """`depth` rows at a time, interleaved."""
        depth, k = self.micro.depth, self.spec.k

        def word(inner: Code, index: Value, rows: int = depth) -> None:
            for offset, lanes in pieces(valid, self.micro.lanes):
                start = self.base + index * depth * self.stride + column + offset
                parts = [load(self.right, start + row * self.stride, lanes) for row in range(rows)]
                value = interleaved([*parts, *[splat(0, lanes, stored(self.spec.weight_dtype))] * (depth - rows)], lanes)
                inner.store(self.space, target + index * self.step + offset * depth, value, lanes * depth)

        code.loop("word", k // depth, word)
        if k % depth:
            word(code, k // depth, k % depth)

    def _transposed(self, code: Code, row: Value, target: Value, valid: int) -> None:
        """Squares of lanes x lanes words in registers, then the remaining words one by one."""
        lanes, depth = self.micro.lanes, self.micro.depth
        squares = self.spec.k // (lanes * depth)
        code.loop("square", squares, lambda inner, index: self._square(inner, row, target, index * lanes, valid))

        def single(inner: Code, lane: Value) -> None:
            def element(last: Code, index: Value) -> None:
                source = self.base + (row + lane) * self.stride + index
                at = target + tirx.floordiv(index, depth) * self.step + lane * depth + tirx.floormod(index, depth)
                last.store(self.space, at, load(self.right, source))

            start = squares * lanes * depth
            inner.loop("element", self.spec.k - start, element, start=start)
            for missing in range(self.spec.k, self.words * depth):
                at = target + (missing // depth) * self.step + lane * depth + missing % depth
                inner.store(self.space, at, tirx.const(0, stored(self.spec.weight_dtype)))

        code.loop("lane", valid, single)

    def _square(self, code: Code, row: Value, target: Value, word: Value, valid: int) -> None:
        lanes, depth = self.micro.lanes, self.micro.depth
        kind = vector("int32" if self.spec.weight_dtype == "bfloat16" else WORDS[depth], lanes)
        rows = []
        for lane in range(lanes):
            start = self.base + (row + min(lane, valid - 1)) * self.stride + word * depth
            value = load(self.right, start, lanes * depth)
            rows.append(code.bind("row", value if depth == 1 else tirx.reinterpret(kind, value)))
        for index, value in enumerate(_transpose(code, rows)):
            if depth > 1:
                value = tirx.reinterpret(vector(stored(self.spec.weight_dtype), lanes * depth), value)
            code.store(self.space, target + (word + index) * self.step, value, lanes * depth)


def _transpose(code: Code, rows: list[Value]) -> list[Value]:
    """A square of n vectors of n lanes, in log2(n) rounds of exchanges between vectors `distance` apart."""
    size, distance = len(rows), 1
    while distance < size:
        for index in range(size):
            if index & distance:
                continue
            pair = [rows[index], rows[index + distance]]
            low = [lane if not lane & distance else size + lane - distance for lane in range(size)]
            high = [lane + distance if not lane & distance else size + lane for lane in range(size)]
            rows[index] = code.bind("row", tirx.Shuffle(pair, low))
            rows[index + distance] = code.bind("row", tirx.Shuffle(pair, high))
        distance *= 2
    return rows
