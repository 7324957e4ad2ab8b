# `make` alone lists the targets. Everything that they need is set up by tools/setup on the way.

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak boot check format docs reliability bench bench-peers bench-report clean distclean

# The tools of the virtual environment first; sbin last, since mkfs.ext4 lives there and needs no root.
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin:/sbin

WORKERS ?= 3
ARGS ?=
BENCH ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv and install what is needed (also done by every target that needs it)
	@tools/setup

demo: setup ## back up, change, compare and restore small real VMs, as folders and on a stand-in host (KEEP=1 keeps the files)
	@demo/run
	@python -m demo.esxi_tour

test: setup ## run all tests; ARGS='-k name' passes options to pytest, WORKERS=n sets the processes
	pytest -n $(WORKERS) --dist=worksteal $(ARGS)

soak: setup ## the engine's tests with many more kills, cuts, flips and cases, and gigabytes of data
	HOLDFAST_SOAK=1 pytest -n $(WORKERS) --dist=worksteal tests/repo tests/ssh/test_cuts.py tests/esxi/flow/test_faults.py $(ARGS)

boot: setup ## boot a real Debian from a mounted restore point (as root; installs an emulator); some minutes
	tests/guest/install_tools
	pytest -p no:xdist -rA tests/guest $(ARGS)

check: setup ## lint, format, types, import contracts and the project's own rules; seconds
	ruff check
	ruff format --check
	mypy
	mypy --strict tools/*.py rescue.py
	mypy --strict -p tests.esxi_host
	mypy --strict -p demo
	lint-imports
	pytest -q -p no:xdist tests/project/test_tidy.py

format: setup ## put the code into the project's format, and fix what ruff can fix
	ruff format
	ruff check --fix

docs: setup ## write the generated documents anew, but for those that take minutes (reliability, bench-report)
	python tools/exit_codes.py --write
	python tools/protocol.py --write

reliability: setup ## interrupt every command at every step, and write docs/RELIABILITY.md from what is left; minutes
	PYTHONPATH=tests/repo OPENBLAS_NUM_THREADS=1 python -m rig.reliability $(ARGS)

bench: setup ## measure Holdfast against its ceilings; BENCH='--images FOLDER --runs 3' as benchmarks/compare.py takes them
	python -m benchmarks.compare holdfast $(BENCH)

bench-peers: setup ## the same side by side with borg, restic, casync, zstd and cp (installs them)
	benchmarks/install_peers
	python -m benchmarks.compare peers --borg benchmarks/cache/borg/bin/borg $(BENCH)

bench-report: setup ## write docs/BENCHMARKS.md; BENCH='--publish peers=benchmarks/results/FILE.json' takes in a result
	pip install --quiet --disable-pip-version-check --editable '.[bench]'
	python -m benchmarks.report $(BENCH)

clean: ## remove caches and build products
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find holdfast tests benchmarks demo tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment as well
	rm -rf .venv
