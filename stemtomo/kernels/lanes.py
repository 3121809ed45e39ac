"""Sixteen single-precision numbers side by side, as a type that numba-compiled loops can add, subtract and multiply.

A loop that is written with them becomes vector instructions on every processor (one AVX-512, two AVX, four SSE or NEON
registers), where the automatic vectoriser gives up because it cannot know that arrays do not overlap.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import typing
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

WIDTH = 16

_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INDEX = ir.IntType(32)
_FREE = ("contract", "nsz", "reassoc")


class LanesType(types.Type):
    """Type of :data:`WIDTH` float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


LANES = LanesType()


@register_model(LanesType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _read(builder: Any, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


def _write(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer).align = 4


def _shuffled(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INDEX, WIDTH), order))


@intrinsic
def load(_: Any, array: Any, index: Any) -> Any:
    """Return the lanes that begin at ``array[index]``; the array is flat float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _read(builder, _pointer(context, builder, signature.args[0], args[0], args[1]))

    return LANES(array, types.intp), code


@intrinsic
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the lanes ``value`` from ``array[index]`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _write(builder, args[2], _pointer(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES), code


@intrinsic
def load_complex(_: Any, array: Any, index: Any) -> Any:
    """Return the real and imaginary lanes of the complex numbers, stored as pairs, that begin at ``array[index]``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _pointer(context, builder, signature.args[0], args[0], args[1])
        low, high = _read(builder, first), _read(builder, builder.gep(first, [_INDEX(1)]))
        parts = [_shuffled(builder, low, high, list(range(start, 2 * WIDTH, 2))) for start in (0, 1)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(LANES, 2)(array, types.intp), code


@intrinsic
def store_complex(_: Any, array: Any, index: Any, real: Any, imaginary: Any) -> Any:
    """Write complex numbers as pairs from ``array[index]`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _pointer(context, builder, signature.args[0], args[0], args[1])
        for half in (0, 1):
            order = [i // 2 + WIDTH // 2 * half + WIDTH * (i % 2) for i in range(WIDTH)]
            _write(builder, _shuffled(builder, args[2], args[3], order), builder.gep(first, [_INDEX(half)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES, LANES), code


@intrinsic
def add_complex(_: Any, array: Any, index: Any, real: Any, imaginary: Any, skipped: Any) -> Any:
    """Add to complex numbers, stored as pairs from ``array[index]`` on; the first ``skipped`` stay as they are."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _pointer(context, builder, signature.args[0], args[0], args[1])
        zero = ir.Constant(_VECTOR, None)
        limit = builder.trunc(args[4], _INDEX)
        undefined = ir.Constant(ir.VectorType(_INDEX, WIDTH), ir.Undefined)
        first_kept = builder.insert_element(undefined, limit, _INDEX(0))
        mask = ir.Constant(ir.VectorType(_INDEX, WIDTH), [0] * WIDTH)
        limits = builder.shuffle_vector(first_kept, undefined, mask)
        for half in (0, 1):
            order = [i // 2 + WIDTH // 2 * half + WIDTH * (i % 2) for i in range(WIDTH)]
            numbers = ir.Constant(ir.VectorType(_INDEX, WIDTH), [i // 2 + WIDTH // 2 * half for i in range(WIDTH)])
            change = _shuffled(builder, args[2], args[3], order)
            change = builder.select(builder.icmp_signed(">=", numbers, limits), change, zero)
            pointer = builder.gep(first, [_INDEX(half)])
            _write(builder, builder.fadd(_read(builder, pointer), change, flags=_FREE), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES, LANES, types.intp), code


@intrinsic
def transpose(_: Any, source: Any, start: Any, row: Any, target: Any, target_start: Any, target_row: Any) -> Any:
    """Write the transpose of a square of :data:`WIDTH` x :data:`WIDTH` numbers.

    Row r of the square begins at ``source[start + r * row]``, and of its transpose at
    ``target[target_start + r * target_row]``.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def at(kind: Any, array: Any, first: Any, step: Any, index: int) -> Any:
            offset = builder.add(first, builder.mul(step, ir.Constant(step.type, index)))
            return _pointer(context, builder, kind, array, offset)

        rows = [_read(builder, at(signature.args[0], args[0], args[1], args[2], r)) for r in range(WIDTH)]
        block = WIDTH // 2
        while block:
            # Exchange the off-diagonal blocks of this size, within all diagonal blocks of twice the size.
            upper = [i if not i & block else WIDTH + i - block for i in range(WIDTH)]
            lower = [i + block if not i & block else WIDTH + i for i in range(WIDTH)]
            for r in (r for r in range(WIDTH) if not r & block):
                first, second = rows[r], rows[r + block]
                rows[r] = _shuffled(builder, first, second, upper)
                rows[r + block] = _shuffled(builder, first, second, lower)
            block //= 2
        for r, value in enumerate(rows):
            _write(builder, value, at(signature.args[3], args[3], args[4], args[5], r))
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, target, index, index), code


@intrinsic
def spread(_: Any, number: Any) -> Any:
    """Return lanes that all hold the float32 ``number``."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        return _shuffled(builder, builder.insert_element(undefined, args[0], _INDEX(0)), undefined, [0] * WIDTH)

    return LANES(types.float32), code


def _register(operation: Any, instruction: str) -> None:
    @type_callable(operation)
    def _type(_context: typing.Context) -> Any:
        def typed(left: Any, right: Any) -> Any:
            return LANES if isinstance(left, LanesType) and isinstance(right, LanesType) else None

        return typed

    @lower_builtin(operation, LanesType, LanesType)
    def _lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], args[1], flags=_FREE)


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _register(_operation, _instruction)
