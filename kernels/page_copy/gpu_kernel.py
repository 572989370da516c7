"""The GPU kernel: pages of all components and layers in one launch, either direction.

It moves words and knows no data type. A few programs share all the work, so that most of the GPU
stays with the forward pass: the link to the host is what limits a copy, not the programs.
"""

import triton
import triton.language as tl

SEGMENT_FIELDS = 11
"""Numbers of one plane: its component, its layers, where the addresses of its layers on the device
begin in the table, its host address, strides of the host (page, token, layer, head), strides of the
device (page, token, head). All strides in bytes."""
CHUNK_FIELDS = 3
"""Numbers of one plane behind those: tokens, heads, words of a chunk."""
FIELDS = SEGMENT_FIELDS + CHUNK_FIELDS


@triton.jit(do_not_specialize=["component", "first_layer", "num_layers"])
def copy_pages(
    table,
    job,
    component,
    first_layer,
    num_layers,
    SEGMENTS: tl.constexpr,
    FIELDS: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TO_HOST: tl.constexpr,
):
    """Copy the pages of a job.

    Args:
        table: int64, FIELDS numbers for each of SEGMENTS planes, then the addresses of layers.
        job: int64; for each component where its pairs begin and how many there are, then
            the host pages and the device pages of each component.
        component: only this one, with ``num_layers`` layers from ``first_layer`` on;
            -1 means all of them, with all layers.
        WORD, WORD_BYTES: what one lane copies; divides every stride and address.
        ROWS, COLUMNS: chunks, and words of each, that a program copies at a time.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    for segment in range(SEGMENTS):
        numbers = table + segment * FIELDS
        of_component = tl.load(numbers)
        wanted = tl.where(of_component == component, num_layers, 0)
        layers = tl.where(component < 0, tl.load(numbers + 1), wanted)
        start_layer = tl.where(component < 0, 0, first_layer)
        addresses = table + tl.load(numbers + 2)
        host = tl.load(numbers + 3)
        host_page = tl.load(numbers + 4)
        host_token = tl.load(numbers + 5)
        host_layer = tl.load(numbers + 6)
        host_head = tl.load(numbers + 7)
        device_page = tl.load(numbers + 8)
        device_token = tl.load(numbers + 9)
        device_head = tl.load(numbers + 10)
        tokens = tl.load(numbers + 11)
        heads = tl.load(numbers + 12)
        words = tl.load(numbers + 13)
        pairs = tl.load(job + of_component * 2)
        count = tl.load(job + of_component * 2 + 1)
        # rows in the order of host memory: neighbours there, which the link and the host's caches
        # want together, are copied together
        rows = layers * heads * tokens
        layers_inside = host_layer < host_token
        tiles = tl.cdiv(rows, ROWS)
        for item in range(program, count * tiles, programs):
            pair = item // tiles
            page_on_host = host + tl.load(job + pairs + pair) * host_page
            page_on_device = tl.load(job + pairs + count + pair) * device_page
            row = item % tiles * ROWS + tl.arange(0, ROWS)
            if layers_inside:
                layer = start_layer + row % layers
                row_of_layer = row // layers
            else:
                layer = start_layer + row // (heads * tokens)
                row_of_layer = row % (heads * tokens)
            head = row_of_layer // tokens
            token = row_of_layer % tokens
            row_on_host = page_on_host + layer * host_layer + head * host_head + token * host_token
            layer_on_device = tl.load(addresses + layer, mask=row < rows, other=0)
            row_on_device = (
                layer_on_device + page_on_device + head * device_head + token * device_token
            )
            for first_word in range(0, words, COLUMNS):
                word = first_word + tl.arange(0, COLUMNS)
                inside = (row < rows)[:, None] & (word < words)[None, :]
                # a pointer and a range: so the compiler sees that words lie together, and has
                # neighbouring lanes copy them
                host_words = row_on_host.to(tl.pointer_type(WORD))[:, None] + word[None, :]
                device_words = row_on_device.to(tl.pointer_type(WORD))[:, None] + word[None, :]
                if TO_HOST:
                    tl.store(host_words, tl.load(device_words, mask=inside), mask=inside)
                else:
                    tl.store(device_words, tl.load(host_words, mask=inside), mask=inside)
