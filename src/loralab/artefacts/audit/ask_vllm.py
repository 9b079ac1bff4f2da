"""Ask vLLM, with the Python that has it: ask_vllm.py REQUEST ANSWER. Imports nothing of loralab.

REQUEST is JSON: model (a folder), adapter (or null), rank, precision, prompts, positions, most (the
tokens that are told of each place). ANSWER becomes npz: values and indices (P, K).

Each place is asked for as the next token of a prompt that ends there. vLLM's `prompt_logprobs` are
no way with an adapter: its logits are mapped to adapters by request, one row of each, and those of a
whole prompt are many, which fails or leaves out what the adapter changes at the output head.
"""

import json
import os
import sys
from pathlib import Path

import numpy


def main(request: str, answer: str) -> None:
    """Compute and write."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB, of a processor alone: a few prompts need less
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    options = {"enable_lora": True, "max_lora_rank": asked["rank"]} if asked["adapter"] else {}
    llm = LLM(
        model=asked["model"],
        dtype=dtypes[asked["precision"]],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=asked["most"],
        logprobs_mode="raw_logprobs",
        max_model_len=max(map(len, asked["prompts"])) + 8,
        gpu_memory_utilization=0.5,
        **options,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, logprobs=asked["most"])
    lora = LoRARequest("audited", 1, asked["adapter"]) if asked["adapter"] else None
    prompts = [
        {"prompt_token_ids": ids[:stop]}
        for ids in asked["prompts"]
        for stop in range(max(len(ids) - asked["positions"], 0) + 1, len(ids) + 1)
    ]
    rows = []
    for own in llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False):
        # the token that was chosen may be listed beside the largest ones
        best = sorted(own.outputs[0].logprobs[0].items(), key=lambda pair: -pair[1].logprob)[: asked["most"]]
        rows.append([(token, told.logprob) for token, told in best])
    numpy.savez(
        answer,
        indices=numpy.array([[token for token, _ in row] for row in rows], dtype=numpy.int64),
        values=numpy.array([[value for _, value in row] for row in rows], dtype=numpy.float64),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
