"""A tile of a matrix product held in registers, written in LLVM's own language (numba, CPU).

``c[i, j] (+)= sum_k a[i, k] b[k, j]`` for a few rows and up to four vectors of columns. In BF16
one instruction multiplies two neighbouring k and adds in fp32 (AVX512-BF16); in FP32 it is a
fused multiply-add. A compiler does not find this shape in Python loops, hence the builder.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

Array = Any

LANES = 16
"""fp32 numbers of one vector."""


class _BFloat(ir.Type):
    """LLVM's ``bfloat``, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(_I32, LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def has_bfloat16() -> bool:
    """Whether this processor multiplies pairs of BF16 numbers (AVX512-BF16)."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


def has_wide_registers() -> bool:
    """Whether a vector is one register, and there are 32 of them (AVX-512)."""
    return bool(binding.get_host_cpu_features().get("avx512f", False))


def make_tile(rows: int, vectors: int) -> Any:
    """The tile of ``rows`` x ``vectors * LANES`` as a function for compiled code.

    Its arguments: an array whose dtype tells the kind of numbers (uint16 for BF16, or fp32);
    then addresses and counts (intp): a; offsets of its rows (int64, in numbers); b packed,
    (steps, columns) words, each a pair of BF16 numbers or an fp32 number; the columns of a step
    of b; steps; out (fp32); offsets of its rows. Last an fp32 factor on what is in out, which is
    not read if that is 0.
    """

    @intrinsic
    def tile(
        typing_context: Any, kind: Any, a: Any, a_rows: Any, b: Any, b_columns: Any, steps: Any,
        out: Any, out_rows: Any, keep: Any,
    ) -> Any:  # fmt: skip
        del typing_context, a, a_rows, b, b_columns, steps, out, out_rows, keep

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Tile(builder, signature.args[0].dtype == types.uint16).emit(args[1:], rows, vectors)
            return context.get_dummy_value()

        return types.void(kind, *([types.intp] * 7), types.float32), emit

    return tile


class _Tile:
    """Writes one tile into the function that is being compiled."""

    def __init__(self, builder: Any, half: bool) -> None:
        self.builder, self.half = builder, half
        self.kind = _WORDS if half else _FLOATS

    def emit(self, args: Any, rows: int, vectors: int) -> None:
        a, a_rows, b, b_columns, steps, out, out_rows, keep = args
        builder = self.builder
        lines = [self._line(a, a_rows, r, 2 if self.half else 4) for r in range(rows)]
        ends = [self._line(out, out_rows, r, 4) for r in range(rows)]
        places = [(r, v) for r in range(rows) for v in range(vectors)]
        entry = builder.block
        loading, loop, done = (builder.append_basic_block(n) for n in ("load", "loop", "done"))
        nothing = ir.Constant(ir.FloatType(), 0.0)
        builder.cbranch(builder.fcmp_ordered("!=", keep, nothing), loading, loop)

        # All rows are read before any is written: a row may be given twice.
        builder.position_at_end(loading)
        factor = self._everywhere(keep, _FLOATS)
        old = {
            (r, v): builder.fmul(self._load(ends[r], _int(64 * v), _FLOATS), factor)
            for r, v in places
        }
        builder.branch(loop)

        builder.position_at_end(loop)
        step = builder.phi(_I64)
        sums = {place: builder.phi(_FLOATS) for place in places}
        for block in (entry, loading):
            step.add_incoming(_int(0), block)
            for place in places:
                zero = ir.Constant(_FLOATS, [0.0] * LANES)
                sums[place].add_incoming(zero if block is entry else old[place], block)
        begin = builder.mul(step, builder.mul(b_columns, _int(4)))
        right = [self._load(b, builder.add(begin, _int(64 * v)), self.kind) for v in range(vectors)]
        move = builder.mul(step, _int(4))
        left = [self._spread(line, move) for line in lines]
        new = {(r, v): self._multiply(sums[r, v], left[r], right[v]) for r, v in places}
        after = builder.add(step, _int(1))
        builder.cbranch(builder.icmp_signed("<", after, steps), loop, done)
        step.add_incoming(after, loop)
        for place in places:
            sums[place].add_incoming(new[place], loop)

        builder.position_at_end(done)
        for r, v in places:
            target = self._pointer(ends[r], _int(64 * v), _FLOATS)
            builder.store(new[r, v], target).align = 4

    def _pointer(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(base, offset), kind.as_pointer())

    def _line(self, base: Any, table: Any, row: int, size: int) -> Any:
        """Address of a row: base plus an entry of the table of offsets."""
        offset = self.builder.load(self._pointer(table, _int(8 * row), _I64))
        return self.builder.add(base, self.builder.mul(offset, _int(size)))

    def _load(self, base: Any, offset: Any, kind: Any) -> Any:
        value = self.builder.load(self._pointer(base, offset, kind))
        value.align = 4
        return value

    def _spread(self, line: Any, offset: Any) -> Any:
        """One word of a, in all lanes."""
        word = self.builder.load(self._pointer(line, offset, _I32 if self.half else ir.FloatType()))
        word.align = 2 if self.half else 4
        return self._everywhere(word, self.kind)

    def _everywhere(self, word: Any, kind: Any) -> Any:
        empty = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(empty, word, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(_WORDS, [0] * LANES))

    def _multiply(self, total: Any, left: Any, right: Any) -> Any:
        """Total + left * right, where a word of BF16 adds two products."""
        if not self.half:
            name, kinds, args = "llvm.fma.v16f32", [_FLOATS] * 3, [left, right, total]
        else:
            name, kinds = "llvm.x86.avx512bf16.dpbf16ps.512", [_FLOATS, _PAIRS, _PAIRS]
            args = [total, *(self.builder.bitcast(x, _PAIRS) for x in (left, right))]
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(_FLOATS, kinds), name)
        return self.builder.call(function, args)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


@intrinsic
def narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """An fp32 number as the kind of the array ``like``: itself, or BF16 bits, nearest even."""
    del typing_context

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context
        number, half = args[0], signature.return_type == types.uint16
        if not half:
            return number
        bits = builder.bitcast(number, _I32)
        shift = ir.Constant(_I32, 16)
        odd = builder.and_(builder.lshr(bits, shift), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, shift), ir.IntType(16))

    return like.dtype(types.float32, like), emit
