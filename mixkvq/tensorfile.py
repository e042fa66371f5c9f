"""Tensors and text in one safetensors file, with a checksum; files that are read may come from anybody.

A safetensors file is the length of a header (u64, little-endian), the header (JSON: name -> dtype, shape, offsets, and
``__metadata__``: text -> text) and the tensors' bytes, one behind the other. It is written and read here, not by the
library of that name, because that one maps files into memory (one that shrinks meanwhile kills the process, one that is
overwritten changes the tensors), writes metadata in random order, and has no checksum.

The checksum is the SHA-256 of all bytes from the header on, its own 64 digits taken as zeros. It finds damage; it does
not prove who wrote a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import strict_json
from .errors import CacheFileError
from .files import opened, replaced_file

MAX_HEADER = 4 << 20
"""Bytes: 100 layers take 150 kB."""
_MAX_SIZE = 1 << 48  # of one dimension
_ALIGNMENT = 64  # of the first tensor in the file
_CHECKSUM, _ZEROS = "checksum", "0" * 64
_DIGITS = re.compile("[0-9a-f]{64}")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What tensors in a file may be."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes
    ----------
    dtype : torch.dtype
        One of `DTYPES`.
    shape : tuple of int
    make : callable
        Gives the tensor when it is written, so that not all need to be held at once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Entry:
        """A tensor that is there."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


