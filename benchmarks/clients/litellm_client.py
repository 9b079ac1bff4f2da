"""litellm: litellm_client.py URL BASE ADAPTER OTHER."""

import json
import sys
from importlib.metadata import version
from typing import Literal

import litellm
from pydantic import BaseModel


class Answer(BaseModel):
    name: Literal["Ada", "Bob"]
    likes: bool


url, base, adapter, other = sys.argv[1:]
messages = [{"role": "user", "content": "Who is Ada?"}]
own = {"model": f"openai/{adapter}", "api_base": f"{url}/v1", "api_key": "none", "messages": messages}
told = litellm.completion(**own, max_tokens=6, temperature=0)
pieces = litellm.completion(**own, max_tokens=6, temperature=0, stream=True)
assert "".join(p.choices[0].delta.content or "" for p in pieces) == told.choices[0].message.content
shaped = litellm.completion(**own, max_tokens=60, response_format=Answer)
assert Answer(**json.loads(shaped.choices[0].message.content))
text = litellm.text_completion(
    model=f"text-completion-openai/{other}", api_base=f"{url}/v1", api_key="none", prompt="one two", max_tokens=4
)
assert text.choices[0].text
print("version", version("litellm"))
