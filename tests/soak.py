"""A long run of what people do with caches, for `make soak`: ``PYTHONPATH=tests python -P tests/soak.py --minutes 60``.

A turn draws from its own seed a tiny random model, a preset, prompts, a way to generate, and what is done to the cache
then: cancelled by a `StoppingCriteria`, by an exception or a Ctrl-C in the middle of a forward pass, saved and loaded,
forked, cropped, copied, reordered, emptied and filled again. Every turn is run twice, the second time later and in
another order: all it computes must be the same to the last bit.

It fails, with what it saw, if
  - a turn fails, or differs when it is run again;
  - resident memory grows: the line through it, after the first fifth of the time, rises by more than `GROWTH` in the
    run, or `RATE` a minute, with 97.5 % confidence (`soak_memory.slope`);
  - tensors, caches, layers or handles are alive at the end of a round that were not after the first fifth.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import pickle
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from models import forward, generate, prompts, tiny
from soak_memory import SPANS, Slope, census, resident, slope
from transformers import StoppingCriteria, StoppingCriteriaList

from mixkvq import MixKVQCache, _core, list_presets
from mixkvq.handle import PackedHandle

GROWTH, RATE = 320 << 10, 4 << 10
"""Bytes that the line may rise in a run, and bytes a minute that it may rise in a long one. The line of a run without a
leak is uncertain by 10 to 30 kB a minute after five minutes, by less than one after an hour."""

ROUND, LOOK = 8, 4
"""Turns until they are run again, and until memory is measured."""

MODELS = [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("gpt_oss", "eager"), ("falcon_h1", "sdpa")]
CROPPED = ("llama",)  # families whose layers all keep what crop(n) goes back to
SHORT = {"block_length": 32, "residual_length": 32}


class Cancelled(Exception):
    """Somebody changed their mind in the middle of a forward pass."""


class Turn:
    """One turn; what it computed goes into `digest`, and its tokens are counted."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder = random.Random(seed), folder
        self.hash, self.tokens = hashlib.sha256(), 0
        family, attention = self.draw.choice([each for each in MODELS if not FAMILIES[each[0]].absent(each[1])])
        self.family, self.model = family, tiny(family, attention)
        torch.manual_seed(seed)

    # ---- pieces ----------------------------------------------------------------------------------------------------
    def note(self, *results: Any) -> None:
        """Make tensors, bytes and numbers part of what must come out again."""
        for result in results:
            if isinstance(result, torch.Tensor):
                result = (
                    f"{result.dtype}{list(result.shape)}".encode()
                    + result.contiguous().view(torch.uint8).numpy().tobytes()
                )
            self.hash.update(result if isinstance(result, bytes) else repr(result).encode())

    def settings(self) -> dict[str, Any]:
        """Arguments of a cache, the same for every cache of this turn."""
        preset = self.draw.choice(list_presets())
        fields: dict[str, Any] = dict(SHORT)
        if preset != "lossless":
            fields["key_group_size"] = 32
        if self.draw.random() < 0.3:
            fields["sink_length"] = self.draw.choice([0, 1, 4, 9])
        if self.draw.random() < 0.3:
            fields["config"] = self.model.config
        return {"preset": preset, "precision": self.draw.choice(["default", "exact", "fast"]), **fields}

    def inputs(self) -> dict[str, torch.Tensor]:
        """One to four prompts, padded on the left."""
        lengths = [self.draw.randint(1, 180) for _ in range(self.draw.choice([1, 1, 2, 3, 4]))]
        return prompts(lengths, seed=self.draw.randrange(1 << 30))

    def way(self) -> dict[str, Any]:
        """Greedy, drawn or by beams."""
        return self.draw.choice([{}, {}, {"do_sample": True, "top_k": 20}, {"num_beams": self.draw.choice([2, 3])}])

    def go_on(self, cache: Any, inputs: dict[str, torch.Tensor], new: int, **options: Any) -> dict[str, torch.Tensor]:
        """Generate; what follows is generated from what comes back."""
        result = generate(self.model, inputs, cache, new, **options)
        self.note(result.sequences, result.logits[-1], cache.get_seq_length())
        added = result.sequences.shape[1] - inputs["input_ids"].shape[1]
        self.tokens += added * len(result.sequences)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1)
        return {"input_ids": result.sequences, "attention_mask": mask}

    def told(self, cache: Any) -> None:
        """Note what a cache says of itself."""
        report = cache.report()
        self.note(*((layer.path, layer.tokens, layer.nbytes) for layer in report.layers), report.nbytes)

    # ---- what happens to a cache -----------------------------------------------------------------------------------
    def run(self) -> str:
        """All of it; the digest."""
        arguments, inputs = self.settings(), self.inputs()
        cache, way = MixKVQCache(**arguments), self.way()
        self.tokens += int(inputs["attention_mask"].sum())
        act = self.draw.choice(ACTS)
        self.note(act.__name__, arguments["preset"], self.family, sorted(way))
        with torch.inference_mode() if self.draw.random() < 0.5 else torch.no_grad():
            act(self, cache, inputs, way)
        self.told(cache)
        return self.hash.hexdigest()

    def plain(self, cache: Any, inputs: Any, way: Any) -> None:
        self.go_on(cache, inputs, self.draw.randint(2, 50), **way)

    def stopped(self, cache: Any, inputs: Any, way: Any) -> None:
        """A StoppingCriteria ends it; it goes on from there."""
        longer = self.go_on(
            cache, inputs, 40, stopping_criteria=StoppingCriteriaList([After(self.draw.randint(1, 30))])
        )
        self.go_on(cache, longer, self.draw.randint(2, 40))

    def thrown(self, cache: Any, inputs: Any, way: Any) -> None:
        """An exception in the middle of a forward pass; emptied, the cache is as good as a new one."""
        error = self.draw.choice([Cancelled, KeyboardInterrupt, MemoryError])
        before = self.draw.randint(0, 12)
        with self.breaking(error, before):
            try:
                self.go_on(cache, inputs, 30, **way)
            except error:
                self.note("thrown")
        self.emptied(cache, inputs)

    def interrupted(self, cache: Any, inputs: Any, way: Any) -> None:
        """A signal at any moment raises KeyboardInterrupt, as Ctrl-C does; where, is not the same when run again."""
        signal.setitimer(signal.ITIMER_REAL, self.draw.uniform(0.005, 0.15))
        try:
            generate(self.model, inputs, cache, 60, **way)
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.emptied(cache, inputs)

    def emptied(self, cache: Any, inputs: Any) -> None:
        """Two runs over an emptied cache and a new one end alike."""
        cache.reset()
        torch.manual_seed(0)
        self.go_on(cache, inputs, 20)

    def saved(self, cache: Any, inputs: Any, way: Any) -> None:
        longer = self.go_on(cache, inputs, self.draw.randint(2, 20))
        path = self.folder / "cache.safetensors"
        cache.save(path)
        self.note(hashlib.sha256(path.read_bytes()).digest())
        loaded = MixKVQCache.load(path, self.draw.choice([None, self.model.config]))
        self.same(self.go_on(loaded, longer, 20), self.go_on(cache, longer, 20))

    def forked(self, cache: Any, inputs: Any, way: Any) -> None:
        longer = self.go_on(cache, inputs, self.draw.randint(2, 20))
        forks = cache.fork(self.draw.randint(1, 3))
        for fork in forks:
            self.go_on(fork, longer, self.draw.randint(2, 20), do_sample=True)
        self.same(self.go_on(cache.fork(1)[0], longer, 10), self.go_on(cache, longer, 10))

    def cropped(self, cache: Any, inputs: Any, way: Any) -> None:
        """Tokens are taken back, as in assisted decoding, and others follow."""
        longer = self.go_on(cache, inputs, self.draw.randint(2, 40))
        if self.family not in CROPPED:
            return
        for _ in range(self.draw.randint(1, 4)):
            width = longer["input_ids"].shape[1]
            least = int((longer["attention_mask"] == 0).sum(1).max()) + 1
            keep = self.draw.randint(least, max(least, cache.get_seq_length() - 1))
            if keep >= cache.get_seq_length():
                break
            cache.crop(keep - cache.get_seq_length())
            longer = {name: tensor[:, : min(width, keep + 1)] for name, tensor in longer.items()}
            longer = self.go_on(cache, longer, self.draw.randint(1, 20))

    def copied(self, cache: Any, inputs: Any, way: Any) -> None:
        longer = self.go_on(cache, inputs, self.draw.randint(2, 20))
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), pickle.loads(ForkingPickler.dumps(cache))
        first, *others = (self.go_on(each, longer, 15) for each in copies)
        for other in others:
            self.same(first, other)

    def moved(self, cache: Any, inputs: Any, way: Any) -> None:
        """Rows change places, leave and come twice."""
        longer = self.go_on(cache, inputs, self.draw.randint(2, 20))
        rows = len(longer["input_ids"])
        order = torch.tensor([self.draw.randrange(rows) for _ in range(rows)])
        kept = torch.tensor(sorted(self.draw.sample(range(rows), self.draw.randint(1, rows))))
        cache.reorder_cache(order)
        cache.batch_select_indices(kept)
        cache.batch_repeat_interleave(2)
        longer = {name: tensor[order][kept].repeat_interleave(2, 0) for name, tensor in longer.items()}
        self.go_on(cache, longer, self.draw.randint(2, 20))

    def same(self, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
        if not torch.equal(a["input_ids"], b["input_ids"]):
            raise AssertionError(f"{self.family}: other tokens than from the cache that it was made of")

    @contextmanager
    def breaking(self, error: type[BaseException], calls: int) -> Any:
        """One of the model's parts, drawn, fails after so many calls."""
        parts = [
            m
            for name, m in self.model.named_modules()
            if name.rpartition(".")[2] in ("self_attn", "mlp", "o_proj", "k_proj")
        ]
        left = calls

        def fail(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise error("in the middle")

        part = self.draw.choice(parts)
        before = self.draw.random() < 0.5
        hook = part.register_forward_pre_hook(fail) if before else part.register_forward_hook(fail)
        try:
            yield
        finally:
            hook.remove()


ACTS = [
    Turn.plain,
    Turn.stopped,
    Turn.thrown,
    Turn.interrupted,
    Turn.saved,
    Turn.forked,
    Turn.cropped,
    Turn.copied,
    Turn.moved,
]


class After(StoppingCriteria):  # type: ignore[misc]
    """Stop after so many tokens."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


# ---- the run -------------------------------------------------------------------------------------------------------
def keep_tensor(kept: list[Any]) -> None:
    kept.append(torch.zeros(16))


def keep_handle(kept: list[Any]) -> None:
    """The keys that a packed layer hands out."""
    cache, states = MixKVQCache("lossless", **SHORT), torch.zeros(1, 2, 1, 16)
    forward(tiny(), cache, prompts([40])["input_ids"])
    kept.append(cache.update(states, states, 0)[0])
    assert type(kept[-1]) is PackedHandle


def keep_memory(kept: list[Any]) -> None:
    """What no Python object holds."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    ctypes.memset(malloc(1 << 15), 1, 1 << 15)


LEAKS: dict[str, Callable[[list[Any]], None]] = {
    "none": lambda kept: None,
    "tensor": keep_tensor,
    "handle": keep_handle,
    "memory": keep_memory,
}
"""What every turn leaves behind, to see that the run finds it."""


class Run:
    """Rounds of turns until the time is up."""

    def __init__(self, minutes: float, seed: int, leak: str) -> None:
        self.minutes, self.seed, self.leak = minutes, seed, LEAKS[leak]
        self.kept: list[Any] = []
        self.turns = self.tokens = 0
        self.times: list[float] = []
        self.memory: list[float] = []
        self.objects: Counter[str] = Counter()
        self.problems: list[str] = []

    @property
    def now(self) -> float:
        """Minutes since the run began."""
        return (time.monotonic() - self.began) / 60

    def __call__(self) -> None:
        """The whole run; `problems` has what it found. However short: until there are measurements for a line."""
        self.began, said = time.monotonic(), 0
        shuffle, first = random.Random(self.seed), self.seed
        with tempfile.TemporaryDirectory() as folder:
            while not self.problems and (self.now < self.minutes or len(self.memory) < SPANS):
                seeds = list(range(first, first + ROUND))
                digests = {seed: self.turn(seed, Path(folder)) for seed in seeds}
                for seed in shuffle.sample(seeds, ROUND):
                    if self.turn(seed, Path(folder)) != digests[seed]:
                        self.problems.append(f"turn {seed} computed something else when it was run again")
                first += ROUND
                if self.objects:
                    self.count()
                elif self.now > self.minutes / 5:
                    self.objects = census()
                if int(self.now) > said:
                    said = int(self.now)
                    print(self.line(), flush=True)

    def turn(self, seed: int, folder: Path) -> str:
        """One turn; its digest."""
        turn = Turn(seed, folder)
        try:
            digest = turn.run()
        except Exception as error:
            error.add_note(f"in turn {seed} ({turn.family})")
            raise
        self.turns, self.tokens = self.turns + 1, self.tokens + turn.tokens
        self.leak(self.kept)
        if self.objects and self.turns % LOOK == 0:
            self.times.append(self.now)
            self.memory.append(resident())
        return digest

    def count(self) -> None:
        """Look for objects that a round left behind."""
        grown = census() - self.objects
        if grown:
            left = ", ".join(f"{count} {name}" for name, count in sorted(grown.items()))
            self.problems.append(f"after turn {self.turns} there are {left} more than after the first fifth")

    def line(self) -> str:
        """How it stands."""
        memory = f"{self.memory[-1] / 2**20:.2f} MiB" if self.memory else "warming up"
        return f"{self.now:6.1f} min  {self.turns:6} turns  {self.tokens:9,} tokens  {memory}"

    def result(self) -> None:
        """Print what was found; adds the problem that memory grows."""
        print(f"turns: {self.turns} ({self.turns // 2} different, each twice, all alike), tokens: {self.tokens:,}")
        found = ", ".join(f"{count} {name}" for name, count in sorted(self.objects.items()))
        print(f"alive after the first fifth, and after every round since: {found}")
        through: Slope = slope(self.times, self.memory)
        begin, end = (each / 2**20 for each in (self.memory[0], self.memory[-1]))
        print(
            f"memory: {begin:.2f} MiB after the first fifth, {end:.2f} MiB at the end, {len(self.memory)} measurements"
        )
        limit = max(RATE, GROWTH / self.minutes)
        print(f"slope: {through.rate:+,.0f} bytes a minute, 95 % confidence {through.margin:,.0f}; limit {limit:,.0f}")
        if through.least > limit:
            self.problems.append(f"memory grows by {through.least:,.0f} bytes a minute at least")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first turn; the others follow")
    parser.add_argument("--leak", choices=LEAKS, default="none", help="seed a leak that the run must find")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    warnings.simplefilter("ignore")
    # of every shape that it meets oneDNN keeps what it compiled: 5 kB a turn, whatever the cache
    torch.backends.mkldnn.enabled = False
    print(f"soak: {options.minutes:g} minutes, seed {options.seed}, kernels: {_core.isa()}", flush=True)
    run = Run(options.minutes, options.seed, options.leak)
    run()
    if not run.problems:
        run.result()
    for problem in run.problems:
        print(f"soak: {problem}")
    sys.exit(bool(run.problems))


if __name__ == "__main__":
    main()
