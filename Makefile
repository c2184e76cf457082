# `make demo` and `make test` need nothing but Python: either makes the environment once and uses it from then on.
PYTHON ?= python3
VENV ?= .venv
OUT ?= sta-demo
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
BIN := $(VENV)/bin

.PHONY: demo test test-old test-lmms-eval torture lint docs build audit sbom clean

demo: $(VENV)/.ready
	$(BIN)/sta-adapter demo --out $(OUT) $(DEMO_ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The contract, the goldens and the adapter format on the oldest and the last 4.x release of transformers.
test-old: .venv-4.45.2/.ready .venv-4.57.6/.ready
	.venv-4.45.2/bin/python -m pytest $(PYTEST_ARGS) $(OLD_TESTS)
	.venv-4.57.6/bin/python -m pytest $(PYTEST_ARGS) $(OLD_TESTS)

OLD_TESTS := tests/test_contract.py tests/test_goldens.py tests/test_checkpoint.py tests/test_inject.py \
	tests/test_tiny_base.py tests/test_videorope.py tests/test_videorope_backbone.py tests/test_videorope_changes.py \
	tests/test_qwen2_vl_positions.py tests/test_internvideo2.py tests/test_internvideo2_5.py tests/test_clip_sources.py \
	tests/test_inspection.py tests/test_plugin.py

# Models with STA inside lmms-eval. It pins an older PyAV than ours, with which it runs all the same, and brings a hundred
# packages: an environment of its own, over the main one, with those that it needs for this.
test-lmms-eval: .venv-lmms-eval/.ready
	.venv-lmms-eval/bin/python -m pytest tests/lmms_eval_plugin

LMMS_EVAL := lmms-eval==0.7.3
LMMS_EVAL_NEEDS := datasets evaluate loguru tenacity sacrebleu pytablewriter qwen-vl-utils python-dotenv jsonlines aiohttp httpx

# The attacks: bounded to about 20 minutes on two cores; docs/reliability.md tells what they are.
torture: $(VENV)/.ready
	STA_TORTURE_MACHINES=200 $(BIN)/python -m pytest $(PYTEST_ARGS) --dist worksteal --durations 12 tests/torture tests/test_random_use.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sta_adapter backbones

# The site, in build/site. Each warning is an error; no network is needed.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.ready
	$(BIN)/python -m build

# Known vulnerabilities of what is installed; asks the advisory database, so it needs the network.
audit: $(VENV)/.ready .venv-tools/.ready
	.venv-tools/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# What the package was built and tested with, in CycloneDX's format.
sbom: $(VENV)/.ready .venv-tools/.ready
	mkdir -p dist
	.venv-tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-format JSON -o dist/sbom.cdx.json

.venv-tools/.ready:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet pip-audit cyclonedx-bom
	touch $@

clean:
	rm -rf $(VENV) .venv-4.45.2 .venv-4.57.6 .venv-lmms-eval .venv-tools build dist *.egg-info

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# Older releases of transformers lie over the main environment, so that torch is installed once.
.venv-4.45.2/.ready: PINS := transformers==4.45.2 peft==0.13.2 'accelerate<1.5'
.venv-4.57.6/.ready: PINS := transformers==4.57.6 'peft<0.19'
.venv-%/.ready: $(VENV)/.ready
	$(PYTHON) -m venv .venv-$*
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "$$main" > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	.venv-$*/bin/python -m pip install --quiet $(PINS)
	.venv-$*/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.venv-lmms-eval/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "$$main" > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(@D)/bin/python -m pip install --quiet --no-deps $(LMMS_EVAL)
	$(@D)/bin/python -m pip install --quiet $(LMMS_EVAL_NEEDS)
	$(@D)/bin/python -m pip install --quiet --no-deps -e .
	touch $@
