"""Small files that stand for large things: refused before they are unpacked, built or run."""

import contextlib
import gzip
import json
import os
import random
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from hostile.trial import Reader, trial
from pyarrow import parquet
from tiny import fill, gpt2

from loralab.adapters import expressions, folder
from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.assets import fashion
from loralab.errors import AdapterFileError, ConfigError, DataError, LoralabError, ModelError, one_line
from loralab.models import load as models
from loralab.serving.adapters.store import Store
from loralab.tasks import catalog
from loralab.tasks.pictures import from_file
from loralab.tasks.template import render
from loralab.values import read_bytes, read_json, read_toml


def refused(path: Path, make: Any, read: Any, room: int = 256 << 20) -> str:
    """Return what a reader says of a file, in a process that notes its memory."""

    def reading(place: Path) -> None:
        try:
            read(place / path.name)
        except LoralabError as error:
            (place.parent / "said").write_text(str(error), encoding="utf-8")
            raise

    reader = Reader(
        name="bomb",
        make=lambda place: (place / "x").touch(),
        damage=lambda place, draw: make(place / path.name),
        read=lambda at: reading(at) if at.name == "work" else None,
    )
    outcome = trial(reader, path.parent, 1, 0)
    assert (outcome.failures, outcome.errors) == ([], 1)
    assert outcome.peak < room
    return (path.parent / "said").read_text(encoding="utf-8")


def test_a_picture_of_gigabytes_is_not_decoded(tmp_path: Path) -> None:
    def make(file: Path) -> None:
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(10**6))),
            (b"IEND", b""),
        ]
        packed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))

    said = refused(tmp_path / "x.png", make, from_file)
    assert "12000 x 12000 pixels" in said


def test_a_format_that_runs_a_program_is_no_picture(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n%%EOF\n")
    with pytest.raises(DataError) as error:
        from_file(file)
    assert (error.value.code, error.value.field) == ("not_a_picture", "image")


def test_a_run_of_equal_rows_ends_at_a_multiple_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.tasks.parquet.MIN_PLAIN_BYTES", 64 << 20)

    def make(file: Path) -> None:
        text = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 40_000, type=pyarrow.int32()), pyarrow.array(["x" * 20_000])
        )
        table = pyarrow.table({"text": text})
        parquet.write_table(table, file, compression="zstd", store_schema=False)
        assert file.stat().st_size < 10**5

    said = refused(tmp_path / "x.parquet", make, lambda f: catalog.find(str(f)), 2 << 30)
    assert "would fill more than" in said


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    def make(file: Path) -> None:
        with gzip.open(file, "wb", compresslevel=1) as packed:
            for _ in range(64):
                packed.write(bytes(1 << 20))

    refused(tmp_path / "train-labels-idx1-ubyte.gz", make, fashion.read_idx)


def test_a_header_of_terabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for length in (2**63, 2**40, 10**8):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(AdapterFileError) as error:
            folder.read_tensors(file)
        assert (error.value.code, error.value.field) == ("damaged", "path")
    with file.open("wb") as handle:
        handle.truncate(1 << 43)  # a file of holes
    with pytest.raises(AdapterFileError) as error:
        folder.read_tensors(file)
    assert error.value.code == "too_large"


@pytest.mark.parametrize("count", [2**60, 2**31, 10**7])
def test_the_counts_of_a_gguf_are_not_believed(count: int, tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    file = tmp_path / "x.gguf"
    file.write_bytes(head + struct.pack("<IIQ", 9, 0, count) + bytes(100))
    started = time.process_time()
    with pytest.raises(ModelError) as error:
        models.load(str(file))
    assert (error.value.code, error.value.field) == ("damaged", "model")
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, count) + bytes(100))
    with pytest.raises(ModelError) as error:
        models.load(str(file))
    assert (error.value.code, error.value.field) == ("damaged", "model")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("num_hidden_layers", 10**9, "implausible_size"),
        ("num_labels", 10**9, "implausible_size"),
        ("vocab_size", 10**7, "implausible_size"),
        ("intermediate_size", 10**7, "implausible_size"),
        ("attn_implementation", "evil/kernel", "foreign_code"),
    ],
)
def test_a_model_is_not_built_for_a_number_in_a_text(
    field: str, value: Any, code: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "m"
    place.mkdir()
    for file in tiny_llama_folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelError) as error:
        models.load(str(place))
    assert error.value.code == code


def test_code_that_comes_with_a_model_is_not_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    place, mark = tmp_path / "m", tmp_path / "was-here"
    place.mkdir()
    for file in tiny_llama_folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    own = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X", "AutoTokenizer": "evil.X"}
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**fields, "auto_map": own}))
    for kind in ("llama", "unheard-of"):
        fields = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**fields, "model_type": kind}))
        with contextlib.suppress(ModelError):
            models.load(str(place))
    assert not mark.exists()
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../x"}}')
    with pytest.raises(ModelError) as error:
        models.load(str(place))
    assert (error.value.code, error.value.field) == ("outside_folder", "model")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    fill(attach(gpt2(), LoRA(target_modules=["c_attn"]))).save(tmp_path / "a")
    file = tmp_path / "a" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(AdapterFileError):
        load(gpt2(), tmp_path / "a")
    with pytest.raises(DataError) as error:
        read_bytes(Path("/dev/zero"), DataError)
    assert error.value.code == "cannot_read"


