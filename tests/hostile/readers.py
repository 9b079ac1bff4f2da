"""Every reader of files that users give, with something whole for it to read."""

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import pyarrow
import tomli_w
import torch
from contract_variants import VARIANTS
from hostile import mutate
from hostile.trial import Reader
from PIL import Image
from pyarrow import parquet
from tiny import fill, gpt2, llama

from loralab.adapters import folder, spectrum
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.artefacts.comparison import Reference
from loralab.assets import fashion
from loralab.cli.arguments import field_names, requested
from loralab.cli.jobs import _jobs
from loralab.models import load as models
from loralab.models.pictures import Pictures
from loralab.serving.adapters.files import read_metadata
from loralab.serving.adapters.info import describe
from loralab.serving.adapters.names import Names, write_names
from loralab.serving.adapters.store import Store
from loralab.serving.http import keys
from loralab.studies import report, store
from loralab.studies.fields import from_toml
from loralab.studies.search import walk
from loralab.studies.study import Arm, Record, StudySetup, Trial
from loralab.tasks import catalog
from loralab.tasks.encode import chat_ids
from loralab.tasks.pictures import from_file
from loralab.training import checkpoint
from loralab.training.record import read_metrics
from loralab.training.world import World

Change = Callable[[bytes, random.Random], bytes]
ROWS: dict[str, list[dict[str, Any]]] = {
    "labels": [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(12)],
    "chats": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(12)
    ],
    "tags": [{"tokens": ["a", str(n)], "tags": ["O", "X"]} for n in range(12)],
    "shared": [
        {
            "id": n,
            "system": None,
            "conversations": [
                {"from": "human", "value": f"say {n}", "weight": 0},
                {"from": "gpt", "value": "yes", "weight": 1},
            ],
        }
        for n in range(12)
    ],
    "parts": [
        {
            "text": f"text {n}",
            "source": "x",
            "weight": 1.0,
            "label": float(n % 2),
            "split": "train" if n % 4 else "test",
        }
        for n in range(12)
    ],
}


def changed(place: Path, draw: random.Random, **changes: Change) -> None:
    """One of some files of a folder, by their stems, damaged."""
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.stem.split("-")[0] in changes)
    file = draw.choice(files)
    file.write_bytes(changes[file.stem.split("-")[0]](file.read_bytes(), draw))


# -- adapters -----------------------------------------------------------------------------------


def make_adapter(name: str, place: Path) -> None:
    """An adapter of a method, with a record."""
    config = VARIANTS[name]
    record = {
        "base": {"name": "x", "kind": "causal-lm", "precision": "fp32", "quantize": "none"},
        "task": {"name": "t", "format": "text-label", "labels": ["a", "b"]},
        "tokenizer": {"new_tokens": [], "stop_ids": [2]},
        "training": {"seed": 1},
        "metrics": {"validation": {"accuracy": 0.5}},
        "sample": [[1, 2, 3]],
    }
    fill(attach(gpt2(), config)).save(place, record)


def damage_adapter(place: Path, draw: random.Random) -> None:
    """One of its files; mostly with a digest that fits, as an attacker would see to."""
    changed(place, draw, adapter_config=mutate.some_json, loralab=mutate.some_json, adapter_model=mutate.some_tensors)
    if draw.random() < 0.8:
        try:
            record = json.loads((place / folder.RECORD).read_bytes())
            fields = folder.read_json(place / folder.CONFIG)
            digest = folder.content_digest(fields, folder.read_tensors(place / folder.TENSORS))
            content = json.dumps({**record, "digest": digest})
        except (ValueError, RecursionError, TypeError):
            return
        (place / folder.RECORD).write_text(content, encoding="utf-8")


def read_adapter(place: Path) -> None:
    """As `load`, `inspect` and a store read it."""
    spectrum.describe(place)
    seen = read_metadata(place.parent, place)
    describe("x", place, seen.fields, seen.record, seen.size)
    model = gpt2()
    load(model, place).detach()


