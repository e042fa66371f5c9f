"""Ways of `generate`."""

from __future__ import annotations

import functools

import torch
from families import DECODED, NATIVE
from models import VOCABULARY, prompts
from versions import needs_assistant

from .case import Case, scenario

NEW_TOKENS = 20


def _greedy(case: Case, **fields) -> None:
    for cache in case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, NEW_TOKENS), **fields):
        layers = cache.report().layers
        assert tuple(layer.path for layer in layers) == case.family.paths(case.attention)
        for layer in layers:
            assert (layer.dequantizations >= NEW_TOKENS - 2) == (layer.path == DECODED or case.family.reads)
            assert (layer.record_bytes > 0) == (layer.path != NATIVE)


@scenario()
def greedy(case: Case) -> None:
    """Every layer takes its path, and only dequantized ones are decoded in every step (if unseen, from the second)."""
    _greedy(case)


@scenario()
def greedy_with_the_config(case: Case) -> None:
    """The layout is known from the beginning."""
    _greedy(case, config=case.model.config)


@scenario()
def sampling(case: Case) -> None:
    def run(cache):
        torch.manual_seed(3)
        return case.generate(case.inputs([90, 53]), cache, do_sample=True, num_return_sequences=2)

    case.compare(run)


@scenario()
def beams(case: Case) -> None:
    case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, num_beams=4, num_return_sequences=3))


@scenario()
def beams_of_short_sentences(case: Case) -> None:
    options = {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True}
    case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, **options))


@scenario()
def beams_and_sampling(case: Case) -> None:
    def run(cache):
        torch.manual_seed(3)
        return case.generate(case.inputs([90, 53]), cache, do_sample=True, num_beams=3, num_return_sequences=2)

    case.compare(run)


@scenario()
def prompt_lookup(case: Case) -> None:
    ids = prompts([30])["input_ids"].repeat(1, 3)
    inputs = {**case.inputs([90]), case.ids: ids}
    options = {"prompt_lookup_num_tokens": 5, "eos_token_id": VOCABULARY}  # older versions must have one
    case.compare(lambda cache: case.generate(inputs, cache, **options))


@scenario()
def assisted_by_itself(case: Case) -> None:
    needs_assistant(case.model)
    case.compare(lambda cache: case.generate(case.inputs([70]), cache, 16, assistant_model=case.model))


@scenario()
def assisted_by_another(case: Case) -> None:
    needs_assistant(case.model)
    case.compare(lambda cache: case.generate(case.inputs([70]), cache, 16, assistant_model=case.another_model()))


def _prefill_in_chunks(case: Case, size: int) -> None:
    case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, 12, prefill_chunk_size=size))


for _size in (16, 33, 64):
    scenario(f"prefill_in_chunks_of_{_size}")(functools.partial(_prefill_in_chunks, size=_size))


@scenario()
def three_turns(case: Case) -> None:
    """The whole conversation is given again in every turn, as a chat template does."""

    def run(cache):
        results, inputs = [], case.inputs([50])
        for turn in range(3):
            results.append(case.generate(inputs, cache, 12))
            ids = torch.cat([results[-1].sequences, prompts([20], seed=turn + 5)["input_ids"]], 1)
            inputs = {**inputs, case.ids: ids, case.mask: torch.ones_like(ids)}
        return results

    case.compare(run)


@scenario()
def new_tokens_and_the_whole_mask(case: Case) -> None:
    """In the second turn only the new tokens are given."""

    def run(cache):
        reader = case.reader(cache, [80, 53])
        mask = torch.cat([reader.mask, torch.ones(2, 10, dtype=torch.long)], 1)
        result = case.generate({**case.inputs([10, 10], seed=5), case.mask: mask}, cache, 12)
        return [*reader.logits, result]

    case.compare(run)


@scenario(decoder_only="generate takes no embeddings of the decoder's tokens")
def embeddings_instead_of_tokens(case: Case) -> None:
    inputs = case.inputs([70, 40])
    inputs["inputs_embeds"] = case.model.get_input_embeddings()(inputs.pop(case.ids)).detach()
    case.compare(lambda cache: case.generate(inputs, cache))
