# Each target sets up what it needs: the environment is made once and again when setup.py or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := noisycond pipelines tests $(wildcard *.py) $(wildcard benchmarks/*.py)

STUDY ?= quick

.PHONY: help demo study personalization test quality style first-stages digits-classifier clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           train a miniature on handwritten digits, look at its samples and measure it (4 minutes)"
	@echo "make study          run a study, tables, figures and report included, STUDY=quick (ten minutes), digits (a night)"
	@echo "make personalization   compare a ControlNet on a clean base with one on a CEP base, on digits, SEEDS=\"0 1 2\""
	@echo "make test           run the tests"
	@echo "make quality        check lint and format;  make style  mends them"
	@echo "make first-stages   train the two first stages that ship with the repo anew"
	@echo "make digits-classifier   train the classifier of digits that ships with the repo anew (2 minutes on 1 core)"

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "noisycond needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/accelerate launch train_class_cond.py --output_dir runs/demo --overwrite_output_dir
	rm -rf runs/demo-evaluation
	$(BIN)/accelerate launch evaluate_model.py --recipe digits_evaluation --pipeline runs/demo --output_dir runs/demo-evaluation

study: $(READY)
	$(BIN)/python study.py $(STUDY)

# Two bases, clean and with CEP, a ControlNet on each, and one table of both with the spread over SEEDS. A run that ended
# has written its last file and is not repeated; one that was cut goes on from its last checkpoint. Each list of seeds
# has a table of its own.
SEEDS ?= 0 1 2
COMPARED := runs/personalization
CLEAN_BASES := $(SEEDS:%=$(COMPARED)/base-clean-%/model_index.json)
CEP_BASES := $(SEEDS:%=$(COMPARED)/base-cep-%/model_index.json)
CLEAN_CONTROLNETS := $(SEEDS:%=$(COMPARED)/controlnet-clean-%/README.md)
CEP_CONTROLNETS := $(SEEDS:%=$(COMPARED)/controlnet-cep-%/README.md)
COMMA := ,
EMPTY :=
joined = $(subst $(EMPTY) $(EMPTY),$(2),$(strip $(1)))
group = $(call joined,$(patsubst %/README.md,%,$(1)),$(COMMA))
COMPARISON := $(COMPARED)/evaluation-$(call joined,$(SEEDS),-)

personalization: $(COMPARISON)/metrics.md
	@echo "The table: $<"

$(CLEAN_BASES): $(COMPARED)/base-clean-%/model_index.json: | $(READY)
	$(BIN)/accelerate launch train_class_cond.py --recipe digits_ldm --cep_gamma 0 --seed $* --output_dir $(@D) --resume_from_checkpoint latest

$(CEP_BASES): $(COMPARED)/base-cep-%/model_index.json: | $(READY)
	$(BIN)/accelerate launch train_class_cond.py --recipe digits_ldm --seed $* --output_dir $(@D) --resume_from_checkpoint latest

$(CLEAN_CONTROLNETS) $(CEP_CONTROLNETS): $(COMPARED)/controlnet-%/README.md: $(COMPARED)/base-%/model_index.json | $(READY)
	$(BIN)/accelerate launch train_controlnet.py --recipe digits_controlnet --pretrained_model_name_or_path $(<D) \
		--seed $(lastword $(subst -, ,$*)) --output_dir $(@D) --resume_from_checkpoint latest

$(COMPARISON)/metrics.md: $(CLEAN_CONTROLNETS) $(CEP_CONTROLNETS) | $(READY)
	$(BIN)/accelerate launch evaluate_model.py --recipe digits_control_evaluation --output_dir $(@D) \
		--pipeline clean=$(call group,$(CLEAN_CONTROLNETS)) cep=$(call group,$(CEP_CONTROLNETS))

# Two tests at a time, each on one core. Threads that wait for work must not spin: each would take the core of the
# other test.
test: export OMP_NUM_THREADS = 1
test: export GOMP_SPINCOUNT = 0
test: export OMP_WAIT_POLICY = PASSIVE
test: $(READY)
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

quality: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

first-stages: $(READY)
	$(BIN)/accelerate launch train_autoencoder.py --recipe digits_kl
	$(BIN)/accelerate launch train_autoencoder.py --recipe digits_vq

digits-classifier: $(READY)
	$(BIN)/python -m noisycond.evaluation.digits_classifier

clean:
	rm -rf $(VENV) runs
