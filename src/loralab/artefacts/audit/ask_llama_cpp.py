"""Ask llama.cpp, with the Python that has it: ask_llama_cpp.py REQUEST ANSWER. Imports nothing of loralab.

REQUEST is JSON: model and adapter (GGUF files; the adapter may be null), prompts, positions, most.
ANSWER becomes npz: values and indices (P, K). Through llama_cpp (llama-cpp-python), else xllamacpp.
"""

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy

Rows = list[list[tuple[int, float]]]


def by_bindings(asked: dict[str, Any]) -> Rows:
    """Return rows of (token, log-probability), through llama_cpp."""
    import llama_cpp

    llm = llama_cpp.Llama(
        asked["model"],
        lora_path=asked["adapter"],
        n_ctx=max(map(len, asked["prompts"])) + 8,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    rows = []
    for ids in asked["prompts"]:
        llm.reset()
        llm.eval(ids)
        logits = numpy.array(llm.scores[: len(ids)], dtype=numpy.float64)[-asked["positions"] :]
        for own in logits:
            told = own - own.max()
            told -= numpy.log(numpy.exp(told).sum())
            best = numpy.argsort(-told)[: asked["most"]]
            rows.append([(int(token), float(told[token])) for token in best])
    return rows


def by_server(asked: dict[str, Any]) -> Rows:
    """Return the same through xllamacpp's server, which tells the token after a prompt alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = asked["model"], 512, 1
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if asked["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapter"], 1.0)]
    server, rows = xllamacpp.Server(params), []
    for ids in asked["prompts"]:
        for length in range(max(len(ids) - asked["positions"], 0) + 1, len(ids) + 1):
            body = {
                "prompt": ids[:length],
                "n_predict": 1,
                "temperature": 0,
                "n_probs": asked["most"],
                "cache_prompt": True,
            }
            request = urllib.request.Request(
                server.listening_address + "/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            told = json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]
            rows.append([(token["id"], token["logprob"]) for token in told])
    return rows


def main(request: str, answer: str) -> None:
    """Compute and write."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    rows = by_bindings(asked) if importlib.util.find_spec("llama_cpp") else by_server(asked)
    width = min(map(len, rows))
    numpy.savez(
        answer,
        indices=numpy.array([[token for token, _ in row[:width]] for row in rows], dtype=numpy.int64),
        values=numpy.array([[value for _, value in row[:width]] for row in rows], dtype=numpy.float64),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
