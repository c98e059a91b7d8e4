# `make demo` and `make test` are all a fresh machine with Python 3.10+ needs: both build the environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# each measures medcl and what a user would run instead turn by turn; --help of each tells more
BENCHMARKS := crop_reads view_building pretrain_step margin_step prediction startup_scale mil_bags

.PHONY: demo test test-all lint bench bench-gpu clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python pipelines/demo.py

# the small representatives of long batteries; `test-all` runs these whole, as before a release
test: $(VENV)/ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m ""

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	for name in $(BENCHMARKS); do echo "== $$name"; OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/$$name.py $(BENCH) || exit 1; done

bench-gpu: $(VENV)/ready
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU here')"
	$(BIN)/python benchmarks/view_building.py --device cuda
	$(BIN)/python benchmarks/pretrain_step.py --backbone swin_unetr --crop 96 --precision bf16
	$(BIN)/python benchmarks/prediction.py

clean:
	rm -rf $(VENV)
