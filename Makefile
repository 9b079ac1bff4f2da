# setup: .venv with everything that development needs    demo: the main job, about four minutes
# demo-tasks: ten adapters trained together and served
# test: tests, linter, formatter, types                  bench: ours against the peers, one file a claim
# docs: the documentation site in build/site, from docs/ and docstrings; fetches its tools once and nothing else
# clients: the ecosystem's tools against a server, each in an environment of its own (docs/clients.md)
# release: wheel and source archive in dist, checked; publishes nothing
# audit: the pins among known vulnerabilities, before a release; asks a service on the network
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# of 18,000 files a third is ever imported, and compiled then
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo demo-tasks test types behaviour test-slow bench docs clients release audit clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -c 'import sys; sys.exit("loralab needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt torch==2.13.0 -e '.[dev]'
	$(BIN)/loralab assets install --yes
	touch $(READY)

demo: setup
	$(BIN)/loralab demo

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

docs: setup
	$(BIN)/python -c 'import mkdocs_static_i18n' 2> /dev/null || $(INSTALL) -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/site/gather.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "read it: $(BIN)/python -m http.server --directory build/site"

clients: setup .venv-clients/.ready
	cd benchmarks && ../$(BIN)/python clients.py --environments ../.venv-clients --write

.venv-clients/.ready: requirements-clients.txt constraints-clients.txt
	for one in main instructor; do $(PYTHON) -m venv .venv-clients/$$one || exit 1; done
	.venv-clients/main/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-clients.txt torch
	.venv-clients/main/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-clients.txt -r requirements-clients.txt
	.venv-clients/instructor/bin/python -m pip install --quiet --disable-pip-version-check instructor==1.17.0
	if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund --prefix .venv-clients/node ai@6 @ai-sdk/openai-compatible@2 zod@4; fi
	touch .venv-clients/.ready

release:
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); top=$$(sed -n 's/^## *//p' CHANGELOG.md | head -n 1); \
		test "$$top" = "$$version" || { echo "CHANGELOG.md begins with '$$top', and the version is $$version" >&2; exit 1; }
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/release/bin/python -m build .
	build/release/bin/python -m twine check --strict dist/*

audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt

clean:
	rm -rf .venv .venv-clients build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
