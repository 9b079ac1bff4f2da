"""Models with random weights in real shapes, and runs on them: what the parts of gpu.py measure."""

from pathlib import Path
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {  # of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B
    "tiny": (32, 48, 2, 4, 2, 64),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
RAGGED = (90, 60, 120, 40, 200, 80, 70, 150)  # tokens of the rows that are compared
TIED = ("tiny", "135m", "1b")
WORDS = "the a film time people way day man woman life world good bad user assistant"
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def language_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of a shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = LlamaConfig(
        **sizes,
        tie_word_embeddings=shape in TIED,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokenizer() -> Any:
    """Whole words, with a chat template; </s> ends a text and pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *WORDS.split()]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def ragged(model: Any, tiny: bool) -> list[Any]:
    """Rows of mixed length, with loss on the second half of each."""
    from loralab.tasks.examples import IGNORED, Example

    draw = torch.Generator().manual_seed(1)
    size, rows = min(model.config.vocab_size, 1000), []
    for number, length in enumerate(n // 8 if tiny else n for n in RAGGED):
        ids = tuple(torch.randint(3, size, (length,), generator=draw).tolist())
        labels = tuple(IGNORED if i < length // 2 else token for i, token in enumerate(ids))
        rows.append(Example(number, ids, labels))
    return rows


@torch.no_grad()
def fill(adapter: Any) -> None:
    """Small random numbers for everything that is trained, so that no gradient is zero."""
    draw = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=draw) * 0.02
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def biased(model: Any) -> Any:
    """The model with biases on its linear layers, which BitFit trains."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return model


def trained(shape: str, config: Any, data: Path, folder: Path, listener: Any, training: Any) -> Any:
    """A run of loralab on a model with random weights, in few bits where the training says so."""
    from loralab.models.device import device_here
    from loralab.models.load import Base
    from loralab.models.quantize import quantize
    from loralab.training.preflight import prepare
    from loralab.training.request import Request
    from loralab.training.run import run_prepared

    request = Request.of(shape, str(data), config, training, None)
    dtype = PRECISIONS[request.training.precision]

    def load(request: Request, task: Any) -> Base:
        model = language_model(shape, dtype, device_here())
        model = biased(model) if shape == "tiny" else model
        if training.quantize != "none":
            quantize(model, training.quantize, shape)
        return Base(
            name=shape, model=model.to(device_here(), dtype), tokenizer=tokenizer(), kind="causal-lm", source=shape
        )

    folder.mkdir(parents=True)
    return run_prepared(request, prepare(request, load), folder, listener)
