"""Answers against references: label metrics by hand, text metrics by the usual libraries."""

import math
from collections import Counter
from collections.abc import Sequence

_CJK = (("\u3040", "\u30ff"), ("\u3400", "\u9fff"), ("\uac00", "\ud7af"))  # kana, han, hangul


def label_metrics(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    """Return accuracy, macro_f1 over all labels that occur, and Matthews' correlation coefficient.

    Matthews for several classes: Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006.
    """
    pairs = Counter(zip(expected, answered, strict=True))
    true, said = Counter(expected), Counter(answered)
    labels = sorted(true | said)
    right = sum(pairs[label, label] for label in labels)
    total = len(expected)
    f1 = [2 * pairs[label, label] / (true[label] + said[label]) for label in labels]
    crossed = right * total - sum(true[label] * said[label] for label in labels)
    spread = [total**2 - sum(count**2 for count in counts.values()) for counts in (true, said)]
    return {
        "accuracy": right / total,
        "macro_f1": sum(f1) / len(f1),
        "matthews": crossed / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0,
    }


def looks_like_entities(tags: Sequence[str]) -> bool:
    """Return whether tags say where entities begin and go on: B-..., I-..., O."""
    named = [tag for tag in tags if tag != "O"]
    marked = all(tag[:2] in ("B-", "I-") and len(tag) > 2 for tag in named)
    return marked and any(tag.startswith("B-") for tag in named)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, first word, word after the last) of each entity.

    As conlleval and seqeval read them: an I- that continues nothing begins an entity.
    """
    found, kind, start = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        marker, own = (tag[0], tag[2:]) if tag != "O" else ("O", "")
        if marker == "I" and own == kind:
            continue
        if kind:
            found.add((kind, start, place))
        kind, start = own, place
    return found


def entity_f1(expected: Sequence[Sequence[str]], told: Sequence[Sequence[str]]) -> float:
    """Return F1 over entities of all rows, right if type, start and end are; 0 where there are none."""
    pairs = [(entities(e), entities(t)) for e, t in zip(expected, told, strict=True)]
    right = sum(len(true & said) for true, said in pairs)
    total = sum(len(true) + len(said) for true, said in pairs)
    return 2 * right / total if total else 0.0


def text_metrics(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    """Return exact_match (white space at the ends ignored), BLEU and ROUGE-L F1, each 0 to 1.

    Chinese, Japanese and Korean texts are compared by characters: the libraries' default
    tokenizers would see one word or none.
    """
    import sacrebleu
    from rouge_score import rouge_scorer

    pairs = [(e.strip(), a.strip()) for e, a in zip(expected, answered, strict=True)]
    style = "zh" if any(_is_cjk(char) for e, _ in pairs for char in e) else "13a"
    bleu = sacrebleu.corpus_bleu([a for _, a in pairs], [[e for e, _ in pairs]], tokenize=style)
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [scorer.score(e, a)["rougeL"].fmeasure for e, a in pairs]
    return {
        "exact_match": sum(e == a for e, a in pairs) / len(pairs),
        "bleu": bleu.score / 100,
        "rouge_l": sum(rouge) / len(rouge),
    }


class _Words:
    """Words in lower case, and single CJK characters."""

    def tokenize(self, text: str) -> list[str]:
        spaced = "".join(f" {c} " if _is_cjk(c) else c if c.isalnum() else " " for c in text)
        return spaced.lower().split()


def _is_cjk(char: str) -> bool:
    return any(first <= char <= last for first, last in _CJK)
