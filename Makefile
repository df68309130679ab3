# make install | demo | demo-camvid | test | test-fast | check | stress | lint | docs | benchmarks-page | figure | clean
# Every target creates .venv first if needed. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: install demo demo-camvid test test-fast check stress lint docs benchmarks-page figure clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python benchmarks/demo.py --output $(DEMO)

# Real photographs and a pretrained DINOv2, ten minutes: data/camvid and weights/dinov2-vits14 in MASKSTREAM_SHARED.
demo-camvid: install
	$(BIN)/python benchmarks/demo.py --output runs/demo-camvid --shared $(or $(MASKSTREAM_SHARED),../shared)

# Three processes on two cores: a third of the time, tests wait for timeouts, signals and servers.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal --durations 20

test: install
	$(PYTEST)

# Under a minute on two cores: skips tests that start processes or train.
test-fast: install
	$(PYTEST) -r fE --fast tests/unit

# What CI runs.
check: lint test

stress: install
	$(BIN)/python -m pytest -m stress -n 0

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/zensical build --strict --clean

benchmarks-page: install
	$(BIN)/python -m benchmarks.report

figure: demo
	cp $(DEMO)/run/evaluation/panels.png benchmarks/figures/demo.png

clean:
	rm -rf $(VENV) $(DEMO)
