"""Tokenizers of every family, tiny: how bytes, spaces and special tokens are written differs."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = ["the river and the stone", "a garden in the winter, music", "你好 世界 你好", "été naïve 😀"] * 20


def _fast(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **more
    )


def _trained(tokenizer: Tokenizer, trainer: Any, texts: list[str] = TEXTS) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(split: Any = None) -> PreTrainedTokenizerFast:
    """Every token is some bytes: GPT-2, SmolLM2, Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if split else plain
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    fast = _fast(_trained(tokenizer, trainer))
    fast.add_tokens(["<tool call>", "naïve"])  # no special ones, one with a space
    return fast


def digits() -> PreTrainedTokenizerFast:
    """As tiktoken's: cut by an expression of its own."""
    return byte_level(pre_tokenizers.Split(" ?[^ ]+", "isolated"))


def crossing() -> PreTrainedTokenizerFast:
    """Nothing is cut beforehand: a token may end one character and begin the next."""
    return byte_level(pre_tokenizers.Split("\n", "isolated"))


def sentencepiece(strip: bool = True) -> PreTrainedTokenizerFast:
    """Spaces are written as a character, unknown characters as bytes: Llama 2, Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prefix = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([*parts, *last])
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    _trained(tokenizer, trainer, TEXTS[:2])
    kept = json.loads(tokenizer.to_str())
    kept["added_tokens"] = kept["added_tokens"][: len(SPECIAL)]  # bytes are plain tokens there
    return _fast(Tokenizer.from_str(json.dumps(kept)))


def gemma() -> PreTrainedTokenizerFast:
    """Build the same without a space at the beginning."""
    return sentencepiece(strip=False)


def unigram() -> PreTrainedTokenizerFast:
    """Spaces as a character, no bytes: T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _fast(_trained(tokenizer, trainer))


def wordpiece() -> PreTrainedTokenizerFast:
    """Parts that go on are marked, beginnings are not: BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    return _fast(_trained(tokenizer, trainer))


def suffixed() -> PreTrainedTokenizerFast:
    """Build the first BPE, which marks the ends of words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    return _fast(_trained(tokenizer, trainer))


class OwnBytes:
    """A tokenizer in Python whose tokens are bytes, as Qwen's first was."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, token: int) -> bytes:
        return bytes([token])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 256


class Opaque(OwnBytes):
    """The same, and nothing tells that they are."""

    def convert_ids_to_tokens(self, token: int) -> str:  # type: ignore[override]
        return f"t{token}"


FAMILIES: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "tiktoken": digits,
    "crossing": crossing,
    "llama": sentencepiece,
    "gemma": gemma,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "suffixed": suffixed,
    "bytes": OwnBytes,
    "opaque": Opaque,
}
WRITES_EVERYTHING = ("byte level", "tiktoken", "crossing", "llama", "gemma", "bytes", "opaque")