# -- runs ---------------------------------------------------------------------------------------


def begun() -> checkpoint.Trained:
    """A run after one step."""
    adapter: Adapter = fill(attach(gpt2(), LoRA(rank=2, target_modules=["c_attn"])))
    trained = checkpoint.Trained(
        adapter=adapter,
        optimizer=torch.optim.AdamW(adapter.parameters()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    step(trained)
    return trained


def step(trained: checkpoint.Trained) -> None:
    """One more."""
    for parameter in trained.adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    trained.optimizer.step()


def make_checkpoint(place: Path) -> None:
    """Step 1."""
    checkpoint.write(place, begun(), checkpoint.Progress(step=1, best_step=1), World())


def read_checkpoint(place: Path) -> None:
    """As `--resume` reads it; then one more step."""
    path = checkpoint.latest(place)
    assert path is not None
    trained = begun()
    checkpoint.restore(path, trained, World())
    checkpoint.restore_weights(path, trained.adapter)
    checkpoint.last_common_steps({place: 2})
    step(trained)


def make_metrics(place: Path) -> None:
    """Twenty steps."""
    lines = [json.dumps({"kind": "step", "step": n, "loss": 1.0}) for n in range(20)]
    (place / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def make_reference(place: Path) -> None:
    """Logits of two prompts."""
    values = torch.randn(2, 5)
    Reference(
        prompts=[[1, 2], [3]],
        values=values,
        indices=torch.arange(5).expand(2, 5).contiguous(),
        total=values.logsumexp(1).double(),
    ).save(place / "certificate.safetensors")


# -- settings -----------------------------------------------------------------------------------


def write_toml(name: str, content: dict[str, Any], place: Path) -> None:
    """One file of settings."""
    (place / name).write_text(tomli_w.dumps(content), encoding="utf-8")


CONFIG = {
    "model": "x",
    "data": "y",
    "method": "lora",
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.1,
    "target_modules": ["q_proj"],
    "max_steps": 5,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "seed": 1,
    "map": {"text": "a"},
    "layers": [0, 1],
    "rank_pattern": {"q_proj": 2},
    "init": "kaiming",
    "warmup": 0.1,
    "batch_size": 4,
    "new_tokens": ["<a>"],
}
JOBS = {
    "output_dir": "out",
    "model": "x",
    "job": [{"name": "a", "data": "y", "rank": 4}, {"name": "b", "data": "z", "method": "ia3"}],
}
KEYS = {
    "key": [
        {
            "name": "ci",
            "sha256": "9f" * 32,
            "adapters": ["a"],
            "base": True,
            "admin": False,
            "requests_per_minute": 60,
            "tokens_per_day": 1000,
        },
        {"name": "me", "key": "a key of many letters"},
    ]
}


def read_config(place: Path) -> None:
    """As `train --config` reads it."""
    fields = {"model", "data", "method", "map", "output_dir", *field_names()}
    requested(from_toml(place / "config.toml", fields), place / "config.toml")


def make_store(place: Path) -> None:
    """Two adapters, one of which has moved."""
    for name in ("one", "two"):
        fill(attach(gpt2(), LoRA(rank=1, target_modules=["c_attn"]))).save(place / name)
    write_names(place, Names(moved={"other": "two"}, removed=frozenset({"one"})))


def read_store(place: Path) -> None:
    """As `serve --store` opens it; every adapter that it lists lies in it."""
    found = Store(place, lambda stored: stored)
    for entry in found.entries():
        assert entry.path.resolve().is_relative_to(place.resolve())


# -- data ---------------------------------------------------------------------------------------


def make_rows(suffix: str, place: Path) -> None:
    """Rows of every kind that a format can hold."""
    for kind, rows in ROWS.items():
        file = place / f"{kind}{suffix}"
        if suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif suffix == ".json":
            file.write_text(json.dumps(rows), encoding="utf-8")
        elif suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif kind == "labels":
            mark = {".csv": ",", ".tsv": "\t"}.get(suffix)
            lines = [mark.join(row.values()) if mark else row["text"] for row in rows]
            head = [f"text{mark}label"] if mark else []
            file.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def damage_rows(change: Change, place: Path, draw: random.Random) -> None:
    """One of the files; the others go."""
    files = sorted(place.iterdir())
    chosen = draw.choice(files)
    for file in files:
        if file != chosen:
            file.unlink()
    chosen.write_bytes(change(chosen.read_bytes(), draw))


def read_rows(place: Path) -> None:
    """As `train --data` reads it."""
    for file in place.iterdir():
        catalog.find(str(file))


def make_pictures(place: Path) -> None:
    """One of every format."""
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    for suffix in ("png", "jpg", "webp", "bmp", "gif"):
        image.save(place / f"picture.{suffix}")


def read_picture(place: Path) -> None:
    """As a row names it, and as a batch needs it."""
    pictures = Pictures(size=32)
    for file in place.iterdir():
        pictures.pixels(from_file(file, "rows.csv, line 2").open())


def make_idx(place: Path) -> None:
    """A small gzipped file under the name of a known one."""
    data = bytes((0, 0, 8, 1, 0, 0, 0, 9)) + bytes(9)
    (place / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))


def read_idx(place: Path) -> None:
    """The labels."""
    data = bytes((0, 0, 8, 1, 0, 0, 0, 9)) + bytes(9)
    known = {"train-labels-idx1-ubyte.gz": hashlib.sha256(data).hexdigest()}
    with mock.patch.dict(fashion.DIGESTS, known):
        fashion.read_idx(place / "train-labels-idx1-ubyte.gz")


# -- models -------------------------------------------------------------------------------------


def copied(whole: Path, place: Path) -> None:
    """A model folder."""
    shutil.copytree(whole, place, dirs_exist_ok=True)


def damage_model(place: Path, draw: random.Random) -> None:
    """One of its files."""
    changed(
        place,
        draw,
        config=mutate.some_json,
        model=mutate.some_tensors,
        tokenizer=mutate.some_json,
        tokenizer_config=mutate.some_json,
        generation_config=mutate.some_json,
    )


def read_model(place: Path) -> None:
    """As every command loads it, with a question put to it."""
    base = models.load(str(place))
    chat_ids(base.tokenizer, "say yes")


def make_gguf(place: Path) -> None:
    """A tiny Llama with a tokenizer, in halves."""
    torch.manual_seed(0)
    model = llama()
    writer = gguf.GGUFWriter(place / "model.gguf", "llama")
    words = ["<unk>", "<s>", "</s>", "w", "1", "2", *(f"w{n}" for n in range(44))]
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            writer.add_tensor(f"blk.{parts[2]}.{inner[parts[-2]]}.weight", tensor.numpy())
        elif name in outer:
            writer.add_tensor(outer[name], tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_template(tokenizer: Any, place: Path) -> None:
    """A conversation in a chat template; the error names the template itself, not a file."""
    text = (place / "template.jinja").read_bytes().decode(errors="replace")
    tokenizer.chat_template = text
    try:
        chat_ids(tokenizer, "say yes", system="be good")
    except ValueError as error:
        raise type(error)(f"template.jinja: {error}") from None


# -- studies ------------------------------------------------------------------------------------


def make_study(place: Path) -> None:
    """A study of two ranks with its records."""
    ground = StudySetup(
        study="rank",
        model="x",
        data="y",
        seeds=2,
        fixed_lr=True,
        rates=(1.0,),
        fields={"max_steps": 5, "batch_size": 4},
        rows={"train": 8, "validation": 4, "test": 4},
        values=("1", "2"),
    )
    arms = [Arm(name=str(r), fields={"method": "lora", "rank": r}) for r in (1, 2)]
    store.add_plan(place, (ground, arms, {}))

    def planted(cell: Trial) -> Record:
        score = 0.5 + cell.seed / 10
        record = Record(
            arm=cell.arm,
            seed=cell.seed,
            rate=1e-3,
            texts={"metric": "accuracy"},
            numbers={
                "score": score,
                "parameters": 9.0,
                "step_seconds": 0.1,
                "peak_bytes": 1e9,
                "file_bytes": 1e5,
                "train_loss": 0.5,
                "validation_loss": 0.5,
                "test_loss": 0.5,
                "gap": 0.0,
            },
            items={"score": [score] * 4},
            series={"loss": [1.0, 0.5]},
        )
        store.write(store.place_of(place, cell), cell, record, 0.1)
        return record

    walk(ground, arms, planted)


def read_study(place: Path) -> None:
    """As `report` reads it."""
    report._sections(place)


def readers(model: Path, tokenizer: Any) -> list[Reader]:
    """All of them."""
    rows = {
        ".jsonl": mutate.some_lines,
        ".json": mutate.some_json,
        ".csv": mutate.some_table,
        ".tsv": mutate.some_table,
        ".txt": mutate.some_bytes,
        ".parquet": mutate.some_footer,
    }
    settings: list[tuple[str, dict[str, Any], Callable[[Path], Any]]] = [
        ("config", CONFIG, read_config),
        ("jobs", JOBS, lambda place: _jobs(place / "jobs.toml", None, {})),
        ("keys", KEYS, lambda place: keys.read(place / "keys.toml")),
    ]
    template = tokenizer.chat_template
    return [
        *(
            Reader(name=f"adapter {name}", make=partial(make_adapter, name), damage=damage_adapter, read=read_adapter)
            for name in VARIANTS
        ),
        Reader(
            name="checkpoint",
            make=make_checkpoint,
            read=read_checkpoint,
            damage=partial(changed, state=mutate.some_tensors, progress=mutate.some_json),
        ),
        Reader(
            name="metrics.jsonl",
            make=make_metrics,
            read=read_metrics,
            damage=partial(changed, metrics=mutate.some_lines),
        ),
        Reader(
            name="certificate.safetensors",
            make=make_reference,
            damage=partial(changed, certificate=mutate.some_tensors),
            read=lambda place: Reference.read(place / "certificate.safetensors"),
        ),
        *(
            Reader(
                name=f"{name}.toml",
                make=partial(write_toml, f"{name}.toml", content),
                damage=partial(changed, **{name: mutate.some_toml}),
                read=read,
            )
            for name, content, read in settings
        ),
        Reader(
            name="store",
            make=make_store,
            read=read_store,
            damage=partial(changed, names=mutate.some_json, adapter_config=mutate.some_json, loralab=mutate.some_json),
        ),
        *(
            Reader(name=suffix, make=partial(make_rows, suffix), read=read_rows, damage=partial(damage_rows, change))
            for suffix, change in rows.items()
        ),
        Reader(
            name="pictures", make=make_pictures, read=read_picture, damage=partial(damage_rows, mutate.some_picture)
        ),
        Reader(name="idx.gz", make=make_idx, read=read_idx, damage=partial(changed, train=mutate.some_bytes)),
        Reader(name="model folder", make=partial(copied, model), damage=damage_model, read=read_model),
        Reader(
            name="gguf",
            make=make_gguf,
            damage=partial(changed, model=mutate.some_head),
            read=lambda place: models.load(str(place / "model.gguf")),
        ),
        Reader(
            name="chat template",
            read=partial(read_template, tokenizer),
            make=lambda place: write_text(place / "template.jinja", template),
            damage=partial(changed, template=mutate.some_template),
        ),
        Reader(
            name="study",
            make=make_study,
            read=read_study,
            damage=partial(changed, study=mutate.some_toml, record=mutate.some_json),
        ),
    ]


def write_text(file: Path, text: str) -> None:
    """A file."""
    file.write_text(text, encoding="utf-8")
