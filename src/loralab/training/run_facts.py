"""Facts of a run beside its settings: rows, base and tokenizer, which a name does not fix.

config.toml holds names, and another content may stand behind the same name by the time that a run
goes on. So `run.json` beside it holds what was there when the run began, and is compared.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters.fingerprint import fingerprint
from loralab.errors import ConfigError, OutputError, format_value, join_limited
from loralab.models.identity import config_digest, template_of, tokenizer_digest
from loralab.models.load import Base
from loralab.tasks.catalog import Task
from loralab.values import read_json

FACTS_FILE = "run.json"
LONG, HEX = 60, re.compile("[0-9a-f]{64}")  # characters; a sha256
RunFacts = Mapping[str, Any]
FACT_NAMES = {  # how an error calls them
    "data": "data: digest",
    "labels": "labels",
    "instruction": "instruction",
    "base": "base model: fingerprint",
    "base_config": "base model: digest of config.json",
    "tokenizer": "tokenizer: digest",
    "chat_template": "chat template",
    "eos_token": "end of text",
    "from_adapter": "adapter that it goes on from: digest",
    "general": "general text: digest",  # of studies alone
}
UNKNOWN = (
    "this run was begun without a record of its data and its base (run.json), so whether they are "
    "still the same could not be compared"
)


def facts_of(task: Task, digest: str, base: Base, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return the facts that are compared when a run is resumed.

    Args:
        digest: of the task's rows.
        base: with new tokens in its tokenizer; an adapter in it does not count.
        without: paths of modules that do not count either.
    """
    return {
        "data": digest,
        "labels": list(task.labels),
        "instruction": task.instruction,
        "base": fingerprint(base.model, without),
        "base_config": config_digest(base),
        "tokenizer": tokenizer_digest(base.tokenizer),
        "chat_template": template_of(base.tokenizer),
        "eos_token": base.tokenizer.eos_token,
    }


def require_same(folder: Path, facts: RunFacts, *, begun: bool) -> str:
    """Require the facts of a resumed run to equal those of its start.

    Args:
        begun: whether steps were made already.

    Returns:
        A note, where it cannot be known; else an empty text.

    Raises:
        ConfigError: the data, the base, the tokenizer or the question is another one.
        OutputError: run.json is damaged.
    """
    file = folder / FACTS_FILE
    if not file.is_file():
        return UNKNOWN if begun else ""
    require_equal(f"{folder} holds a run", read_json(file, OutputError), facts)
    return ""


def require_equal(what: str, stored: RunFacts, facts: RunFacts) -> None:
    """Require facts to equal the stored ones; what was not stored is not compared.

    Args:
        what: "FOLDER holds a run", for the error.

    Raises:
        ConfigError: something differs.
    """
    different = [name for name in FACT_NAMES if name in stored and stored[name] != facts.get(name)]
    if different:
        changes = [
            f"{FACT_NAMES[name]} was {_brief(stored[name])}, now {_brief(facts.get(name))}" for name in different
        ]
        raise ConfigError(
            f"{what} that was begun with something else: {join_limited(changes)}; bring that back, or "
            "begin anew in another folder",
            code="other_run",
            field=different[0],
        )


def write_facts(folder: Path, facts: RunFacts) -> None:
    """Keep them for those who go on; what is there already stays."""
    if not (folder / FACTS_FILE).is_file():
        atomic.write_file(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def _brief(value: Any) -> str:
    """Return a value as an error quotes it; long texts may differ where they are not shown."""
    if not isinstance(value, str) or len(value) <= LONG:
        return format_value(value)
    if HEX.fullmatch(value):
        return value[:16]
    return f"{format_value(value)} (digest {hashlib.sha256(value.encode()).hexdigest()[:8]})"