def test_a_store_lists_nothing_outside_of_it(tmp_path: Path) -> None:
    fill(attach(gpt2(), LoRA(target_modules=["c_attn"]))).save(tmp_path / "elsewhere" / "a")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere" / "a")
    names = {"format": 1, "names": {"up": "../elsewhere/a", "abs": str(tmp_path / "elsewhere/a")}}
    (root / "names.json").write_text(json.dumps({**names, "removed": []}))
    assert Store(root, lambda stored: stored).entries() == []


SLOW = (
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    ".*.*.*.*.*.*.*.*.*.*x",
    "(a?){40}a{40}",
    "([a-z]+)*!",
    "(x+x+)+y",
    "(.|.)*(.|.)*z",
)


@pytest.mark.parametrize("pattern", SLOW)
def test_no_expression_takes_for_ever(pattern: str) -> None:
    started = time.process_time()
    try:
        assert not expressions.matches(pattern, "a" * 30 + "." + "x" * 60 + "-")
    except ConfigError as error:
        assert error.code == "expression_too_slow"
    assert time.process_time() - started < 2


def test_slow_expressions_match_what_python_says() -> None:
    import re

    draw = random.Random(0)
    pieces = [
        "a",
        "b",
        ".",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        "(a|b)",
        "(?:ab|a)",
        "^",
        "$",
        r"\b",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
        "(?<!b)",
    ]
    repeats = ["", "", "*", "+", "?", "{2}", "{1,3}", "*?"]
    compared = 0
    for _ in range(400):
        inner = "".join(draw.choice(pieces) + draw.choice(repeats) for _ in range(3))
        pattern = f"({inner})*{draw.choice(pieces)}"
        text = "".join(draw.choices("ab1.", k=draw.randint(0, 6)))
        try:
            expected = re.fullmatch(pattern, text) is not None
        except re.error:
            continue
        assert expressions.matches(pattern, text) == expected, (pattern, text)
        compared += 1
    assert compared > 200
    many = ("((a{1000}){1000}){1000}", "(a{9999}){9999}", "a{1,60000}" * 20)
    for wrong in ("(", "a{99999999999}", "(" * 5000, "x" * 10**6, "(?:ab){e<=1}", *many):
        with pytest.raises(ConfigError):
            expressions.check_expression(wrong)


CHAT = [{"role": "user", "content": "say\nyes"}, {"role": "assistant", "content": "yes"}]
BOMBS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ ('a' * 99999)|replace('a', 'a' * 99999) }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ 99999**99999 }}",
)


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_asks_for_too_much_is_stopped(template: str) -> None:
    started = time.process_time()
    with pytest.raises(Exception, match=r"more than|too wide|above|unsafe"):
        render(template, CHAT, prompt=True, tokens={})
    assert time.process_time() - started < 5


FAIR = (
    "{% for m in messages %}{{ loop.index0 ~ m['role'] + m.content|trim }}{% if not loop.last %}, "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
    "{% set n = namespace(k=0) %}{% for m in messages if m.role == 'user' %}{% set n.k = n.k + 1 %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ n.k }}{{ messages|tojson }}",
    "{% macro x(m) %}[{{ m.role|upper }}]{% endmacro %}{{ messages|map(attribute='role')|join(' ') "
    "}}{{ x(messages[0]) }}{{ '%s-%d' % ('a', 3) }}{{ 'x{}'.format(2) }}{{ 'ab' * 2 }}"
    "{{ messages[1:]|length }}{{ {'a': [1, (2,)]}|tojson(indent=2) }}{{ tools is none }}",
)


@pytest.mark.parametrize("template", FAIR)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_fair_template_is_rendered_as_transformers_does(template: str, prompt: bool, tiny_llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=prompt, tokenize=False)
    tokens = tokenizer.special_tokens_map
    assert render(template, CHAT, prompt=prompt, tokens=tokens) == theirs


def test_settings_are_neither_deep_nor_endless(tmp_path: Path) -> None:
    for text in ('{"a": ' + "[" * 70 + "]" * 70 + "}", "[" * 10**5, '{"a": "\\ud83d"}', "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ConfigError) as error:
            read_json(tmp_path / "x.json", ConfigError)
        assert "x.json" in str(error.value)
    for text in ("a = " + "[" * 10**4, "a." * 10**5 + "a = 1", f"a = {10**30}", "a = 1\0"):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(ConfigError) as error:
            read_toml(tmp_path / "x.toml")
        assert "x.toml" in str(error.value)


def test_a_message_is_one_short_line_whatever_it_quotes() -> None:
    said = str(ConfigError("a\nb\x1b[31m\ud83d\u2028" + "x" * 10**6))
    assert said.isprintable() and len(said) < 2200 and said.startswith(r"a\x0ab\x1b[31m\ud83d\u2028")
    assert one_line("中文 é") == "中文 é"


def test_many_columns_are_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a," * 500_000 + "\n")
    started = time.process_time()
    with pytest.raises(DataError) as error:
        catalog.find(str(file))
    assert error.value.code == "too_many_columns"
    assert time.process_time() - started < 5


def test_nothing_here_reads_a_pickle(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(AdapterFileError) as error:
        folder.read_tensors(tmp_path / "state.safetensors")
    assert (error.value.code, error.value.field) == ("damaged", "path")
