"""End to end on a random Llama of realistic shape: decoding, the peak of a long prompt, the largest batch that fits.

* decode: caches are filled with random keys and values through their own `update` (`llama.fill`), no prompt is read;
  then the whole model decodes, all caches by turns. `DynamicCache` of one token: what a step costs without history.
* prefill: a prompt of random tokens in one forward pass; peak of the allocator above what model and ids hold.
* largest batch: computed from the bytes of a row, filled, and decoded with; less where that does not fit.

Attention is transformers' "sdpa"; choosing tokens is left out. Steps are eager: none is faster than the host launches
its kernels.
"""

from __future__ import annotations

from .batches import largest
from .bench import TINY, Bench, Sizes
from .decode import decode
from .options import parse
from .prompt import prefill


def main(arguments: list[str] | None = None) -> None:
    """All three parts, as far as time allows."""
    options = parse(__doc__, arguments)
    bench = Bench(TINY if options.rehearse else Sizes(), options.device, options.log, options.deadline)
    found = decode(bench)
    bench.free()
    prefill(bench)
    largest(bench)
    print(f"== {'; '.join(found) or 'no cache compared'}")


if __name__ == "__main__":
    main()
