# Everything a newcomer needs. Settings: PYTHON (3.11 or newer), OMP_NUM_THREADS (1: the same bits whatever the number
# of cores, and no collapse where threads outnumber free cores; raise it on a larger idle machine).
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := train,serve,client,tracing,pipelines,synthesis,dev
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export OMP_NUM_THREADS ?= 1
export SONORANT_RUNS := $(CURDIR)/runs

.PHONY: demo speech study test test-all check serve images test-images lock clean

demo: $(INSTALLED) ## run the whole workflow on the built-in corpus, to an evaluation report
	@echo "== dvc repro: prepare, cluster, pretrain, ground, align, publish, evaluate (params.yaml)"
	dvc repro
	@cat artifacts/report/table.txt
	@echo "report: $(CURDIR)/artifacts/report/report.html"

S := artifacts/speech
C := --config recipes/runs/speech.yaml
speech: $(INSTALLED) ## the same steps on recorded speech: ../shared/data, 40 training speakers, about 45 minutes
	sonorant prepare $C --corpus $S/corpus
	sonorant cluster $C --corpus $S/corpus --units $S/units
	sonorant pretrain $C --corpus $S/corpus --units $S/units --encoder $S/encoder
	sonorant publish $C --corpus $S/corpus --encoder $S/encoder --model $S/model
	sonorant evaluate $C --corpus $S/corpus --model $S/model --report $S/report-speechocean
	sonorant evaluate $C --set evaluate.source=timit_sample --corpus $S/corpus --model $S/model --report $S/report-timit

STUDY := sonorant study --jobs $(shell nproc) --folder build/study
study: $(INSTALLED) ## what five papers claim, tested again on ../shared/data: under two hours on two cores, resumable
	$(STUDY) targets granularity online-clustering --config recipes/runs/study.yaml
	$(STUDY) alignment --config recipes/runs/study.yaml --config recipes/measures/transcripts.yaml
	$(STUDY) schedules --config recipes/runs/digits.yaml --config recipes/measures/elsewhere.yaml

# A file's tests stay in one process, for they share what they have made.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile
test: $(INSTALLED) ## lint, types and every test that is not marked slow
	@echo "== ruff, mypy"
	ruff check .
	mypy
	@echo "== pytest"
	pytest $(PARALLEL) -m "not slow"

test-all: $(INSTALLED) ## the slow tests too
	pytest $(PARALLEL)

check: $(INSTALLED) ## lint and types alone
	ruff check .
	mypy

serve: $(INSTALLED) ## answer on http://127.0.0.1:8000 with the model that `make demo` published
	@test -f artifacts/model/artifact.json || { echo "artifacts/model: found no model, wanted one: run make demo first" >&2; exit 1; }
	python -m serving --model artifacts/model --host 127.0.0.1 --port 8000

images: $(INSTALLED) ## build sonorant-serve and sonorant-train with docker, podman or buildah; sizes and SBOMs in build/images
	python docker/images.py build

test-images: $(INSTALLED) ## build them, then run a server, one embedding and a tiny training inside
	python docker/images.py test

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== virtual environment and packages, pinned by constraints.txt (about three minutes the first time)"
	@test -n "$(PYTHON)" || { echo "python: found none of version 3.11 or newer, wanted one: install it or set PYTHON" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

COMPILE := uv pip compile --python-version 3.11 --no-emit-index-url --no-annotate --no-header --quiet
HASHED := $(COMPILE) --generate-hashes --constraints constraints.txt
lock: ## renew constraints.txt from pyproject.toml, and from it the hashed requirements of the images
	$(COMPILE) pyproject.toml --extra train --extra serve --extra client --extra tracing --extra pipelines --extra synthesis --extra dev \
	  --upgrade -o constraints.txt
	$(HASHED) pyproject.toml --extra serve --extra store --no-emit-package triton -o docker/requirements-serve.txt
	$(HASHED) pyproject.toml --extra train --extra synthesis --extra pipelines -o docker/requirements-train.txt
	echo hatchling | $(HASHED) - -o docker/requirements-build.txt
	echo setuptools | $(HASHED) - -o docker/requirements-setuptools.txt

clean: ## remove the environment, artifacts and run directories
	rm -rf $(VENV) artifacts runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
