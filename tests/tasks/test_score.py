"""Losses equal plain cross-entropy, labels are ranked by brute force's probabilities."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, PreTrainedModel

from loralab.errors import ConfigError, DataError
from loralab.lanes import threads
from loralab.tasks.batches import collate
from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer_ids, chat_ids, encode, prompt_ids, stop_ids
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.score import Scores, answer_loss, evaluate, generate

TaskOf = Callable[..., Task]
TEXTS = ["good film", "awful", "a poor poor film .", "fine", "bad bad bad", "great review"]


def labelled(task_of: TaskOf, *labels: str) -> Task:
    return task_of("text-label", [{"text": text, "label": labels[n % len(labels)]} for n, text in enumerate(TEXTS)])


def sums(task_of: TaskOf) -> Task:
    rows = [{"prompt": f"say {n} and {n} .", "completion": f"{2 * n} . yes"} for n in range(9)]
    return task_of("prompt-completion", rows)


class AllLogits(nn.Module):
    """A model that cannot be asked for some logits only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Wrapped(nn.Module):
    """A model behind `.module`, as data-parallel training wraps it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


class Recording(nn.Module):
    """Notes how many positions had their logits computed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module, self.positions = model, 0

    def forward(self, **options: Any) -> Any:
        out = self.module(**options)
        self.positions = out.logits.shape[1]
        return out


def examples_of(draw: st.DataObject, rows: int) -> list[Example]:
    found = []
    for index in range(rows):
        ids = draw.draw(st.lists(st.integers(3, 60), min_size=1, max_size=9))
        masked = draw.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [IGNORED if hide else i for i, hide in zip(ids, masked, strict=True)]
        found.append(Example(index, tuple(ids), tuple(labels)))
    return found


def plain_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("wrap", [lambda model: model, AllLogits, Wrapped])
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_answer_loss_equals_plain_cross_entropy(
    name: str, wrap: Callable[[Any], nn.Module], data: st.DataObject, request: Any
) -> None:
    model = request.getfixturevalue(name)
    batch = collate(examples_of(data, 3), pad_id=2, kind="causal-lm")
    loss, count = answer_loss(wrap(model), batch, "causal-lm")
    assert count == int((batch["labels"][:, 1:] != IGNORED).sum())
    assert loss.item() == pytest.approx(plain_loss(model, batch).item(), rel=1e-6, abs=1e-6)
    loss.backward()  # also where nothing is labelled


def test_gradients_equal_plain_cross_entropys(llama: Any, task_of: TaskOf, chat_tokenizer: Any) -> None:
    encoded = encode(sums(task_of), "train", chat_tokenizer, kind="causal-lm", max_length=64)
    batch = collate(encoded.examples, pad_id=2, kind="causal-lm")
    losses = (answer_loss(llama, batch, "causal-lm")[0], plain_loss(llama, batch))
    ours, theirs = (torch.autograd.grad(loss, list(llama.parameters())) for loss in losses)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item())


def test_logits_are_computed_only_where_an_answer_stands(llama: Any) -> None:
    example = Example(0, tuple(range(3, 43)), (IGNORED,) * 38 + (41, 42))
    model = Recording(llama)
    answer_loss(model, collate([example], pad_id=2, kind="causal-lm"), "causal-lm")
    assert model.positions == 2


def test_a_batch_of_prompts_alone_has_no_loss(llama: Any) -> None:
    batch = collate([Example(0, (5, 6), (IGNORED, IGNORED))], pad_id=2, kind="causal-lm")
    loss, count = answer_loss(llama, batch, "causal-lm")
    assert (loss.item(), count) == (0.0, 0)


# evaluate


