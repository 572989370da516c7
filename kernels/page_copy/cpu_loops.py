"""The CPU kernel: page gather and scatter, compiled, without the interpreter's lock.

Cache lines of the target are written past the caches where they can be: they are not read
soon, and a store that does not fetch its line first saves a third of the memory traffic.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sglang_ext.core.compiled.build import compiled

VECTOR = 32
"""Bytes of one store that goes past the caches."""
_AHEAD = 4
"""Tokens between what is copied and what is fetched for later; measured beside 1, 2 and 8."""
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_I64, VECTOR // 8).as_pointer()
_BYTE = ir.IntType(8).as_pointer()


@intrinsic
def _copy(typing, target, source, size):
    """memcpy between addresses."""

    def build(context, builder, signature, arguments):
        target, source, size = arguments
        cgutils.raw_memcpy(
            builder, builder.inttoptr(target, _BYTE), builder.inttoptr(source, _BYTE), size, 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def _stream(typing, target, source, size, ahead):
    """The same past the caches; target and size are multiples of VECTOR. What lies ``ahead``
    bytes behind the source is fetched: no hardware guesses strides across pages."""

    def build(context, builder, signature, arguments):
        target, source, size, ahead = arguments
        past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTE], ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        )
        read_once_from_memory = [ir.Constant(_I32, number) for number in (0, 0, 1)]
        zero, step = ir.Constant(_I64, 0), ir.Constant(_I64, VECTOR)
        with cgutils.for_range_slice(builder, zero, size, step, _I64) as (offset, _):
            lanes = builder.load(builder.inttoptr(builder.add(source, offset), _LANES), align=1)
            store = builder.store(
                lanes, builder.inttoptr(builder.add(target, offset), _LANES), align=VECTOR
            )
            store.set_metadata("nontemporal", past_caches)
            later = builder.add(builder.add(source, offset), ahead)
            builder.call(prefetch, [builder.inttoptr(later, _BYTE), *read_once_from_memory])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def _fence(typing):
    """What went past the caches is there before anything that follows."""

    def build(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@compiled(types.void(*[types.int64] * 6, types.boolean), nogil=True)
def _move(target, source, size, end, ahead, jump, streams):
    """One chunk of a stretch that is read up to ``end``. Memory that comes ``ahead`` bytes later
    is fetched; past the end, that is the start of the next stretch, ``jump`` bytes away."""
    if streams:
        near = min(max(end - ahead - source, 0), size)
        _stream(target, source, near, ahead)
        _stream(target + near, source + near, size - near, ahead + jump)
    else:
        _copy(target, source, size)


_Numbers = types.Array(types.int64, 1, "C", readonly=True)
_PAGE = types.void(_Numbers, _Numbers, *[types.int64] * 4, types.boolean)


@compiled(_PAGE, nogil=True)
def _page_to_host(strides, layers, device, following, host, run, streams):
    """A run of pages by layer, as it lies on the device: each layer of it is one stretch.

    Args:
        strides, layers, streams: as in ``copy_pages``.
        device: offset of the run in a layer.
        following: the same of what is copied after it.
        host: address of its first layer to copy.
        run: number of pages; they lie together on both sides.
    """
    host_token, host_layer, host_head = strides[1], strides[2], strides[3]
    device_page, device_token, device_head = strides[4], strides[5], strides[6]
    tokens, heads, chunk = strides[7], strides[8], strides[9]
    ahead = min(_AHEAD * device_token, device_page)
    last = len(layers) - 1
    for layer in range(len(layers)):
        source = layers[layer] + device
        target = host + layer * host_layer
        end = source + run * device_page
        after = layers[layer + 1] + device if layer < last else layers[0] + following
        for token in range(tokens):
            for head in range(heads):
                _move(
                    target + token * host_token + head * host_head,
                    source + token * device_token + head * device_head,
                    run * chunk,
                    end,
                    ahead,
                    after - end,
                    streams,
                )


@compiled(_PAGE, nogil=True)
def _page_to_device(strides, layers, host, following, device, run, streams):
    """The same in the other direction, as it lies on the host: a page is one stretch there, or
    each of its layers is.

    Args:
        strides, layers, device, run, streams: as in ``_page_to_host``.
        host: address of the first layer to copy of the run.
        following: the same of what is copied after it.
    """
    host_page, host_token, host_layer, host_head = strides[0], strides[1], strides[2], strides[3]
    device_token, device_head = strides[5], strides[6]
    tokens, heads, chunk = strides[7], strides[8], strides[9]
    by_layer = tokens * heads == 1
    ahead = min(_AHEAD * host_token, chunk if by_layer else host_page)
    last = len(layers) - 1
    end, after = host + host_page, following
    for head in range(heads):
        for token in range(tokens):
            source = host + token * host_token + head * host_head
            target = device + token * device_token + head * device_head
            for layer in range(len(layers)):
                if by_layer:
                    end = source + run * chunk
                    after = source + host_layer if layer < last else following
                _move(layers[layer] + target, source, run * chunk, end, ahead, after - end, streams)
                source += host_layer


@compiled(
    types.void(_Numbers, types.int64, _Numbers, _Numbers, _Numbers, types.boolean, types.boolean),
    nogil=True,
)
def copy_pages(strides, host, layers, host_pages, device_pages, to_host, streams):
    """Copy ``device_pages[i]`` of every layer to or from ``host_pages[i]``.

    In the order in which lies what is read: on the device by layer, on the host as it comes.

    Args:
        strides: the numbers of ``Strides``, in its order.
        host: address of the first layer to copy in host page 0.
        layers: addresses of the same layers on the device.
        host_pages, device_pages: page numbers.
        to_host: direction.
        streams: addresses and strides are multiples of VECTOR.
    """
    host_page, device_page, merges = strides[0], strides[4], strides[10]
    first = 0
    while first < len(host_pages):
        run = 1
        if merges:
            while (
                first + run < len(host_pages)
                and host_pages[first + run] == host_pages[first] + run
                and device_pages[first + run] == device_pages[first] + run
            ):
                run += 1
        on_host = host + host_pages[first] * host_page
        on_device = device_pages[first] * device_page
        after = first + run if first + run < len(host_pages) else first
        if to_host:
            following = device_pages[after] * device_page
            _page_to_host(strides, layers, on_device, following, on_host, run, streams)
        else:
            following = host + host_pages[after] * host_page
            _page_to_device(strides, layers, on_host, following, on_device, run, streams)
        first += run
    if streams:
        _fence()
