"""Values of a chat template's own variables, kept in the template: whoever renders it writes the same.

They are set where the caller gives none, as with `chat_template_kwargs` of a request.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from loralab.errors import ConfigError, join_limited
from loralab.models.identity import template_of, with_tokenizer_changes
from loralab.models.load import Base

FIELD = "chat_template_kwargs"
SET = "{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}"


def with_template_values(base: Base, values: Mapping[str, Any]) -> Base:
    """Return the base with a tokenizer whose chat template has some of its variables set.

    Raises:
        ConfigError: there is no template, or it does not read one of them.
    """
    if not values:
        return base
    template = template_of(base.tokenizer)
    unread = [name for name in values if not re.search(rf"\b{re.escape(name)}\b", template or "")]
    if unread:
        what = "does not read it" if template else "is not there"
        raise ConfigError(
            f"chat_template_kwargs: {join_limited(unread)} would have no effect, as the chat template of {base.name} "
            f"{what}",
            code="no_effect",
            field=FIELD,
        )
    prefix = "".join(SET.format(name=name, value=json.dumps(value)) for name, value in values.items())
    return with_tokenizer_changes(base, {"chat_template": (prefix + str(template), "")})
