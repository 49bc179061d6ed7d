# `make demo` and `make test` do everything on a machine that has only Python 3.11 and make:
# both make .venv first, where it is missing or out of date.
# Options go through ARGS: make demo ARGS="..."; make test ARGS="tests/ops -k sigmoid".

ARGS ?=
SEEDS ?= 3

.DEFAULT_GOAL := help
.PHONY: help environment demo demo-seeds test fuzz slow bench-stack-exchange bench-sft bench-reward bench-dpo bench-ppo bench-rloo bench-raft bench-relatives bench-conformance bench-head bench-quality bench-rollout bench-memory bench-gpu mutants prove parity peers chaos bench-checkpoint lint check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile

environment: ## make or update .venv (PYTHON=python3.12 chooses the interpreter)
	@bash scripts/environment

demo: environment ## run the offline demonstration
	.venv/bin/fairlead demo $(ARGS)

demo-seeds: environment ## run the demonstration with several seeds (SEEDS=3, from 10 on)
	.venv/bin/fairlead demo --seed 10 --seeds $(SEEDS) $(ARGS)

test: environment ## run the tests
	.venv/bin/python -m pytest -n 2 $(ARGS)

fuzz: environment ## try every reader on many more hostile examples than the tests do
	.venv/bin/python -m pytest -n 2 -m slow tests/fuzz $(ARGS)

slow: environment ## run the slow tests only
	.venv/bin/python -m pytest -n 2 -m slow $(ARGS)

chaos: environment ## kill runs of eight algorithms 200 times each, and compare (ARGS="ppo --kills 20 --minutes 2")
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.chaos $(ARGS)

prove: environment ## hold the trainers against exact optima (ARGS="--case convergence")
	.venv/bin/fairlead prove $(ARGS)

lint: environment ## check style, format and types
	@bash scripts/check ruff format types

check: environment ## lint and test, as before every push
	@bash scripts/check

bench-stack-exchange: environment ## time `prepare stack-exchange` (FAIRLEAD_DATA=folder ARGS="--sizes 20")
	.venv/bin/python benchmarks/stack_exchange.py $(ARGS)

bench-sft: peers ## time SFT beside TRL (FAIRLEAD_DATA=folder ARGS="--sizes S")
	.venv/bin/python benchmarks/sft.py $(ARGS)

bench-reward: peers ## time a reward model beside TRL (FAIRLEAD_DATA=folder ARGS="--sizes S")
	.venv/bin/python benchmarks/reward.py $(ARGS)

bench-dpo: peers ## time DPO beside TRL (FAIRLEAD_DATA=folder ARGS="--sizes S")
	.venv/bin/python benchmarks/dpo.py $(ARGS)

bench-ppo: environment ## time PPO beside the last TRL that has it (FAIRLEAD_DATA=folder ARGS="--steps 2")
	@bash scripts/peers ppo
	.venv/bin/python benchmarks/ppo.py $(ARGS)

bench-rloo: peers ## time RLOO and GRPO beside TRL (FAIRLEAD_DATA=folder ARGS="--steps 2")
	.venv/bin/python benchmarks/rloo.py $(ARGS)

bench-raft: peers ## time RAFT beside generate and TRL's SFT (FAIRLEAD_DATA=folder ARGS="--sizes S --steps 1")
	.venv/bin/python benchmarks/raft.py $(ARGS)

bench-relatives: environment ## compare RAFT, PPO and forms of DPO on the demo's world (ARGS="--seeds 20")
	.venv/bin/python -m benchmarks.relatives $(ARGS)

bench-conformance: peers ## the tables of `fairlead prove`, and TRL on the same tasks (ARGS="--case rloo")
	.venv/bin/python -m benchmarks.conformance $(ARGS)

bench-head: peers ## time log-probabilities over a vocabulary beside TRL (ARGS="--sizes S")
	.venv/bin/python benchmarks/head.py $(ARGS)

bench-quality: peers ## compare held-out accuracy of reward models and DPO with TRL's (FAIRLEAD_DATA=folder ARGS="--limit 40")
	.venv/bin/python benchmarks/quality.py $(ARGS)

bench-rollout: environment ## time sampling beside transformers.generate (FAIRLEAD_DATA=folder ARGS="--sizes S")
	.venv/bin/python benchmarks/rollout.py $(ARGS)

bench-memory: environment ## peak memory of PPO with four roles on one base (ARGS="--layers 2 --width 64")
	.venv/bin/python benchmarks/memory.py $(ARGS)

mutants: environment ## seed the defects of tests/mutants one at a time: does a test fail? (ARGS="--only ops/kl.py")
	.venv/bin/python -m tests.mutants $(ARGS)

bench-checkpoint: environment ## what checkpoints cost of a run's time (ARGS="--minutes 1")
	.venv/bin/python benchmarks/checkpoint.py $(ARGS)

bench-gpu: environment ## check and measure every stage on one NVIDIA GPU (ARGS="--out FILE --size 0.5B")
	.venv/bin/python -m benchmarks.gpu $(ARGS)

parity: environment ## gradients and sampled texts on 2 and 4 ranks beside one process (ARGS="--sizes 2 --algorithms sft")
	.venv/bin/python -m benchmarks.parity $(ARGS)

peers: environment ## make or update benchmarks/peers/.venv, with the libraries Fairlead is compared with
	@bash scripts/peers

clean: ## remove .venv, benchmarks/peers/.venv*, caches and build results; runs/ stays
	rm -rf .venv .venv.lock benchmarks/peers/.venv* build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
