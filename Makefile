# The two commands of a user (train, test) and those of a developer. `make help` lists them.

PYTHON_VERSION := 3.11
PYTHON ?= $(shell command -v python$(PYTHON_VERSION) || echo python3)
EXTRAS ?= dev,s3,gcs,k8s,tensorboard
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
DOCS_INSTALLED := $(VENV)/.docs-installed

# Some machines forbid Python to keep bytecode: then each of the hundreds of processes that the tests
# start compiles all of the code again, and pytest rewrites all of the tests.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help train test test-oldest quick long chaos cluster gpu zoo check format docs install constraints clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

train: $(INSTALLED)  ## The main job: environment, data, pretraining, evaluation, export
	@$(BIN)/mhe train configs/quickstart.yaml

# Three processes, on machines with two cores or more: many tests wait for processes that start. A
# file's tests stay together, since they share what they prepare. The long ones come first, by name.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder --durations 15
PYTEST := $(BIN)/python -m pytest $(PARALLEL)

test: $(INSTALLED)  ## Environment if it is missing, then the test suite without what takes longest
	$(PYTEST)

test-oldest: $(OLDEST_INSTALLED)  ## Unit and distributed tests with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest $(PARALLEL) tests/unit tests/distributed

long: $(INSTALLED)  ## The tests that make test leaves out, but for faults: an hour or so
	$(PYTEST) -m 'long and not chaos'

quick: $(INSTALLED)  ## After each change: unit tests, one exactness case of each head; three minutes
	$(PYTEST) -q -m 'not slow and not long' tests/unit \
	  tests/distributed/test_heads_exact.py tests/distributed/test_level_heads.py \
	  -k 'unit or (test_equals_one_plain_process and cosface and not labels)'

chaos: $(INSTALLED)  ## Many random faults; the seed is printed, MHE_CHAOS_SEED=... repeats it
	MHE_CHAOS_FAULTS=$${MHE_CHAOS_FAULTS:-28} $(BIN)/python -m pytest -s -m chaos

cluster: $(INSTALLED)  ## Test jobs and tasks on a Ray cluster of two raylets alone
	$(BIN)/python -m pytest -m cluster tests/e2e/test_cluster.py

gpu: $(INSTALLED)  ## What only a GPU can show, on one GPU: at most eight minutes; table and runs/gpu/gpu.json
	$(BIN)/python -m pipelines.bench.gpu --out runs/gpu

zoo: $(INSTALLED)  ## One model of each family of timm: three steps, both exports; goes on where it stopped
	$(BIN)/python -m pipelines.bench.zoo --page docs/zoo.md

check: $(INSTALLED)  ## Format, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Not --quiet: MkDocs counts only the warnings that it prints, and would let all of them pass.
docs: $(DOCS_INSTALLED)  ## The documentation site, in site/: strict, links between pages checked; ten seconds
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html can be opened as it is: it needs no network and no server."

install: $(INSTALLED)  ## The environment alone, in .venv

constraints: $(INSTALLED) $(DOCS_INSTALLED)  ## Write constraints.txt from what .venv holds (see CONTRIBUTING.md)
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip list --format=freeze --exclude-editable \
	   | grep -v -E '^(pip|wheel)=='; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove the environment and caches; data and runs stay
	rm -rf $(VENV) $(OLDEST) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What a command prints goes to a file; where it fails, the end of that is shown and the file named.
# In a terminal a mark turns meanwhile, as long as the shell lives that started it.
LOG = $(@D)/install.log
spin = stop() { [ -z "$$mark" ] || { kill $$mark; printf '\r \r'; mark=; }; }; \
  trap stop EXIT; trap 'exit 130' INT TERM; mark=; \
  if [ -t 1 ]; then while kill -0 $$$$; do \
    for each in '|' / - '\'; do printf '\r%s' "$$each"; sleep 0.2; done; \
  done 2>/dev/null & mark=$$!; fi
logged = @$(spin); $(1) >$(LOG) 2>&1 || { stop; tail -n 20 $(LOG); \
  echo "This failed: $(LOG) has all of it."; exit 1; }

$(OLDEST_INSTALLED): PYTHON_VERSION := 3.10
$(INSTALLED): pyproject.toml constraints.txt
$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
# pip would compile 27,000 files on one core; compileall fails where one is for another Python.
$(INSTALLED) $(OLDEST_INSTALLED):
	@test -x $(@D)/bin/python || { echo "Making a virtual environment in $(@D)."; \
	  $(PYTHON) -m venv $(@D); } || { rm -rf $(@D); \
	  echo "$(PYTHON) cannot make a virtual environment: install Python $(PYTHON_VERSION) with its venv module" \
	  "(Debian, Ubuntu: apt install python3-venv), or name one: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	@echo "Installing the pinned dependencies in $(@D): a few minutes, 7 GB."
	$(call logged,{ $(@D)/bin/python -m pip install --disable-pip-version-check --no-compile \
	  -c $(filter constraints%,$^) -e '.[$(EXTRAS)]' && \
	  { $(@D)/bin/python -m compileall -q -j 0 $(@D)/lib || true; }; })
	@touch $@

# Twenty small packages that no test needs.
$(DOCS_INSTALLED): $(INSTALLED)
	@echo "Installing what the documentation site needs."
	$(call logged,$(BIN)/python -m pip install --disable-pip-version-check \
	  -c constraints.txt -e '.[docs]')
	@touch $@
