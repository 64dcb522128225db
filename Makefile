# make demo [VIDEO=path]   create the environment, build, run the main job on a clip, write out/
# make test                the same environment, every claim but the slow ones
# make scaling             time and memory of attention against the number of tokens, written to docs/
# make gpu-report          what the GPU kernels compile to, no GPU needed; REPORT=--write replaces the committed table
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
# A process of pytest a core, with a thread each: what needs more threads starts them itself.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal
SOURCES := requirements.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)

.PHONY: demo test test-slow bench scaling gpu-report check format clean

demo: $(INSTALLED)
	$(PY) -m bench.demo --out out $(if $(VIDEO),--video "$(VIDEO)")

test: $(INSTALLED)
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_kernels

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

bench: $(INSTALLED)
	$(PY) -m pytest bench

scaling: $(INSTALLED)
	$(PY) -m bench.nabla_scaling --out docs

gpu-report: $(INSTALLED)
	$(PY) -m bench.gpu_report $(REPORT)

check: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The pinned torch is installed first, so the extension is built against it instead of a second download.
$(INSTALLED): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build out dist *.egg-info k5kernels/_native.so
