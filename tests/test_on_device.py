"""How tests reach a real GPU (on_device.py), rehearsed with other memory of the host and the emulated kernels."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import emulator
import numpy as np
import on_device
import pytest
from emulator_structs import Attend, History, View

from mixkvq import arrays

pytestmark = [
    emulator.NEEDED,
    pytest.mark.skipif(emulator.VARIANT in ("device", "copies"), reason="all tests go this way now"),
]


class Watched(on_device.Copies):
    """Counts what is held; fills what is new, so that nothing is read that was not copied."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = self.held = 0

    def take(self, nbytes: int) -> int:
        address = super().take(nbytes)
        ctypes.memset(address, 0xA5, nbytes)
        self.taken, self.held = self.taken + 1, self.held + 1
        return address

    def give(self, address: int) -> None:
        super().give(address)
        self.held -= 1


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """`emulator` calls the emulated kernels, but on copies in this memory."""
    real, memory = emulator.library(), Watched()
    there = on_device.rehearsal(real, memory)
    monkeypatch.setattr(emulator, "library", lambda: there)
    yield memory
    assert memory.held == 0


def test_an_append_is_copied_there_and_back(memory):
    rng = np.random.default_rng(1)
    fused = rng.standard_normal((2, 20, 2, 3, 16)).astype(np.float32)  # keys and values side by side
    k, v = (fused[:, :, i].transpose(0, 2, 1, 3) for i in range(2))
    new = [rng.standard_normal((2, 3, 2, 16)).astype(np.float32) for _ in "kv"]
    exact, want = np.array([5, 11]), fused.copy()
    for row, at in enumerate(exact):
        for i in range(2):
            want[row, at : at + 2, i] = new[i][row].transpose(1, 0, 2)
    emulator.append(k, v, exact, *new)
    assert (fused == want).all() and exact.tolist() == [7, 13]
    assert memory.taken == 4  # keys and values overlap and stay together


def test_what_is_refused_is_refused_there(memory):
    k = np.zeros((2, 3, 10, 8), np.float32)
    with pytest.raises(ValueError, match="must be"):
        emulator.append(k, k, np.array([1, 2]), k[:1, :, :1], k[:1, :, :1])
    assert memory.taken > 0


def test_a_view_keeps_its_alignment():
    memory = on_device.Copies()
    room = emulator.aligned(4096)
    for shift in (0, 2, 16, 34):
        view = View(room.ctypes.data + shift, (1, 1, 2, 8), (0, 0, 16, 1), 2)
        found = on_device.Arrays(memory)
        found.view(view)
        assert found.found[0][1] == 2 * 24
        copied = found.copied()
        next(copied)
        assert view.data != room.ctypes.data + shift and view.data % 256 == (room.ctypes.data + shift) % 256
        copied.close()


def test_records_move_with_the_places_that_name_them():
    rng = np.random.default_rng(2)
    from inputs import codec_of

    codec = codec_of(16, block_length=32, residual_length=32, key_group_size=32)
    k, v = rng.standard_normal((2, 1, 2, 64, 16)).astype(np.float32)
    records = arrays.pack(codec, k, v)
    packed = emulator.Packed(records.records, 16, mu=records.mu)
    seen = []

    def look(args, stream, error):
        args = ctypes.cast(args, ctypes.POINTER(Attend)).contents
        history: History = args.history.contents
        place = (ctypes.c_int64 * 4).from_address(history.place)
        for address, record in zip(place, itertools.chain(*records.records[0]), strict=True):
            assert address not in packed.place
            assert ctypes.string_at(address, len(record)) == record
        seen.append((ctypes.c_uint16 * 32).from_address(history.mu)[:])
        return 0

    library = on_device.Library(Watched(), lambda name: look, None)
    q = np.zeros((1, 4, 1, 16), np.float32)
    exact = np.zeros(1, np.int64)
    args = Attend(
        q=emulator.view(q),
        out=emulator.view(q),
        k=emulator.view(k),
        v=emulator.view(v),
        exact=emulator.address(exact),
        history=ctypes.pointer(packed.history),
    )
    assert library.mkvq_cuda_attend(ctypes.byref(args), None, None) == 0
    assert seen == [records.mu.view(np.uint16).ravel().tolist()]
    assert packed.history.place == packed.place.ctypes.data  # the caller's struct is as it was
    assert library.calls == 1
