"""Vectors and scores over HTTP are those of transformers with the adapter alone, whoever shares the batch."""

import asyncio
import base64
import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import Saver
from hostile.test_openapi import require_described
from peft import LoraConfig, get_peft_model
from serving.conftest import write_adapter
from serving.http.test_clients import listening
from serving.talk import talk
from torch import Tensor
from transformers import AutoModel, BertConfig, BertForSequenceClassification

from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import IA3, LoRA
from loralab.models.load import Base, load
from loralab.serving.encoder_engine import EncoderEngine
from loralab.serving.http.app import build_app
from loralab.serving.opening import open_engine
from loralab.serving.settings import Limits, ServeSettings

TEXTS = ["good film", "bad", "a great awful film that is poor and fine", "fine fine fine", "film"]
NAMES = (None, "pairs", "classes", "theirs", "scaled")
HEAD = {"labels": ["bad", "good"], "format": "text-label"}


@dataclass
class Served:
    """A base with adapters for sentences and for classes, and its application."""

    engine: EncoderEngine
    folder: Path
    store: Path
    bases: dict[str, Base]

    @property
    def name(self) -> str:
        return self.folder.name

    def post(self, path: str, body: dict[str, Any], *, limits: Limits | None = None) -> httpx.Response:
        app = build_app(self.engine, keys=None, limits=limits)
        body = {"model": self.name, **body}
        found: httpx.Response = talk(app, lambda client: client.post(path, json=body))
        require_described("post", path, found)
        return found

    def refused(self, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        return error

    def vectors(self, name: str | None, texts: list[str]) -> Tensor:
        """Return the vectors of texts one by one, with the adapter alone: mean of the states, of length 1."""
        kind = "sequence-classification" if name == "classes" else "sentence-encoder"
        base = self.bases[kind]
        model = copy.deepcopy(base.model)
        if name is not None:
            load_adapter(model, self.store / name)
        body, found = model.eval().base_model, []
        for text in texts:
            with torch.no_grad():
                states = body(**base.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            found.append(states.mean(dim=0) / states.mean(dim=0).norm())
        return torch.stack(found)


def sentence_folder(folder: Path, place: Path, **files: Any) -> Path:
    """Copy a model, and add what sentence-transformers writes beside it."""
    shutil.copytree(folder, place)
    (place / "1_Pooling").mkdir()
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    listed = [
        {"idx": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    content = {
        "modules.json": listed,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 24},
        **files,
    }
    for name, own in content.items():
        (place / name).write_text(json.dumps(own))
    return place


def opened(folder: Path, store: Path) -> EncoderEngine:
    engine = open_engine(model=str(folder), store=store, settings=ServeSettings(precision="fp32", max_batch=4))
    assert isinstance(engine, EncoderEngine)
    return engine


@pytest.fixture(scope="module")
def served(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("sentences")
    folder = sentence_folder(tiny_bert_folder, place / "tiny-sentences")
    store = place / "store"
    kinds = ("sentence-encoder", "sequence-classification")
    bases = {kind: load(str(folder), kind=kind, labels=HEAD["labels"] if "class" in kind else ()) for kind in kinds}
    sentences, classes = bases.values()
    write_adapter(sentences.model, LoRA(rank=3), store / "pairs", 1, base={"kind": kinds[0]}, task={"format": "pair"})
    write_adapter(sentences.model, IA3(), store / "scaled", 2, base={"kind": kinds[0]}, task={"format": "pair"})
    write_adapter(classes.model, LoRA(rank=4, dora=True), store / "classes", 3, base={"kind": kinds[1]}, task=HEAD)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query", "value"])
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks by an old name
        theirs = get_peft_model(AutoModel.from_pretrained(folder, add_pooling_layer=False), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(str(store / "theirs"))
    engine = opened(folder, store)
    assert engine.store.refused == {}
    engine.start()
    yield Served(engine, folder, store, bases)
    engine.stop(drain=False)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_the_adapter_alone(name: str | None, served: Served) -> None:
    response = served.post("/v1/embeddings", {"model": name or served.name, "input": TEXTS})
    body = response.json()
    assert response.status_code == 200, body
    found = torch.tensor([one["embedding"] for one in body["data"]])
    assert torch.allclose(found, served.vectors(name, TEXTS), atol=1e-5)
    assert [one["index"] for one in body["data"]] == list(range(len(TEXTS)))
    tokens = sum(len(ids) for ids in served.bases["sentence-encoder"].tokenizer(TEXTS)["input_ids"])
    assert body["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert (body["adapter"] or {}).get("digest") == response.headers.get("x-loralab-digest")
    others = served.vectors(None, TEXTS)
    assert name is None or not torch.allclose(found, others, atol=1e-3)  # else it would have no part in it


def test_adapters_share_a_batch(served: Served) -> None:
    futures = {name: served.engine.embed(TEXTS, adapter=name) for name in NAMES}
    labelled = served.engine.classify(TEXTS, adapter="classes")
    for name, future in futures.items():
        assert torch.allclose(torch.tensor(future.result(20).vectors), served.vectors(name, TEXTS), atol=1e-5)
    assert len(labelled.result(20)) == len(TEXTS)
    seen: list[int] = []
    outputs = served.engine._runner.outputs
    served.engine.stop()
    served.engine._closing = False
    served.engine._runner.outputs = lambda inputs: (seen.append(len({own[0] for own in inputs})), outputs(inputs))[1]
    futures = {name: served.engine.embed(["film"], adapter=name) for name in NAMES[:4]}
    served.engine.run_until_idle()
    served.engine._runner.outputs = outputs
    served.engine.start()
    assert seen == [4]  # the base and three adapters, in one pass
    for name, future in futures.items():
        assert torch.allclose(torch.tensor(future.result().vectors), served.vectors(name, ["film"]), atol=1e-5)


@pytest.mark.parametrize(("model", "name"), [("pairs:1", "pairs"), ("pairs+theirs:0", "pairs"), ("theirs:0", None)])
def test_sums_of_adapters_have_vectors_too(model: str, name: str | None, served: Served) -> None:
    body = served.post("/v1/embeddings", {"model": model, "input": TEXTS}).json()
    found = torch.tensor([one["embedding"] for one in body["data"]])
    assert torch.allclose(found, served.vectors(name, TEXTS), atol=1e-5)
    assert len(body["adapter"]["parts"]) == 1 + model.count("+")


def test_the_openai_client_gets_them_unchanged(served: Served) -> None:
    engine = opened(served.folder, served.store)
    with listening(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        found = client.embeddings.create(model="pairs", input=TEXTS)  # the client asks for base64
        vectors = torch.tensor([one.embedding for one in found.data])
        assert torch.allclose(vectors, served.vectors("pairs", TEXTS), atol=1e-5)
        one = client.embeddings.create(model=served.name, input="film", encoding_format="float").data[0].embedding
        assert torch.allclose(torch.tensor(one), served.vectors(None, ["film"])[0], atol=1e-5)
        assert found.usage.total_tokens == found.usage.prompt_tokens > 0
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nobody", input="film")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="pairs", messages=[{"role": "user", "content": "film"}])

        async def at_once() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as several:
                names = [name or served.name for name in NAMES] * 3
                return await asyncio.gather(*(several.embeddings.create(model=n, input=TEXTS) for n in names))

        for answer, name in zip(asyncio.run(at_once()), NAMES * 3, strict=True):
            own = torch.tensor([one.embedding for one in answer.data])
            assert torch.allclose(own, served.vectors(name, TEXTS), atol=1e-5)


def test_base64_is_little_endian_fp32(served: Served) -> None:
    data = served.post("/v1/embeddings", {"input": "film", "encoding_format": "base64"}).json()["data"]
    found = np.frombuffer(base64.b64decode(data[0]["embedding"]), dtype="<f4")
    assert np.allclose(found, served.vectors(None, ["film"])[0].numpy(), atol=1e-5)


def test_token_ids_are_taken_as_they_are(served: Served) -> None:
    ids = served.bases["sentence-encoder"].tokenizer(TEXTS[:2])["input_ids"]
    expected = served.vectors(None, TEXTS[:2])
    for given, rows in ((ids[0], expected[:1]), (ids, expected)):
        data = served.post("/v1/embeddings", {"input": given}).json()["data"]
        assert torch.allclose(torch.tensor([one["embedding"] for one in data]), rows, atol=1e-5)


def test_a_long_text_is_cut_only_where_that_is_asked_for(served: Served) -> None:
    long = "good film " * 40
    error = served.refused("/v1/embeddings", {"input": ["film", long]})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    tokenizer = served.bases["sentence-encoder"].tokenizer
    for asked, length in ((-1, 24), (6, 6)):
        body = served.post("/v1/embeddings", {"input": long, "truncate_prompt_tokens": asked}).json()
        ids = tokenizer(long, truncation=True, max_length=length)["input_ids"]
        again = served.post("/v1/embeddings", {"input": ids}).json()
        assert body["usage"]["prompt_tokens"] == length
        assert body["data"] == again["data"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["film", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": {"image": "x"}}, "input"),
        ({"input": "film", "dimensions": 16}, "dimensions"),
        ({"input": "film", "dimensions": 0}, "dimensions"),
        ({"input": "film", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "film", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "film", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "film", "normalize": False}, "normalize"),
        ({"input": "x" * 10**5}, "input"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], param: str, served: Served) -> None:
    assert served.refused("/v1/embeddings", body)["param"] == param
    assert served.post("/v1/embeddings", {"input": "film", "dimensions": 32}).status_code == 200


def test_too_many_inputs_and_unknown_models(served: Served) -> None:
    response = served.post("/v1/embeddings", {"input": ["film"] * 4}, limits=Limits(texts=3))
    assert response.status_code == 400
    for count, status in ((3, 200), (4, 400)):  # pairs, and not texts
        found = served.post("/v1/score", {"text_1": "film", "text_2": ["good"] * count}, limits=Limits(texts=3))
        assert found.status_code == status
    assert "got 4" in found.json()["error"]["message"]
    assert served.refused("/v1/embeddings", {"model": "pair", "input": "film"}, 404)["code"] == "model_not_found"


def test_what_has_been_read_neither_runs_nor_waits(served: Served) -> None:
    engine = open_engine(model=str(served.folder), store=served.store, settings=ServeSettings(max_batch=4))
    waiting = engine.embed(["film"] * 7, adapter=None)
    engine.step()
    assert (engine.running, engine.waiting) == (3, 0)
    engine.step()
    assert (engine.running, engine.waiting) == (0, 0)
    assert len(waiting.result().vectors) == 7


def test_models_say_what_they_can(served: Served) -> None:
    app = build_app(served.engine, keys=None)
    data = talk(app, lambda client: client.get("/v1/models")).json()["data"]
    able = {one["id"]: one["capabilities"] for one in data}
    vectors = ["embeddings", "score", "rerank"]
    assert able == {
        served.name: vectors,
        "classes": ["classify", *vectors],
        **dict.fromkeys(("pairs", "scaled", "theirs"), vectors),
    }
    assert served.refused("/v1/classify", {"model": "pairs", "input": "film"})["code"] == "no_labels"


# -- scores of pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_vectors_are_their_cosines(name: str | None, served: Served) -> None:
    vectors = served.vectors(name, TEXTS)
    body = {"model": name or served.name, "text_1": TEXTS[0], "text_2": TEXTS[1:]}
    answer = served.post("/v1/score", body).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-5)
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(n, "score") for n in range(4)]
    body = {"model": name or served.name, "query": TEXTS[0], "documents": TEXTS[1:], "top_n": 2}
    best = (vectors[1:] @ vectors[0]).topk(2)
    results = served.post("/v1/rerank", body).json()["results"]
    assert [one["index"] for one in results] == best.indices.tolist()
    assert [one["relevance_score"] for one in results] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [one["document"]["text"] for one in results] == [TEXTS[1 + n] for n in best.indices.tolist()]


def test_a_side_of_pairs_has_several_names(served: Served) -> None:
    given = {"text_1": TEXTS[:2], "text_2": TEXTS[2:4]}
    expected = served.post("/v1/score", given).json()["data"]
    assert len(expected) == 2
    for first, second in (("queries", "documents"), ("data_1", "data_2"), ("queries", "items")):
        assert served.post("/v1/score", {first: TEXTS[:2], second: TEXTS[2:4]}).json()["data"] == expected


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_2": "a", "text_1": "b", "queries": "c"}, "queries"),
        ("/v1/score", {"text_1": "film", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "film", "text_2": ["", "film"]}, "text_2"),
        ("/v1/score", {"text_1": "film", "text_2": "film " * 50}, "text_2"),
        ("/v1/rerank", {"query": "film", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "", "documents": ["film"]}, "documents"),
        ("/v1/rerank", {"query": "film", "documents": ["film"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "film", "documents": "film"}, "documents"),
    ],
)
def test_pairs_that_are_wrong_are_named(path: str, body: dict[str, Any], param: str, served: Served) -> None:
    assert served.refused(path, body)["param"] == param


@pytest.fixture(scope="module")
def cross(save_tiny: Saver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any]]:
    """Serve a cross-encoder with an adapter on it."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=90, num_labels=1, initializer_range=0.3)
    folder = save_tiny("cross", BertForSequenceClassification(config), False)
    store = tmp_path_factory.mktemp("cross")
    base = load(str(folder))
    write_adapter(base.model, LoRA(rank=3), store / "own", 5, base={"kind": base.kind})
    engine = opened(folder, store)
    engine.start()
    yield Served(engine, folder, store, {}), base
    engine.stop(drain=False)


@pytest.mark.parametrize("name", [None, "own"])
def test_scores_of_a_cross_encoder_are_the_sigmoid_of_its_logit(name: str | None, cross: tuple[Served, Any]) -> None:
    served, base = cross
    model = copy.deepcopy(base.model)
    if name is not None:
        load_adapter(model, served.store / name)
    pairs = [(TEXTS[0], text) for text in TEXTS[1:]]
    with torch.no_grad():
        logits = torch.cat([model(**base.tokenizer(*pair, return_tensors="pt")).logits[0] for pair in pairs])
    body = {"model": name or served.name, "text_1": TEXTS[0], "text_2": TEXTS[1:]}
    for more, expected in (({}, logits.sigmoid()), ({"use_activation": False}, logits)):
        data = served.post("/v1/score", {**body, **more}).json()["data"]
        assert [one["score"] for one in data] == pytest.approx(expected.tolist(), abs=1e-5)
    body = {"model": name or served.name, "query": TEXTS[0], "documents": TEXTS[1:], "return_documents": False}
    answer = served.post("/v1/rerank", body).json()
    assert [one["index"] for one in answer["results"]] == logits.argsort(descending=True).tolist()
    assert not any("document" in one for one in answer["results"])
    tokens = sum(len(base.tokenizer(*pair)["input_ids"]) for pair in pairs)
    assert answer["usage"]["total_tokens"] == tokens
    error = served.refused("/v1/embeddings", {"model": name or served.name, "input": "film"})
    assert (error["code"], error["param"]) == ("not_capable", "model")


def test_a_cross_encoder_may_say_that_its_scores_are_logits(cross: tuple[Served, Any], tmp_path: Path) -> None:
    served, _ = cross
    shutil.copytree(served.folder, tmp_path / "logits")
    file = tmp_path / "logits" / "config.json"
    stated = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    engine = opened(tmp_path / "logits", served.store)
    scores = {
        activation: served.engine.score([("good", "film")], adapter=None, activation=activation).result(20).scores
        for activation in (True, False)
    }
    future = engine.score([("good", "film")], adapter=None)
    engine.run_until_idle()
    assert future.result().scores == pytest.approx(scores[False])
    assert scores[True] != pytest.approx(scores[False])


def test_an_adapter_may_make_a_reranker_of_an_encoder(served: Served, tmp_path: Path) -> None:
    base = load(str(served.folder), kind="sequence-classification", labels=["LABEL_0"])
    record = {"base": {"kind": "reranker"}, "task": {"format": "query-passage"}}
    method = LoRA(rank=3, modules_to_save=["classifier"])
    place = write_adapter(base.model, method, tmp_path / "store" / "ranks", 7, **record)
    model = copy.deepcopy(base.model)
    load_adapter(model, place)
    engine = opened(served.folder, tmp_path / "store")
    assert engine.capabilities(engine.store.entry("ranks")) == ["score", "rerank"]
    future = engine.score([(TEXTS[0], text) for text in TEXTS[1:]], adapter="ranks")
    vectors = engine.score([(TEXTS[0], text) for text in TEXTS[1:]], adapter=None)
    engine.run_until_idle()
    with torch.no_grad():
        logits = [model(**base.tokenizer(TEXTS[0], text, return_tensors="pt")).logits[0, 0] for text in TEXTS[1:]]
    assert future.result().scores == pytest.approx(torch.stack(logits).sigmoid().tolist(), abs=1e-5)
    own = served.vectors(None, TEXTS)
    assert vectors.result().scores == pytest.approx((own[1:] @ own[0]).tolist(), abs=1e-5)


# -- other bases ---------------------------------------------------------------------------------


def test_a_decoder_that_embeds_is_served_by_its_last_token(tiny_llama_folder: Path, tmp_path: Path) -> None:
    pooling = {"1_Pooling/config.json": {"pooling_mode_lasttoken": True}}
    folder = sentence_folder(tiny_llama_folder, tmp_path / "decoder", **pooling)
    (tmp_path / "store").mkdir()
    engine = opened(folder, tmp_path / "store")
    assert engine.capabilities(None) == ["embeddings", "score", "rerank"]
    future = engine.embed(TEXTS, adapter=None)
    engine.run_until_idle()
    base = load(str(folder), kind="sentence-encoder")
    for text, vector in zip(TEXTS, future.result().vectors, strict=True):
        with torch.no_grad():
            state = base.model(**base.tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert torch.allclose(torch.tensor(vector), state / state.norm(), atol=1e-5)


def test_a_model_that_cannot_embed_says_so(tiny_llama_folder: Path, save_tiny: Saver, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=90, num_labels=3)
    headed = save_tiny("headed", BertForSequenceClassification(config), False)
    for folder in (tiny_llama_folder, headed):
        engine = open_engine(model=str(folder), store=tmp_path, settings=ServeSettings(cache_memory="2MB"))
        app = build_app(engine, keys=None)
        for path, body in (
            ("/v1/embeddings", {"input": "film"}),
            ("/v1/score", {"text_1": "film", "text_2": "film"}),
            ("/v1/rerank", {"query": "film", "documents": ["film"]}),
        ):
            asked = {"model": folder.name, **body}
            response = talk(app, lambda client, path=path, asked=asked: client.post(path, json=asked))
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "not_capable", "model")


def test_dimensions_of_a_matryoshka_are_cut_and_of_length_one(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "matryoshka"
    shutil.copytree(served.folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "matryoshka_dimensions": [8, 16, 32]}))
    engine = opened(folder, served.store)
    future = engine.embed(TEXTS, adapter="pairs", dimensions=8)
    engine.run_until_idle()
    expected = torch.nn.functional.normalize(served.vectors("pairs", TEXTS)[:, :8], dim=1)
    assert torch.allclose(torch.tensor(future.result().vectors), expected, atol=1e-5)