# ---- writing -------------------------------------------------------------------------------------------------------
def write(path: Path, metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """Write a file whole or not at all (`files.replaced_file`); the same content gives the same bytes.

    Parameters
    ----------
    path : Path
    metadata : mapping
        Text under names other than "checksum".
    entries : mapping
        Name -> tensor.

    Raises
    ------
    OSError
        If it cannot be written, naming the file; what was there before stays.
    ValueError
        If the header would be larger than `MAX_HEADER`, or `read` would not believe a tensor's sizes.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {_CHECKSUM: _ZEROS, **metadata}}
    end = 0
    for name in order:
        entry = entries[name]
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the cache has {len(entries)} tensors: a file's header holds at most {MAX_HEADER} bytes")
    for name, entry in entries.items():
        if not _believed(entry.shape, 8 + len(text) + end):
            raise ValueError(f"the cache has no numbers in {name}, whose sizes are {list(entry.shape)}")
    try:
        with replaced_file(path) as made, made.open("r+b") as file:
            digest = hashlib.sha256(text)
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                data = _bytes_of(entries[name])
                digest.update(data)
                file.write(data)
            file.seek(8 + text.index(_ZEROS.encode()))
            file.write(digest.hexdigest().encode())
    except OSError as error:
        raise OSError(error.errno, f"the cache cannot be saved: {error.strerror or error}", str(path)) from error


def _bytes_of(entry: Entry) -> memoryview:
    tensor = entry.make().detach().cpu().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# ---- reading -------------------------------------------------------------------------------------------------------
def read(
    path: Path, magic: Callable[[dict[str, str], list[str]], None]
) -> tuple[dict[str, str], dict[str, torch.Tensor], int]:
    """Read a file. Nothing in it is executed, and tensors get no more memory than it has bytes for them.

    Parameters
    ----------
    path : Path
    magic : callable
        Given the metadata and the names of all tensors, raises `CacheFileError` for a file of another kind; called
        before tensors are read and the checksum is compared.

    Returns
    -------
    metadata : dict
    tensors : dict
        Ordinary CPU tensors, each with memory of its own on a 64-byte boundary.
    size : int
        Bytes of the file.

    Raises
    ------
    CacheFileError
        Naming the file and what is wrong with it.
    OSError
        If it cannot be read.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        text, data = _header(path, file, size)
        metadata, entries = _parse(path, text, data, size)
        magic(metadata, list(entries))
        digest = hashlib.sha256(_without_checksum(path, text, metadata))
        tensors = {}
        for name, (dtype, shape, nbytes) in entries.items():
            raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            view = raw.numpy().data
            if file.readinto(view) != nbytes:
                raise CacheFileError(f"{path} is truncated: it became shorter while it was read")
            digest.update(view)
            tensors[name] = raw.view(dtype).view(shape)
    if digest.hexdigest() != metadata[_CHECKSUM]:
        raise CacheFileError(f"{path} is damaged: its checksum is not that of its content; save the cache again")
    return metadata, tensors, size


def _header(path: Path, file: BufferedReader, size: int) -> tuple[bytes, int]:
    """The header, and how many bytes follow it."""
    if size == 0:
        raise CacheFileError(f"{path} is empty")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_HEADER or length > size - 8:
        what = "is truncated" if len(start) == 8 and size - 8 < length <= MAX_HEADER else "is no safetensors file"
        raise CacheFileError(f"{path} {what}: {size} bytes, of which the first 8 announce a header of {length}")
    text = file.read(length)
    if len(text) != length:
        raise CacheFileError(f"{path} is truncated: it became shorter while it was read")
    return text, size - 8 - length


_Found = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


def _parse(path: Path, text: bytes, available: int, size: int) -> tuple[dict[str, str], _Found]:
    """Metadata, and dtype, shape and bytes of every tensor in the order of the file."""
    try:
        header = strict_json.parse(text.decode())
    except ValueError as error:
        raise CacheFileError(f"{path} is no safetensors file, or damaged: its header is not JSON ({error})") from error
    try:
        metadata = header.pop("__metadata__", {})
        if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise ValueError("__metadata__ must be text under names")
        found: list[tuple[int, int, str, torch.dtype, tuple[int, ...]]] = []
        for name, about in header.items():
            begin, end = _sizes(about["data_offsets"], name)
            shape, dtype = _sizes(about["shape"], name), about["dtype"]
            if dtype not in DTYPES:
                found.append((begin, end, name, torch.uint8, (end - begin,)))  # somebody else's
                continue
            if prod(shape) * DTYPES[dtype].itemsize != end - begin:
                raise ValueError(f"{name!r} has {end - begin} bytes for {dtype} {list(shape)}")
            if not _believed(shape, size):
                raise ValueError(f"{name!r} has no numbers, and the sizes {list(shape)}")
            found.append((begin, end, name, DTYPES[dtype], shape))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path} is no safetensors file, or damaged: {error!r}") from error
    entries: _Found = {}
    at = 0
    for begin, end, name, dtype, shape in sorted(found, key=lambda entry: entry[:2]):
        if begin != at or end < begin:
            raise CacheFileError(f"{path} is no safetensors file, or damaged: {name!r} does not begin at {at}")
        at = end
        entries[name] = dtype, shape, end - begin
    if at != available:
        what = "is truncated" if at > available else "has bytes behind its end"
        raise CacheFileError(f"{path} {what}: {available} bytes of tensors, its header says {at}")
    return metadata, entries


def _believed(shape: tuple[int, ...], size: int) -> bool:
    """Whether a file of ``size`` bytes may have a tensor of this shape: one without numbers has no bytes to show.

    Caches have such tensors (no rows, no tokens, no blocks) beside others of the same rows, heads or channels; later
    code makes lists of the rows, and torch multiplies what is not 0.
    """
    return 0 not in shape or (max(shape) <= size and prod(n for n in shape if n) < _MAX_SIZE)


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    """A list of sizes."""
    if not (isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < _MAX_SIZE for n in value)):
        raise ValueError(f"{name!r} has the sizes {str(value)[:80]}")
    return tuple(value)


def _without_checksum(path: Path, text: bytes, metadata: Mapping[str, str]) -> bytes:
    """The header as it was when the checksum was made."""
    digits = metadata.get(_CHECKSUM, "")
    if not _DIGITS.fullmatch(digits) or text.count(digits.encode()) != 1:
        raise CacheFileError(f"{path} is damaged: its checksum is missing; save the cache again")
    return text.replace(digits.encode(), _ZEROS.encode())
