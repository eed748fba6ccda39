# make setup: a virtual environment in .venv      make test: set-up, then the tests
# make demo: set-up, then all three searches on the demo model      make lint: ruff, see ruff.toml
# make test-kernels: Triton's kernels without a GPU, interpreted and compiled
# make test-runtimes: exports loaded by llama.cpp and MLX
PYTHON ?= python3

.PHONY: setup demo test lint test-kernels test-runtimes real tables-small clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	PYTHON=.venv/bin/python bash demo/run.sh

test: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/python -m pytest -q tests -n 2 --dist loadfile \
	    -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

lint: setup
	.venv/bin/ruff check .

# Triton goes beside the packages, not among them: the other tests are of what requirements.txt installs
.venv/triton/ready: .venv/ready requirements-kernels.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) \
	    -r requirements-kernels.txt
	touch $@

test-kernels: .venv/triton/ready
	PYTHONPATH=.venv/triton TRITON_INTERPRET=1 .venv/bin/python -m pytest -q tests/test_kernels.py
	PYTHONPATH=.venv/triton .venv/bin/python -m pytest -q -s tests/test_kernels_compiled.py

# so do the runtimes that load exports
.venv/runtimes/ready: .venv/ready requirements-gguf.txt requirements-mlx.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) \
	    -r requirements-gguf.txt -r requirements-mlx.txt
	touch $@

test-runtimes: .venv/runtimes/ready
	PYTHONPATH=.venv/runtimes HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/python -m pytest -q \
	    tests/test_formats_mlx.py tests/test_formats_gguf.py tests/test_kquants.py tests/test_file_budget.py \
	    tests/test_import_levels.py tests/test_embeddings.py -k "formats or gguf or llama_cpp or mlx"

# a real pretrained model end to end, SmolLM2-135M or MODEL=folder, DATA= its calibration text, EVAL_DATA= what it is
# evaluated on, PARTS= of "depth bits sparsity", SEEDS=, JOBS= at once, DTYPE=; run again to go on
real: .venv/runtimes/ready
	PYTHONPATH=.venv/runtimes .venv/bin/python benchmarks/real.py $(if $(MODEL),--model_name_or_path $(MODEL)) \
	    $(if $(DATA),--data $(DATA)) $(if $(EVAL_DATA),--eval_data $(EVAL_DATA)) $(if $(PARTS),--parts $(PARTS)) \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(DTYPE),--dtype $(DTYPE)) \
	    $(if $(OUT),--out $(OUT))

clean:
	rm -rf .venv

# every table script on the demo model, scaled down: for a nightly run
tables-small: setup
	for script in scripts/table_*.sh scripts/ablation_mutation.sh scripts/superfast.sh scripts/nonmonotonicity.sh \
	    scripts/convergence.sh; do PYTHON=.venv/bin/python SMALL=1 bash $$script || exit 1; done
