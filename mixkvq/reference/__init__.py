"""The oracle: docs/format.md in NumPy, slow and plain, to judge the C core by.

It shares no code with the C core and imports nothing of ours: a codec is any object with the attributes of
`codec.Codec` (`mixkvq.config.BlockCodec` is one). Records made here equal those of the C core byte for byte; attention
is float64.
"""

from .attention import attend, importance, salience
from .coding import code_groups, values_of
from .layout import Header, parse, record_nbytes
from .numbers import hadamard, narrow
from .packing import pack_block, pack_head, pack_heads
from .tiers import assign
from .unpacking import unpack

__all__ = [
    "Header",
    "assign",
    "attend",
    "code_groups",
    "hadamard",
    "importance",
    "narrow",
    "pack_block",
    "pack_head",
    "pack_heads",
    "parse",
    "record_nbytes",
    "salience",
    "unpack",
    "values_of",
]
