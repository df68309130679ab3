# make install | demo | demo-camvid | test | test-fast | check | gpu-check | gpu-wheels | stress | lint | docs | benchmarks-page | figure | clean
# Every target creates .venv first if needed. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
GPU_WHEELS := obstore simplejpeg tenacity pydantic pydantic-core annotated-types typing-inspection webdataset braceexpand

.PHONY: install demo demo-camvid test test-fast check gpu-check gpu-wheels stress lint docs benchmarks-page figure clean

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

# On a machine with a GPU, without network: proves what only CUDA runs, then measures it.
gpu-check:
	$(PYTHON) -m pytest -q -W default -p no:cacheprovider tests/gpu --device cuda
	$(PYTHON) -m benchmarks.gpu

# Wheels of what GPU hosts often lack, for `pip install --no-index --find-links wheels ...` where there is no network.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
	    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --constraint constraints.txt \
	    --dest wheels $(GPU_WHEELS)

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
