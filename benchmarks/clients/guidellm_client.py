"""guidellm: guidellm_client.py URL BASE ADAPTER OTHER TOKENIZER. It ends well when all fail: its report is read."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

COUNT = 3
url, base, adapter, other, tokenizer = sys.argv[1:]
for name, form in ((adapter, "/v1/chat/completions"), (other, "/v1/completions")):
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"]
        command += ["--backend", f"kind=openai_http,target={url},model={name},request_format={form}"]
        command += ["--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={COUNT}"]
        command += ["--tokenizer", f"kind=hf_auto,model={tokenizer}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"]
        command += ["--output", f"kind=json,path={report}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert report.is_file(), f"Error: no report: {done.stderr[-500:]}"
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        assert totals["successful"] and not totals["errored"], totals
print("version", version("guidellm"))
