"""Tiny language models that read pictures too, with random weights and processors built by hand."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
# SmolVLM's form: contents are lists of parts alone
PARTS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Gemma 3's form: texts or lists of parts
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = TURNS.replace("<start_of_image>", "<image>")


def tokenizer(specials: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with newlines that join and some special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = next(letter for letter in letters if letter == "\u010a")
    joined = [newline * 2, newline * 3]
    vocabulary = {token: number for number, token in enumerate([*letters, *joined])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline), (newline * 2, newline)]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokens = ["<bos>", "<eos>", "<pad>", *specials]
    made.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=template,
        extra_special_tokens=named or None,
        model_max_length=2048,
    )


def idefics3(layers: int = 2) -> tuple[Any, Any]:
    """Return a model and its processor; a picture is one whole and four parts, of four tokens each."""
    tokens = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    named = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|im_start|>"]
    words = tokenizer([*named, *tokens], PARTS)
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(pictures, words, image_seq_len=4, chat_template=PARTS)
    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
        vision_config=VISION,
        text_config={"model_type": "llama", **TEXT, "num_hidden_layers": layers, "vocab_size": len(words)},
    )
    return Idefics3ForConditionalGeneration(config).eval(), processor


def llava() -> tuple[Any, Any]:
    """Return a model and its processor; a picture is 16 tokens."""
    words = tokenizer(["<image>", "<start_of_turn>", "<end_of_turn>"], PLAIN)
    pictures = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, vocab_size=len(words)),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def gemma3() -> tuple[Any, Any]:
    """Return a model and its processor; a picture is 4 tokens between marks and line ends."""
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer([*marks.values(), "<start_of_turn>", "<end_of_turn>"], TURNS, **marks)
    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(pictures, words, chat_template=TURNS, image_seq_length=4)
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, head_dim=8, vocab_size=len(words)),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # begins at zero
    return model, processor


FAMILIES = {"idefics3": idefics3, "llava": llava, "gemma3": gemma3}


def saved(folder: Path, name: str) -> Path:
    """Write a model and its processor as a hub clone has them."""
    model, processor = FAMILIES[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Any:
    """Return a picture of Pillow that is not of one colour alone."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).rectangle((5, 5, 20, 20), fill="white")
    return image
