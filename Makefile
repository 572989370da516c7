# Everything runs in its own .venv on a machine without an accelerator.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ENGINE := 0.5.23
NEEDS := launch/requirements
# of soaking, for each configuration; one of them alone: make soak ONLY=tight-late MINUTES=15
MINUTES ?= 10
ONLY ?= *
# two workers, a core for each: with a third, a server that starts may miss the engine's own timeout;
# what shares a server is in one file. Servers side by side cannot leave 10 GiB free for each other.
TESTS := EXT_CPU_HOST_RESERVE_GB=2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check bench bench-micro kits soak clean

demo: .venv/base
	$(BIN)/python -m launch.demo

test: .venv/ready
	$(TESTS)

# the whole matrix, and long runs
test-all: .venv/ready
	$(TESTS) --full

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: bench-micro
	$(BIN)/python -m launch.bench.hits --out out/hits.json
	$(BIN)/python -m launch.bench.pairs --shape no-reuse --out out/no_reuse.json
	$(BIN)/python -m launch.bench.pairs --shape multi-turn --out out/multi_turn.json
	$(BIN)/python -m launch.bench.plots --data out --out out

bench-micro: .venv/base
	$(BIN)/python -m launch.bench.core --out out/core.json
	$(BIN)/python -m launch.bench.copies --out out/copies.json

# SGLang's kits on every kind of server
kits: .venv/ready
	$(BIN)/python -m pytest tests/kits --all-kits --kits-out out/kits.json
	$(BIN)/python -m tests.kits.table out/kits.json

soak: .venv/ready
	$(BIN)/python -m sglang_ext.testing.machine --steps 2000000 --processes 2
	$(BIN)/python -m sglang_ext.testing.simulation --seeds 200 --ranks 4 --steps 5000 --processes 2
	$(BIN)/python -m sglang_ext.testing.simulation --seeds 200 --ranks 3 --steps 3000 --processes 2 --storage
	$(BIN)/python -m tests.soak.kill --kills 100
	$(BIN)/python -m tests.soak.storm --minutes $(MINUTES) --tp 1 --out out/storm.json
	$(BIN)/python -m tests.soak.storm --minutes $(MINUTES) --tp 2 --out out/storm_tp2.json
	$(BIN)/python -m tests.soak.server --minutes $(MINUTES) --only '$(ONLY)' --out out/soak.json
	$(BIN)/python -m tests.soak.server --minutes $(MINUTES) --only tight-late --drafts mimo-v2 --out out/soak_mimo_v2.json
	$(BIN)/python -m tests.soak.server --minutes $(MINUTES) --only tight-late --drafts eagle3 --out out/soak_eagle3.json

# torch first: SGLang pins it, and nothing else may pull another build.
.venv/base: $(addprefix $(NEEDS)/,engine.txt cpu.txt) pyproject.toml launch/platform/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r $(NEEDS)/engine.txt
	$(BIN)/pip install -q -r $(NEEDS)/cpu.txt
	$(BIN)/pip install -q --no-deps sglang==$(ENGINE)
	$(BIN)/pip install -q --no-deps -e . -e launch/platform
	touch $@

# what servers need for a demo is there; what tests need beside it
.venv/ready: .venv/base $(addprefix $(NEEDS)/,tools.txt mooncake.txt)
	$(BIN)/pip install -q -r $(NEEDS)/tools.txt
	$(BIN)/pip install -q --no-deps -r $(NEEDS)/mooncake.txt
	sh launch/mooncake_libraries.sh .venv/mooncake
	touch $@

clean:
	rm -rf .venv out .models
