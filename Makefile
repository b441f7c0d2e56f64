# Two commands do everything on a fresh machine with Python >= 3.11 and a C++17 compiler:
#   make sds PROMPT="a green armchair"
#   make test
# Set-up runs once: deps are keyed on pyproject.toml, the extension on its sources.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a green armchair
ARGS ?=
# Tests run in a process for each core, four at most: each has its own torch in memory. `make test JOBS=` takes one.
JOBS ?= -n logical --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: sds test test-all bench lint format build sanitize clean

sds: $(VENV)/.built
	$(BIN)/python -m mvdream_fast.sds --prompt "$(PROMPT)" $(ARGS)

test: $(VENV)/.built-test
	$(BIN)/python -m pytest -m "not slow" $(JOBS) $(ARGS)

test-all: $(VENV)/.built-test
	$(BIN)/python -m pytest $(JOBS) $(ARGS)

bench: $(VENV)/.built-test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

build: $(VENV)/.built

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mvdream_fast needs Python >= 3.11; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13"
	touch $@

# Dependencies first, by the closed ranges of pyproject.toml; the project itself is built without an isolated copy of them.
$(VENV)/.deps: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q $$($(BIN)/python .ci/requirements.py)
	touch $@

$(VENV)/.deps-test: $(VENV)/.deps
	$(BIN)/python -m pip install -q $$($(BIN)/python .ci/requirements.py test)
	touch $@

# The type checker reads the types of all that is imported, extras too.
$(VENV)/.lint: $(VENV)/.deps-test
	$(BIN)/python -m pip install -q $$($(BIN)/python .ci/requirements.py --only lint)
	touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built-test: $(VENV)/.built $(VENV)/.deps-test
	touch $@

# The native ops' tests on an AddressSanitizer and UBSan build, in a copy of the package that shadows the installed one;
# the CUDA kernels' host build is sanitized, too. `kernels` are Triton's, which have nothing native here. Without -P the
# current folder would come first, and with it the installed build: tests/conftest.py refuses that.
SANITIZED := build/sanitize
NATIVE_TESTS ?= tests/ops/test_hash_encode.py tests/ops/test_field.py tests/ops/test_march_rays.py \
	tests/ops/test_composite.py tests/ops/test_update_occupancy.py tests/ops/test_render_op.py \
	tests/nerfacc_compat tests/scene/nerf/test_renderer.py tests/scene/nerf/test_volume.py \
	tests/scene/test_background.py tests/ops/test_geglu.py tests/ops/test_group_norm_silu.py \
	tests/ops/test_winograd.py tests/ops/test_cross_view_attention.py tests/ops/test_rasterize.py \
	tests/ops/test_interpolate.py tests/ops/test_antialias.py tests/ops/test_texture.py tests/ops/test_cuda_host.py
sanitize: $(VENV)/.built-test
	mkdir -p $(SANITIZED)/site
	rm -rf $(SANITIZED)/site/mvdream_fast && cp -r mvdream_fast $(SANITIZED)/site/ && rm -f $(SANITIZED)/site/mvdream_fast/_C*
	cp -r kernels $(SANITIZED)/site/mvdream_fast/kernels
	$(BIN)/cmake -S . -B $(SANITIZED)/tree -G Ninja -DMVDREAM_FAST_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DMVDREAM_FAST_OUTPUT=$(abspath $(SANITIZED)/site/mvdream_fast)
	$(BIN)/cmake --build $(SANITIZED)/tree
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(abspath $(SANITIZED)/site) MVDREAM_FAST_SANITIZE=1 \
		$(BIN)/python -P -m pytest -m "not slow" -k "not kernels" -p no:cacheprovider --timeout 2400 $(NATIVE_TESTS) $(ARGS)

clean:
	rm -rf build mvdream_fast/_C*.so $(VENV)
