"""What compiled loops do with addresses."""

from llvmlite import ir
from numba.core.types import int64, void, voidptr
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_BYTE = ir.IntType(8).as_pointer()
_TO_WRITE = [ir.Constant(_I32, number) for number in (1, 3, 1)]
"""Written soon, kept in every cache, data."""


@intrinsic
def pointer(_context, _address):
    """An address as a pointer."""

    def build(context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(voidptr))

    return voidptr(int64), build


@intrinsic
def prefetch(_context, _address):
    """Have the cache line at an address fetched, and go on."""

    def build(context, builder, _signature, arguments):
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTE], ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        )
        builder.call(function, [builder.inttoptr(arguments[0], _BYTE), *_TO_WRITE])
        return context.get_dummy_value()

    return void(int64), build
