# make run     set up what is missing, build, and train: the main job
# make sweep   set up, and run a pipeline's sweep: PIPELINE=pipelines/ablations/replay.yaml, with a tiny model
# make test    set up what is missing, and run all tests
# make lint    formatting, clippy and documentation, warnings denied
# make bench   measure against a peer in PyTorch, and write BENCHMARKS.md; about an hour, BENCH= takes options
# make bench-gpu  the same comparison on a GPU, with random models of 1B and 8B parameters:
#                 LIBTORCH_USE_PYTORCH=1 make bench-gpu BENCH="--python $(which python3)"
# make bench-growth  how time and memory grow, into GROWTH.md; a random model, no peer
# make setup   what the others set up: libtorch, the build, a model, data
#
# PIPELINE=pipelines/sapo_dpo.yaml runs another pipeline. Everything fetched is kept (scripts/setup.py says where), so a
# second time starts at once. LIBTORCH or LIBTORCH_USE_PYTORCH in the environment: that libtorch is used, none fetched.

.PHONY: help run sweep test bench bench-gpu with-cuda bench-growth lint setup libtorch build model data tiny-model

PIPELINE ?= pipelines/sapo_orpo.yaml
PYTHON ?= python3
TARGET := $(or $(CARGO_TARGET_DIR),target)
SAPO_FLOW := $(TARGET)/release/sapo-flow
SETUP := $(PYTHON) scripts/setup.py

# The pipelines carry full-size settings, and in their headers the overrides for a small machine: what `make run` passes.
# SMALL= runs a pipeline as it is.
SMALL = $(shell sed -n 's/^\# small machine: //p' $(PIPELINE))

# Build scripts run elsewhere, where a relative path would mean something else.
ifdef LIBTORCH
export LIBTORCH := $(abspath $(LIBTORCH))
endif

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

run: setup
	$(SAPO_FLOW) run $(PIPELINE) $(SMALL)

# SWEEP="--jobs 2" and the like.
sweep: setup tiny-model
	$(SAPO_FLOW) sweep $(PIPELINE) $(SMALL) $(SWEEP)

tiny-model: data
	@$(PYTHON) scripts/tiny_model.py models/tiny data/chat.jsonl

setup: libtorch build data
	@$(SETUP) model --sapo-flow $(SAPO_FLOW)

libtorch:
	@$(SETUP) libtorch

build: libtorch
	@echo "build: cargo, release profile; the first time 5 to 15 minutes on 2 cores, later seconds"
	cargo build --release --workspace

data:
	@$(SETUP) data

# One build profile serves the tests and the import of the model that some of them read.
# Many tests run at a time, so each gets by with one thread.
test: export OMP_NUM_THREADS := 1
test: libtorch data
	@echo "build: cargo, test profile; the first time 5 to 15 minutes on 2 cores, later seconds"
	cargo build --workspace
	@$(SETUP) model --sapo-flow $(TARGET)/debug/sapo-flow
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --workspace; \
	else set -x; cargo test --workspace --lib --bins --tests --examples; fi
	cargo test --workspace --doc

# No test: it takes long, and nothing depends on its figures. BENCH="--minutes 10" and the like: see benches/bench.py.
bench: setup
	cargo build --release --workspace --example decode_speed
	$(PYTHON) benches/bench.py --sapo-flow $(SAPO_FLOW) $(BENCH)

# libtorch as `make libtorch` fetches it is for the CPU. What is built here is built against one with CUDA.
with-cuda:
	@test -n "$(LIBTORCH)$(LIBTORCH_USE_PYTORCH)" || { echo "bench-gpu needs a libtorch with CUDA, your PyTorch's or" \
	"another (LIBTORCH):"; echo '  LIBTORCH_USE_PYTORCH=1 make bench-gpu BENCH="--python $$(which python3)"'; exit 1; }

# BENCH takes options: see benches/gpu.py.
bench-gpu: with-cuda build data
	cargo build --release --workspace --example decode_speed
	$(PYTHON) benches/gpu.py --sapo-flow $(SAPO_FLOW) $(BENCH)

bench-growth: build
	$(PYTHON) benches/growth.py --sapo-flow $(SAPO_FLOW) $(BENCH)

lint: libtorch
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
