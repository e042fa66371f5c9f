"""New tokens behind the window: the CUDA kernel on the emulator against the CPU core, byte for byte."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from core_cases import DTYPES, examples, fill, narrowed, strided
from hypothesis import given
from hypothesis import strategies as st

from mixkvq import arrays

pytestmark = emulator.NEEDED


def window(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return strided(rng, narrowed(fill(rng, shape, [], 2), dtype))


def whole(view: np.ndarray) -> np.ndarray:
    """The memory behind a view, of which a kernel must change nothing else."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


@examples(40)
@given(
    st.integers(0, 2**32),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
    st.sampled_from([8, 16, 24, 80, 128]),
    st.integers(0, 3),
)
def test_memory_after_an_append_is_that_of_the_core(seed, dtype, tokens, head_dim, batch):
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 4))
    buffers = [window(rng, (batch, heads, 20, head_dim), dtype) for _ in "kv"]
    new = [window(rng, (batch, heads, tokens, head_dim), dtype) for _ in "kv"]
    exact = rng.integers(0, 20 - tokens + 1, batch)
    before, held = [whole(x).copy() for x in buffers], exact.copy()

    emulator.append(*buffers, held, *new)
    after = [whole(x).copy() for x in buffers]
    assert (held == exact + tokens).all()

    for buffer, memory in zip(buffers, before, strict=True):
        whole(buffer)[...] = memory
    arrays._layer([[[]] * heads] * batch, *buffers, exact).append(*new)
    for buffer, memory in zip(buffers, after, strict=True):
        assert whole(buffer).tobytes() == memory.tobytes()
    assert (held == exact).all()


@pytest.mark.parametrize("shift", [0, 1, 4, 8])
def test_addresses_that_are_no_multiple_of_16_bytes(shift):
    def rows(tokens):
        memory = emulator.aligned(2 * (tokens * 64 + shift)).view(np.float16)
        memory[:] = np.arange(memory.size)
        return memory[shift:].reshape(1, 1, tokens, 64)

    k, v, k_new, v_new = rows(8), rows(8), rows(3), rows(3)
    expected = k.copy()
    expected[:, :, 5:] = k_new
    exact = np.array([5])
    emulator.append(k, v, exact, k_new, v_new)
    assert k.tobytes() == v.tobytes() == expected.tobytes()
    assert exact.tolist() == [8]


def test_refusals_are_those_of_the_core():
    k, new = np.zeros((2, 3, 10, 8), np.float32), np.ones((2, 3, 1, 8), np.float32)
    for pair in (
        [new[:1]] * 2,
        [new[:, :2]] * 2,
        [new.astype(np.float16)] * 2,
        [new, np.ones((2, 3, 2, 8), np.float32)],
    ):
        exact, messages = np.array([1, 2]), []
        for append in (
            lambda pair, exact: emulator.append(k, k, exact, *pair),
            lambda pair, exact: arrays._layer([[[]] * 3] * 2, k, k, exact).append(*pair),
        ):
            with pytest.raises(ValueError, match="must be") as caught:
                append(pair, exact)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert exact.tolist() == [1, 2]
        assert not k.any()
