"""What llama.cpp itself computes with adapter.gguf, beside our own model."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.artefacts.export import export
from loralab.models.catalog import MODELS
from loralab.models.load import load

LLAMA = os.environ.get("LORALAB_LLAMA_PYTHON", "")
TEXTS = ("The capital of France is", "Once upon a time there was a", "def add(a, b):\n    return")
UNEVEN = LoRA(rank=8, rank_pattern={"v_proj": 4, "down_proj": 3}, alpha_pattern={r"layers\.3\.self_attn\.q_proj": 7})
NEW = 24
# llama.cpp rounds to half precision in places: its base alone differs by up to 9e-3 from ours, and
# rows of B that are not moved make 0.1
NOISE = 0.02
# {"model", "adapter", "prompts", "new"} on standard input -> for each prompt the tokens that are
# written and the twenty largest log-probabilities of the first
ASK = """
import json, sys, urllib.request, xllamacpp
asked = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = asked["model"], 512, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if asked["adapter"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapter"], 1.0)]
server, found = xllamacpp.Server(params), []
for ids in asked["prompts"]:
    body = {"prompt": ids, "n_predict": asked["new"], "temperature": 0, "n_probs": 20,
            "cache_prompt": False}
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    told = json.load(urllib.request.urlopen(request))["completion_probabilities"]
    first = {token["id"]: token["logprob"] for token in told[0]["top_logprobs"]}
    found.append([[token["id"] for token in told], first])
with open(asked["answer"], "w") as file:
    json.dump(found, file)
"""


def unpacked(file: Path, to: Path) -> Path:
    """The same model with all weights in fp32: llama.cpp rounds activations where they are not."""
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(to, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def theirs(model: Path, adapter: Path | None, prompts: list[list[int]], answer: Path) -> Any:
    asked = {"model": str(model), "adapter": str(adapter or ""), "prompts": prompts, "new": NEW, "answer": str(answer)}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [LLAMA, "-c", ASK], input=json.dumps(asked), text=True, check=True, env=environment, capture_output=True
    )
    return json.loads(answer.read_text())


@torch.no_grad()
def ours(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    found = []
    for prompt in prompts:
        ids, first = list(prompt), torch.empty(0)
        for step in range(NEW):
            logits = model(torch.tensor([ids])).logits[0, -1]
            first = first if step else logits.log_softmax(-1)
            ids.append(int(logits.argmax()))
        found.append((ids[len(prompt) :], first))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA, reason="LORALAB_LLAMA_PYTHON names no Python that has xllamacpp")
def test_llama_cpp_computes_what_our_model_does(tmp_path: Path) -> None:
    packaged = MODELS["smollm2-135m"].locate()
    assert packaged is not None
    file, base = unpacked(packaged, tmp_path / "base.gguf"), load("smollm2-135m")
    prompts = [base.tokenizer(text)["input_ids"] for text in TEXTS]
    adapter = attach(base.model, UNEVEN, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    adapter.save(tmp_path / "adapter", {"base": {"name": base.name, "kind": base.kind}})
    assert export(tmp_path / "adapter", tmp_path / "out", to="gguf").passed
    with_it = ours(base.model, prompts)
    adapter.detach()
    without = ours(base.model, prompts)
    for written, expected, other in ((None, without, with_it), (tmp_path / "out" / "adapter.gguf", with_it, without)):
        found = theirs(file, written, prompts, tmp_path / "answer.json")
        for (tokens, first), (own, values), (_, wrong) in zip(found, expected, other, strict=True):
            places = torch.tensor([int(token) for token in first])
            told = torch.tensor(list(first.values()))
            assert (told - values[places]).abs().max() < NOISE
            assert (told - wrong[places]).abs().max() > 0.1
            assert tokens == own
