"""Label metrics against scikit-learn; text metrics on texts whose scores are known."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from loralab.tasks.metrics import label_metrics, text_metrics


@given(pairs=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1))
def test_label_metrics_equal_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    true, said = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ours = label_metrics(true, said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of labels that occur on one side only
        theirs = {
            "accuracy": reference.accuracy_score(true, said),
            "macro_f1": reference.f1_score(true, said, average="macro"),
            "matthews": reference.matthews_corrcoef(true, said),
        }
    assert ours == pytest.approx(theirs, abs=1e-12)


TEXTS = ["the film is good, and long enough", "這部電影很好看，值得一看", "이 영화는 정말 좋아요 그렇죠"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_text_scores_one(text: str) -> None:
    scores = text_metrics([text], [f" {text}\n"])
    assert scores == pytest.approx({"exact_match": 1, "bleu": 1, "rouge_l": 1})


@pytest.mark.parametrize("text", TEXTS)
def test_an_empty_or_foreign_answer_scores_nothing(text: str) -> None:
    for answer in ("", "xyzzy"):
        assert text_metrics([text], [answer]) == {"exact_match": 0, "bleu": 0, "rouge_l": 0}


def test_chinese_is_compared_by_characters() -> None:
    scores = text_metrics(["這部電影很好看"], ["這部電影不好看"])
    assert scores["rouge_l"] == pytest.approx(6 / 7)
    assert 0 < scores["bleu"] < 1 and scores["exact_match"] == 0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    scores = text_metrics(["The cat sat on the mat"], ["the cat on a mat."])
    precision, recall = 4 / 5, 4 / 6
    assert scores["rouge_l"] == pytest.approx(2 * precision * recall / (precision + recall))
