"""The tests of the kernels on a real GPU: what `emulator.py` calls with addresses on the host goes there and back.

`library()` stands for the emulated library, with ``MIXKVQ_EMULATOR=device``. Every call copies all arrays that its
arguments name to device memory, as long as they are and aligned as they are, puts the addresses in, calls
`mixkvq._cuda`, waits, and copies back what may have been written. Arrays that overlap stay together. Needs the driver
(libcuda) and nothing else: no torch, so that a sanitizer sees our kernels alone.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_uint32, c_void_p, pointer
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

_ITEM = {1: 4, 2: 2, 3: 2, 4: 1}  # bytes of an element by dtype code
_NBYTES = 20  # where a record has its length, docs/format.md section 1
_LIMIT = 1 << 32


# ---- memory --------------------------------------------------------------------------------------------------------
class Memory(Protocol):
    """Where kernels read and write."""

    def take(self, nbytes: int) -> int: ...
    def give(self, address: int) -> None: ...
    def write(self, address: int, host: int, nbytes: int) -> None: ...
    def read(self, host: int, address: int, nbytes: int) -> None: ...
    def wait(self) -> None: ...


class Copies:
    """Other memory of the host: rehearses the copying without a GPU."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def take(self, nbytes: int) -> int:
        room = ctypes.create_string_buffer(nbytes + 256)
        address = -(-ctypes.addressof(room) // 256) * 256
        self._held[address] = room
        return address

    def give(self, address: int) -> None:
        del self._held[address]

    def write(self, address: int, host: int, nbytes: int) -> None:
        ctypes.memmove(address, host, nbytes)

    def read(self, host: int, address: int, nbytes: int) -> None:
        ctypes.memmove(host, address, nbytes)

    def wait(self) -> None:
        pass


class Device:
    """Memory of the first GPU, through the driver; the context is the one that the CUDA runtime uses."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context = c_int(), c_void_p()
        self._must("cuInit", 0)
        self._must("cuDeviceGet", byref(device), 0)
        self._must("cuDevicePrimaryCtxRetain", byref(context), device)
        self._must("cuCtxSetCurrent", context)

    def _must(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = c_char_p()
            self._driver.cuGetErrorString(status, byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} (CUDA error {status})")

    def take(self, nbytes: int) -> int:
        found = ctypes.c_uint64()
        self._must("cuMemAlloc_v2", byref(found), ctypes.c_size_t(nbytes))
        return found.value

    def give(self, address: int) -> None:
        self._must("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, host: int, nbytes: int) -> None:
        self._must("cuMemcpyHtoD_v2", ctypes.c_uint64(address), c_void_p(host), ctypes.c_size_t(nbytes))

    def read(self, host: int, address: int, nbytes: int) -> None:
        self._must("cuMemcpyDtoH_v2", c_void_p(host), ctypes.c_uint64(address), ctypes.c_size_t(nbytes))

    def wait(self) -> None:
        self._must("cuCtxSynchronize")


# ---- arrays of a call ----------------------------------------------------------------------------------------------
@dataclass
class Arrays:
    """Stretches of host memory that a call names, and where their addresses go.

    Attributes
    ----------
    memory : Memory
    found : list of (address, bytes, whether it may be written)
    places : list of callables
        Each is told the translation of addresses when everything is copied.
    """

    memory: Memory
    found: list[tuple[int, int, bool]] = field(default_factory=list)
    places: list[Callable[[Callable[[int], int]], None]] = field(default_factory=list)

    def add(self, owner: Any, name: str, nbytes: int, *, written: bool = False) -> None:
        """The array whose address is a member of a struct; none, or an empty one, stays as it is."""
        address = getattr(owner, name)
        if not address or nbytes <= 0:
            return
        if nbytes > _LIMIT:
            raise ValueError(f"{name} has {nbytes} bytes, must be at most {_LIMIT}")
        self.found.append((address, nbytes, written))
        self.places.append(lambda where: setattr(owner, name, where(address)))

    def view(self, view: Any, *, written: bool = False) -> None:
        """From the first to the last element of a `View`."""
        size = _ITEM.get(view.dtype, 0)
        if min(view.shape) <= 0 or min(view.stride) < 0:
            return
        last = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        self.add(view, "data", (last + 1) * size, written=written)

    def copied(self) -> Iterator[Callable[[], None]]:
        """Copy everything; what is yielded copies back. Memory is given back when the generator is closed."""
        ranges: list[list[int]] = []
        for address, nbytes, _ in sorted(self.found):
            if ranges and address < ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], address + nbytes)
            else:
                ranges.append([address, address + nbytes])
        taken = []
        try:
            for begin, end in ranges:
                shift = begin % 256  # alignment decides which of its ways a kernel takes
                base = self.memory.take(shift + end - begin)
                taken.append((begin, end, base, base + shift))
                self.memory.write(base + shift, begin, end - begin)

            def where(address: int) -> int:
                for begin, end, _, there in taken:
                    if begin <= address < end:
                        return there + address - begin
                raise KeyError(address)

            for place in self.places:
                place(where)

            def back() -> None:
                for address, nbytes, written in self.found:
                    if written:
                        self.memory.read(address, where(address), nbytes)

            yield back
        finally:
            for _, _, base, _ in taken:
                self.memory.give(base)


def _history(arrays: Arrays, history: Any) -> list[Any]:
    """The arrays and records of a history; the list holds what must stay alive."""
    heads = history.batch * history.kv_heads
    count = heads * history.place_stride
    arrays.add(history, "blocks", 8 * history.batch)
    arrays.add(history, "mu", 2 * heads * history.head_dim)
    if not history.place or count <= 0:
        return []
    own = (c_int64 * count).from_buffer_copy((c_int64 * count).from_address(history.place))
    for i, address in enumerate(own):
        if address > 0:
            nbytes = c_uint32.from_address(address + _NBYTES).value
            arrays.found.append((address, nbytes, False))
            arrays.places.append(lambda where, i=i, address=address: own.__setitem__(i, where(address)))
    # last, when the addresses in it are those of the device
    room = arrays.memory.take(8 * count)

    def place(where: Callable[[int], int]) -> None:
        arrays.memory.write(room, ctypes.addressof(own), 8 * count)
        history.place = room

    arrays.places.append(place)
    return [own, room]


def _dense_of(name: str, a: Any) -> list[tuple[str, int, bool]]:
    """Dense arrays of each call: member, bytes, whether it is written."""
    if name == "salience":
        (batch, *_), dim = a.q.shape[:], a.q.shape[3]
        return [("first", 8 * batch, False), ("sum", 8 * batch * a.kv_heads * dim, True)]
    if name == "append":
        return [("exact", 8 * a.k.shape[0], True)]
    if name == "unpack":
        return [("first", 8 * a.k.shape[0], False)]
    if name == "attend":
        batch, heads = a.q.shape[0], a.q.shape[1]
        own = [("exact", 8 * batch, False), ("start", 8 * batch, False), ("sink_logits", 4 * heads, False)]
        return [*own, ("workspace", a.workspace_bytes, True)]
    batch, heads, _, dim = a.k.shape
    rows, slots = batch * heads, batch * heads * a.max_blocks
    return [
        ("first", 8 * batch, False),
        ("blocks", 8 * batch, False),
        ("importance", 4 * rows * dim, False),
        ("mu", 2 * rows * dim, True),
        ("has_mu", rows, True),
        ("out", slots * a.out_stride, True),
        ("sizes", 8 * slots, True),
        ("raised", 8 * slots, True),
    ]


_VIEWS = {
    "salience": {"q": False},
    "pack": {"k": False, "v": False},
    "unpack": {"k": True, "v": True},
    "append": {"k": True, "v": True, "k_new": False, "v_new": False},
    "attend": {"q": False, "out": True, "k": False, "v": False},
}


# ---- calls ---------------------------------------------------------------------------------------------------------
def _copy(struct: Any) -> Any:
    """A struct of its own; what it points to is still the caller's."""
    mine = type(struct)()
    ctypes.memmove(ctypes.addressof(mine), ctypes.addressof(struct), ctypes.sizeof(struct))
    return mine


class Library:
    """Functions by the names of csrc/cuda/mixkvq_cuda.h, on arguments whose arrays lie on the host.

    Parameters
    ----------
    memory : Memory
    functions : callable
        Name, such as "pack" -> C function.
    text : callable
        Status -> bytes.
    """

    def __init__(self, memory: Memory, functions: Callable[[str], Any], text: Callable[[int], Any]) -> None:
        self._memory, self._functions, self.mkvq_status_text = memory, functions, text
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        short = name.removeprefix("mkvq_cuda_")
        if short == "attend_workspace":
            return _Workspace(self._functions(short))
        if short not in _VIEWS:
            raise AttributeError(name)
        return lambda args, stream, error: self._call(short, args._obj, error)

    def _call(self, name: str, args: Any, error: Any) -> int:
        mine = _copy(args)
        arrays, kept = Arrays(self._memory), list[Any]()
        for member, written in _VIEWS[name].items():
            arrays.view(getattr(mine, member), written=written)
        if name == "attend" and mine.mask_kind == 2:
            arrays.view(mine.mask)
        if name in ("unpack", "attend") and mine.history:
            history = _copy(mine.history.contents)
            kept = _history(arrays, history)
            mine.history = pointer(history)
        for member, nbytes, written in _dense_of(name, mine):
            arrays.add(mine, member, nbytes, written=written)
        copied = arrays.copied()
        try:
            back = next(copied)
            status = int(self._functions(name)(byref(mine), None, error))
            self._memory.wait()
            if status == 0:
                back()
                self.calls += 1
        finally:
            copied.close()
            for room in kept[1:]:
                self._memory.give(room)
        return status


def rehearsal(emulated: ctypes.CDLL, memory: Memory | None = None) -> Library:
    """The emulated kernels, but on copies of all arrays."""
    return Library(memory or Copies(), lambda name: getattr(emulated, f"mkvq_cuda_{name}"), emulated.mkvq_status_text)


class _Workspace:
    """Reads sizes only: takes the arguments as they are."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.restype: Any = c_int64

    def __call__(self, args: Any) -> int:
        return int(self._function(args))


_CALL = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p)


class _Api(Structure):
    """``mkvq_cuda_api``."""

    _fields_ = [
        ("version", c_uint32),
        *[(name, _CALL) for name in ("salience", "pack", "unpack", "append", "attend")],
        ("attend_workspace", CFUNCTYPE(c_int64, c_void_p)),
    ]


def _capsule(module: Any, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return int(get(module._C_API, name))


@cache
def library() -> Library:
    """The calls of the installed `mixkvq._cuda` on the first GPU. Says at exit how many there were."""
    from mixkvq import _core, _cuda

    api = ctypes.cast(_capsule(_cuda, b"mixkvq._cuda._C_API"), POINTER(_Api)).contents
    core = _capsule(_core, b"mixkvq._core._C_API")
    version = c_uint32.from_address(core).value
    if api.version != version:
        raise RuntimeError(f"mixkvq._cuda has calls of version {api.version}, mixkvq._core of {version}")
    text = CFUNCTYPE(c_char_p, c_int)(c_void_p.from_address(core + 8).value or 0)
    found = Library(Device(), lambda name: getattr(api, name), text)
    atexit.register(lambda: print(f"on the device: {found.calls} calls", file=sys.stderr))
    return found


def missing() -> str | None:
    """Why there is no GPU to run on, or None."""
    try:
        library()
    except (ImportError, OSError, RuntimeError) as error:
        return f"the kernels cannot run on a GPU here: {error}"
    return None
