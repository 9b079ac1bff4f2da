"""OpenAI's own client: openai_client.py URL BASE ADAPTER OTHER."""

import sys
from typing import Literal

import openai
from pydantic import BaseModel


class Answer(BaseModel):
    name: Literal["Ada", "Bob"]
    likes: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
url, base, adapter, other = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Who is Ada?"}]
assert {adapter, other} <= {model.id for model in client.models.list()}
told = client.chat.completions.create(model=adapter, messages=messages, max_tokens=6, temperature=0, logprobs=True)
assert len(told.choices[0].logprobs.content) == told.usage.completion_tokens
pieces = client.chat.completions.create(model=adapter, messages=messages, max_tokens=6, temperature=0, stream=True)
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == told.choices[0].message.content
parsed = client.chat.completions.parse(model=other, messages=messages, response_format=Answer, max_tokens=60)
assert isinstance(parsed.choices[0].message.parsed, Answer)
for asked in ("required", {"type": "function", "function": {"name": "weather"}}):
    called = client.chat.completions.create(
        model=base, messages=messages, tools=[TOOL], tool_choice=asked, max_tokens=60, parallel_tool_calls=False
    )
    assert called.choices[0].finish_reason == "tool_calls"
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
with client.chat.completions.stream(
    model=base, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=60, parallel_tool_calls=False
) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.tool_calls[0].function.name == "weather"
echoed = client.completions.create(model=adapter, prompt="one two", max_tokens=0, echo=True, logprobs=1)
assert echoed.choices[0].logprobs.token_logprobs[0] is None
print("version", openai.__version__)
