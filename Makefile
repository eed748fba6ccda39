# make setup: a virtual environment in .venv      make test: set-up, then the tests
# make demo: set-up, then all three searches on the demo model
PYTHON ?= python3

.PHONY: setup demo test clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	PYTHON=.venv/bin/python bash demo/run.sh

test: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/python -m pytest -q tests

clean:
	rm -rf .venv results runs