def log_probability(model: Any, prompt: tuple[int, ...], own: tuple[int, ...]) -> float:
    """Of an answer after its prompt, one row at a time, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *own]])).logits[0].double()
    found = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(found[i, token].item() for i, token in enumerate(own))


@pytest.mark.parametrize(
    ("labels", "end_counts"),
    [(("good", "bad"), False), (("good", "bad film", "fine"), True), (("good", "good good"), True)],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_answer_is_the_likeliest_label_and_the_loss_the_true_ones(
    labels: tuple[str, ...], end_counts: bool, batch_size: int, llama: Any, chat_tokenizer: Any, task_of: TaskOf
) -> None:
    task = labelled(task_of, *labels)
    scores = evaluate(llama, chat_tokenizer, task, kind="causal-lm", batch_size=batch_size)
    loss, tokens = 0.0, 0
    for row, prediction in zip(task.splits["test"], scores.predictions, strict=True):
        asked = prompt_ids(task, row, chat_tokenizer)
        own = {name: answer_ids(task, row, chat_tokenizer, name) for name in task.labels}
        ranked = own if end_counts else {name: ids[:-1] for name, ids in own.items()}
        best = max(ranked, key=lambda name: log_probability(llama, asked, ranked[name]))
        assert (prediction.expected, prediction.answer) == (row["label"], best)
        assert prediction.prompt == row["text"]
        loss -= log_probability(llama, asked, own[row["label"]])
        tokens += len(own[row["label"]])
    assert scores.metrics["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert scores.metrics["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    right = sum(p.expected == p.answer for p in scores.predictions) / len(TEXTS)
    assert (scores.metrics["accuracy"], scores.main, scores.rows) == (right, "accuracy", len(TEXTS))


def test_row_losses_stand_in_the_rows_own_order_and_sum_to_the_loss(
    llama: Any, chat_tokenizer: Any, plain_tokenizer: Any, task_of: TaskOf
) -> None:
    task = sums(task_of)
    scores = evaluate(llama, plain_tokenizer, task, kind="causal-lm", batch_size=4)
    for row, loss in zip(task.splits["test"], scores.row_losses, strict=True):
        own = answer_ids(task, row, plain_tokenizer, row["completion"])
        expected = -log_probability(llama, prompt_ids(task, row, plain_tokenizer), own) / len(own)
        assert loss == pytest.approx(expected, rel=1e-4)
    for labels in (("good", "bad"), ("good", "bad film", "fine")):
        task = labelled(task_of, *labels)
        scores = evaluate(llama, chat_tokenizer, task, kind="causal-lm", batch_size=4)
        weights = [len(answer_ids(task, row, chat_tokenizer, row["label"])) for row in task.splits["test"]]
        whole = sum(w * own for w, own in zip(weights, scores.row_losses, strict=True))
        assert scores.metrics["loss"] == pytest.approx(whole / sum(weights), rel=1e-5)


def test_a_row_of_several_examples_is_scored_once_over_all_its_labels(
    llama: Any, chat_tokenizer: Any, plain_tokenizer: Any, task_of: TaskOf
) -> None:
    chat_tokenizer.chat_template = (  # writes only the last answer
        "{% for m in messages %}<s>{{ m['role'] }} "
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    roles = ("user", "assistant")
    chats = (("good film", "yes"), ("a film", "no", "is this good", "yes yes", "bad ?", "no"))
    rows = [{"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(chat)]} for chat in chats]
    scores = evaluate(
        llama, chat_tokenizer, task_of("messages", rows), kind="causal-lm", generate=True, max_new_tokens=2
    )
    assert scores.rows == len(scores.row_losses) == len(scores.predictions) == 2
    losses, tokens = [], []
    for row in rows:
        loss, count = 0.0, 0
        for end in range(2, len(row["messages"]) + 1, 2):
            part = {"messages": row["messages"][:end]}
            task = task_of("messages", [part])
            own = answer_ids(task, part, chat_tokenizer, part["messages"][-1]["content"])
            loss -= log_probability(llama, prompt_ids(task, part, chat_tokenizer), own)
            count += len(own)
        losses.append(loss)
        tokens.append(count)
    expected = [loss / count for loss, count in zip(losses, tokens, strict=True)]
    assert list(scores.row_losses) == pytest.approx(expected, rel=1e-4)
    assert scores.metrics["loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-4)
    (note,) = scores.notes
    assert "1 conversations of 3 answers" in note


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_do_not_depend_on_the_batch_size(name: str, task_of: TaskOf, plain_tokenizer: Any, request: Any) -> None:
    model, task = request.getfixturevalue(name), sums(task_of)
    options: dict[str, Any] = {"kind": "causal-lm", "generate": True, "max_new_tokens": 5}
    one = evaluate(model, plain_tokenizer, task, batch_size=1, **options)
    many = evaluate(model, plain_tokenizer, task, batch_size=7, **options)
    assert one.metrics == pytest.approx(many.metrics, rel=1e-5)
    assert one.predictions == many.predictions
    assert set(one.metrics) == {"loss", "perplexity", "exact_match", "bleu", "rouge_l"}
    assert one.main == "loss" and [p.row for p in one.predictions] == list(range(9))


@pytest.mark.parametrize("name", ["llama", "tiny_bert_folder"])
def test_lanes_give_the_same_scores(name: str, task_of: TaskOf, plain_tokenizer: Any, request: Any) -> None:
    model = request.getfixturevalue(name)
    kind, task = "causal-lm", sums(task_of)
    if name != "llama":
        model, kind, task = classifier(model, 2), "sequence-classification", labelled(task_of, "bad", "good")
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(evaluate(model, plain_tokenizer, task, "test", kind=kind, batch_size=1))
    one, other = found
    assert other.row_losses == pytest.approx(one.row_losses, rel=1e-5)
    assert [p.answer for p in other.predictions] == [p.answer for p in one.predictions]


def test_a_text_has_a_loss_on_every_token(llama: Any, plain_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("text", [{"text": "good film ."}, {"text": " ".join(map(str, range(50)))}])
    scores = evaluate(llama, plain_tokenizer, task, kind="causal-lm", max_length=600)
    pieces = evaluate(llama, plain_tokenizer, task, kind="causal-lm", max_length=20)
    assert len(scores.row_losses) == len(pieces.row_losses) == 2
    loss = sum(
        -log_probability(llama, (ids[0],), (*ids[1:], plain_tokenizer.eos_token_id))
        for row in task.splits["test"]
        if (ids := plain_tokenizer(row["text"])["input_ids"])
    )
    assert scores.metrics["loss"] == pytest.approx(loss / (3 + 50), rel=1e-5)


def test_a_classifier_is_scored_by_its_classes(tiny_bert_folder: Any, task_of: TaskOf, plain_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = classifier(tiny_bert_folder, 3)
    task = labelled(task_of, "bad", "fine", "good")
    scores = evaluate(model, plain_tokenizer, task, kind="sequence-classification", batch_size=4)
    for row, prediction in zip(task.splits["test"], scores.predictions, strict=True):
        ids = torch.tensor([plain_tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            best = model(input_ids=ids).logits.argmax().item()
        assert prediction.answer == task.labels[best]
    assert set(scores.metrics) == {"loss", "accuracy", "macro_f1", "matthews"}


def classifier(folder: Any, labels: int) -> PreTrainedModel:
    from transformers.utils import logging

    logging.set_verbosity_error()  # the head is new, and it says so
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=labels)
    logging.set_verbosity_warning()
    return model.eval()


def test_limit_takes_the_first_rows(llama: Any, chat_tokenizer: Any, task_of: TaskOf) -> None:
    task = labelled(task_of, "good", "bad")
    few = evaluate(llama, chat_tokenizer, task, kind="causal-lm", limit=2)
    assert few.rows == 2
    assert few.predictions == evaluate(llama, chat_tokenizer, task, kind="causal-lm").predictions[:2]


def test_each_module_gets_its_own_mode_back(llama: Any, chat_tokenizer: Any, task_of: TaskOf) -> None:
    llama.train()
    llama.lm_head.eval()
    before = [module.training for module in llama.modules()]
    evaluate(llama, chat_tokenizer, labelled(task_of, "good", "bad"), kind="causal-lm", limit=2)
    with pytest.raises(DataError):
        generate(llama, chat_tokenizer, [()])
    assert [module.training for module in llama.modules()] == before
    assert set(before) == {True, False}


def test_better_follows_the_main_metric() -> None:
    def scores(main: str, value: float) -> Scores:
        return Scores(metrics={main: value}, rows=1, predictions=(), main=main)

    assert scores("loss", 1.0).better(scores("loss", 2.0))
    assert scores("accuracy", 2.0).better(scores("accuracy", 1.0))
    assert not scores("loss", 1.0).better(scores("loss", 1.0))
    assert not scores("loss", math.nan).better(scores("loss", 1.0))


# what evaluate refuses


def test_a_row_beyond_the_context_is_named_not_left_out(llama: Any, chat_tokenizer: Any, task_of: TaskOf) -> None:
    rows = [{"prompt": "good " * n, "completion": "yes"} for n in (1, 30, 2, 40)]
    task = task_of("prompt-completion", rows)
    with pytest.raises(DataError) as error:
        evaluate(llama, chat_tokenizer, task, kind="causal-lm", max_length=20)
    assert (error.value.code, error.value.field) == ("too_long", "max_length")


def test_a_longer_wrong_label_may_not_leave_the_context(llama: Any, chat_tokenizer: Any, task_of: TaskOf) -> None:
    task = labelled(task_of, "good", "bad " * 30)
    needed = max(len(prompt_ids(task, row, chat_tokenizer)) for row in task.splits["test"])
    rows = [row for row in task.splits["test"] if row["label"] == "good"]
    task = Task(**{**vars(task), "splits": {**task.splits, "test": rows}})
    with pytest.raises(DataError) as error:
        evaluate(llama, chat_tokenizer, task, kind="causal-lm", max_length=needed + 5)
    assert (error.value.code, error.value.field) == ("too_long", "prompt")


@pytest.mark.parametrize(
    ("form", "options", "code"),
    [
        ("label", {"generate": True}, "no_answer"),
        ("text", {"generate": True}, "no_answer"),
        ("label", {"limit": 0}, "invalid_value"),
        ("label", {"split": "tets"}, "unknown_split"),
    ],
)
def test_an_option_that_can_have_no_effect_is_refused(
    form: str, options: dict[str, Any], code: str, llama: Any, chat_tokenizer: Any, task_of: TaskOf
) -> None:
    task = labelled(task_of, "a", "b") if form == "label" else task_of("text", [{"text": "good"}])
    with pytest.raises(ConfigError) as error:
        evaluate(llama, chat_tokenizer, task, kind="causal-lm", **options)
    assert error.value.code == code


def test_labels_of_the_same_tokens_cannot_be_told_apart(llama: Any, chat_tokenizer: Any, task_of: TaskOf) -> None:
    task = labelled(task_of, "zebra", "quagga")  # both are one unknown word here
    with pytest.raises(DataError) as error:
        evaluate(llama, chat_tokenizer, task, kind="causal-lm")
    assert (error.value.code, error.value.field) == ("ambiguous_labels", "labels")


# generate


def greedy(model: Any, tokenizer: Any, prompt: tuple[int, ...], count: int) -> str:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids(tokenizer):
            ids.pop()
            break
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batched_generation_equals_one_token_at_a_time(name: str, chat_tokenizer: Any, request: Any) -> None:
    model = request.getfixturevalue(name)
    asked = [chat_ids(chat_tokenizer, text) for text in ("good", "is this bad ?", "a film . yes")]
    expected = [greedy(model, chat_tokenizer, prompt, 7) for prompt in asked]
    assert generate(model, chat_tokenizer, asked, max_new_tokens=7, batch_size=2) == expected


def test_the_models_own_generation_settings_do_not_interfere(llama: Any, chat_tokenizer: Any) -> None:
    asked = [chat_ids(chat_tokenizer, "good")]
    drawn = {"temperature": 1.0, "seed": 4, "max_new_tokens": 6}
    plain, sampled = (generate(llama, chat_tokenizer, asked), generate(llama, chat_tokenizer, asked, **drawn))
    own = llama.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 0.3, 0.1, 1
    own.repetition_penalty = 5.0
    assert generate(llama, chat_tokenizer, asked) == plain
    assert generate(llama, chat_tokenizer, asked, **drawn) == sampled


def test_sampling_follows_its_seed_and_leaves_others_alone(llama: Any, chat_tokenizer: Any) -> None:
    asked = [chat_ids(chat_tokenizer, "good film")]

    def draw(seed: int) -> list[str]:
        return generate(llama, chat_tokenizer, asked, temperature=1.0, seed=seed, max_new_tokens=8)

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.rand(3), expected)


def test_generation_stops_at_the_end_token(gpt2: Any, plain_tokenizer: Any) -> None:
    with torch.no_grad():  # an output head that always says the end
        gpt2.transformer.ln_f.weight.zero_()
        gpt2.transformer.ln_f.bias.copy_(gpt2.lm_head.weight[plain_tokenizer.eos_token_id])
    assert generate(gpt2, plain_tokenizer, [(5, 6)], max_new_tokens=9) == [""]


def test_no_prompt_gives_no_answer_and_an_empty_one_is_refused(llama: Any, chat_tokenizer: Any) -> None:
    assert generate(llama, chat_tokenizer, []) == []
    with pytest.raises(DataError) as error:
        generate(llama, chat_tokenizer, [(5,), ()])
    assert (error.value.code, error.value.field) == ("empty", "prompt")


def test_a_prompt_that_leaves_no_room_is_refused(gpt2: Any, plain_tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        generate(gpt2, plain_tokenizer, [(5,) * 250], max_new_tokens=8)
    assert (error.value.code, error.value.field) == ("too_long", "prompt")
