"""instructor: instructor_client.py URL BASE ADAPTER OTHER."""

import sys
from importlib.metadata import version
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: Literal["Ada", "Bob"]
    grown: bool


url, base, adapter, other = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    own = instructor.from_openai(client, mode=mode)
    found = own.chat.completions.create(
        model=adapter,
        messages=[{"role": "user", "content": "Ada is grown up."}],
        response_model=Person,
        max_tokens=240,  # white space between all tokens included
        max_retries=0,
    )
    assert isinstance(found, Person), mode
print("version", version("instructor"))
