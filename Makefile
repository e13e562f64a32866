# make        lint and tests
# make demo   train, export, quantize, bench and answer on what the repository ships
# make test   all tests
# make slow   the tests that fuzz, flood, install or kill many times, and all tests that run on transformers 5
# make quick  the tests that need no torch, trained model or other processes, in under a minute
# make coverage   all tests, and the share of lines that they run in each folder of qadeploy/
# make test-next  the tests of training, export and answers on transformers 5 without optimum (constraints-next.txt)
# make docs   the documentation site, in site/
# make requirements   writes the hashes of the container's packages to requirements/, after a change of constraints.txt
# make node-check   tests bundles with the whole answer in the graph in Node.js and in a browser (needs node 20 or newer)
# make inference-servers   an environment with Triton and MLServer; without it, the tests that need them are skipped
# Each target sets up .venv first, with the GPU build of ONNX Runtime if the machine has an NVIDIA driver.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SERVERS := .venv-servers
SERVERS_READY := $(SERVERS)/.ready
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
NEXT := .venv-next
NEXT_READY := $(NEXT)/.ready
BUNDLE := bundles/handbook-int8
# The tests of make test-next; then the other tests of graphs, which PyTorch's own exporter writes on transformers 5.
NEXT_TESTS := $(addprefix tests/test_,$(addsuffix .py,architectures trainer export exportable transformers_versions))
NEXT_MORE := $(addprefix tests/test_,$(addsuffix .py,exporters fp16 session_answerer answerer_refused answerer_sharing cli_training \
	cli_answers recipes attention span_head text_graph))
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--constraint constraints.txt --custom-compile-command 'make requirements'
# More workers than cores, because many tests wait for other processes; a worker needs 1 to 2 GB.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 3 ? 6 : n + n / 2)))

# If it is set, each worker and each process that a test starts compiles everything anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all setup lint format quick test slow test-next coverage requirements docs demo inference-servers node-check clean

all: lint test

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "qadeploy needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "no venv module: install your system's python3-venv package"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$(RUNTIME),scale,serve,corpus,train,optimum,triton,dev]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quick: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal tests/unit

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

slow: $(READY) $(NEXT_READY)
	$(BIN)/python -m pytest -m slow
	$(NEXT)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m 'slow or not slow' $(NEXT_TESTS) $(NEXT_MORE)

test-next: $(NEXT_READY)
	$(NEXT)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(NEXT_TESTS)

$(NEXT_READY): pyproject.toml constraints-next.txt
	@test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --no-compile -c constraints-next.txt -e '.[cpu,serve,corpus,train,dev]'
	@touch $@

coverage: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=qadeploy --cov-report=
	@for room in qadeploy/*/; do \
		printf '%-24s %s %%\n' $$room "$$($(BIN)/coverage report --include="$$room*" --format=total 2>/dev/null)"; \
	done

# One list for all Python versions and machines that have wheels.
requirements: $(READY)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(COMPILE) --extra cpu --extra serve --extra corpus --output-file requirements/cpu.txt pyproject.toml
	$(COMPILE) --extra gpu --extra serve --extra corpus --output-file requirements/gpu.txt pyproject.toml
	$(COMPILE) --output-file requirements/build.txt requirements/build.in

docs: $(READY)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# onnxruntime-node includes its CPU library; its install script would download the CUDA library.
node-check: $(READY)
	cd docs/node && npm ci --ignore-scripts
	$(BIN)/python -m pytest -s tests/test_node.py tests/test_web.py

inference-servers: $(SERVERS_READY)

$(SERVERS_READY): tests/inference_servers/requirements.txt
	@test -x $(SERVERS)/bin/python || $(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --no-compile -r tests/inference_servers/requirements.txt
	@touch $@

demo: $(READY)
	$(BIN)/qadeploy train --data handbook --epochs 1 --crops 0 --out runs/handbook
	$(BIN)/qadeploy export runs/handbook --quantize --budget 30s --out bundles/handbook
	$(BIN)/qadeploy bench $(BUNDLE) --questions 100 --rounds 2
	$(BIN)/qadeploy ask $(BUNDLE) --top-k 1 \
		--question "Why does the coxswain not use a pen?" \
		--context "The night boat leaves Carrow Quay at twenty to eleven. Hester Quill hands the sealed sacks to the coxswain, Donal Keane, who signs for them in pencil, because ink runs; at Port Ansel the sacks are counted again by lantern."

clean:
	rm -rf $(VENV) $(NEXT) $(SERVERS) runs bundles site .mypy_cache .ruff_cache .pytest_cache .hypothesis
