PYTHON ?= python3
DATA ?= digits
# Beside the newest NVRTC, which constraints.txt names: what CUDA builds of torch bring.
NVRTC := nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-nvrtc==13.0.88
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Idle threads sleep instead of spinning: several times faster when the cores are shared.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test survival rehearsal lint clean

# Trains, samples and scores a small DiS; run again, it resumes, or shows what is there already.
demo: $(READY)
	$(BIN)/dis-ssm train experiments/configs/$(DATA).toml --out runs/$(DATA)
	$(BIN)/dis-ssm sample runs/$(DATA)
	$(BIN)/dis-ssm score runs/$(DATA)

# Training on many processes: the same result, to rounding, at any width, and after every fault.
survival: $(READY)
	$(BIN)/python -m pytest -m "distributed and not slow"

# The ImageNet recipe in small: photographs, VAE, latents, two processes, a kill, samples.
rehearsal: $(READY)
	$(BIN)/python experiments/rehearsal.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	[ "$$(uname)" != Linux ] || for wheel in $(NVRTC); do $(BIN)/python -m pip install --quiet \
	  --no-deps --upgrade --target $(VENV)/nvrtc/$$wheel $$wheel || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
