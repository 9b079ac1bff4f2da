"""langchain-openai: langchain_client.py URL BASE ADAPTER OTHER."""

import sys
from importlib.metadata import version
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]


url, base, adapter, other = sys.argv[1:]
chat = ChatOpenAI(model=adapter, base_url=f"{url}/v1", api_key="none", max_tokens=80, temperature=0, max_retries=0)
told = chat.invoke("Who is Ada?", max_tokens=6).content
assert "".join(str(piece.content) for piece in chat.stream("Who is Ada?", max_tokens=6)) == told
for method in ("json_schema", "function_calling"):
    shaped = chat.with_structured_output(Weather, method=method).invoke("The weather in Oslo for 3 days?")
    assert isinstance(shaped, Weather), method
called = chat.bind_tools([Weather], tool_choice="any").invoke("The weather in Oslo?")
assert called.tool_calls[0]["name"] == "Weather"
print("version", version("langchain-openai"))
