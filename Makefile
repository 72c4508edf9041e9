# Two commands do everything: `make demo` and `make test`. Both create the virtual environment on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types contracts unit docs calibration clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,dp,federated]"
	touch $@

demo: $(VENV)/.installed  ## find, edit, attack and judge on the embedded model; succeeds when the run completed
	@$(BIN)/repforget run experiments/quickstart/recipe.yaml --out runs/quickstart; \
	code=$$?; case $$code in 0|10|11) exit 0;; *) exit $$code;; esac

test: lint types contracts unit  ## linters, types, import contracts and the whole test suite

lint: $(VENV)/.installed
	$(BIN)/ruff check .
types: $(VENV)/.installed
	$(BIN)/mypy
contracts: $(VENV)/.installed
	$(BIN)/lint-imports
unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.installed  ## regenerate the blocks that tests check
	$(BIN)/python -m repforget.cli.docs

calibration: $(VENV)/.installed  ## measure the judge again and bring table and picture of docs/calibration.md up to date
	OMP_NUM_THREADS=1 $(BIN)/repforget calibrate --out runs/calibration --jobs $(WORKERS)
	cp runs/calibration/calibration.json repforget/verify/calibration.json
	$(BIN)/python -m repforget.cli.docs

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
