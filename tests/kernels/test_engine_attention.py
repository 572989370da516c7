"""What the reference platform mends of the engine's Triton attention (``triton_attention``)."""

from tests.conftest import engine_child


def test_a_decoded_token_reads_its_window_if_it_is_counted_in() -> None:
    as_it_is, mended = (line.split() for line in engine_child("tests.kernels.decode_window"))
    # with the size that layers have, a decoded token is not what it is in a prompt
    assert float(as_it_is[1]) > 1e-3
    # one more gives it the whole window, and a prompt reads no more than it did
    assert float(mended[1]) < 1e-6
    assert float(mended[2]) < 1e-6
