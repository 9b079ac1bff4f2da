"""lm-eval: lm_eval_client.py URL BASE ADAPTER OTHER TOKENIZER. Multiple choice, perplexity, written answers."""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

COMMON = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
KINDS = {
    "client_choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}} is"\ndoc_to_choice: ["hot", "cold"]\n'
    'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n',
    "client_rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "client_written": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
    "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}
url, base, adapter, other, tokenizer = sys.argv[1:]
with tempfile.TemporaryDirectory() as place:
    file = Path(place) / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": f"Number {n} and water", "a": n % 2}) + "\n" for n in range(6)))
    for name, text in KINDS.items():
        (Path(place) / f"{name}.yaml").write_text(COMMON.format(name=name, file=file) + text)
    manager = TaskManager(include_path=place)
    options = {"model": adapter, "tokenizer": tokenizer, "num_concurrent": 2, "max_length": 512}
    own = {"task_manager": manager, "bootstrap_iters": 0, "batch_size": 2}
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args={**options, "base_url": f"{url}/v1/completions"}, tasks=[*KINDS], **own
    )
    assert all(found["results"][name] for name in KINDS)
    chat = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": other, "base_url": f"{url}/v1/chat/completions", "num_concurrent": 2},
        tasks=["client_written"],
        apply_chat_template=True,
        **own,
    )
    assert chat["results"]["client_written"]
print("version", version("lm-eval"))
