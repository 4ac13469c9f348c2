# Flags for a script go into ARGS: make mae ARGS="--mask-ratio 0.5 --steps 5000"
PYTHON ?= python3
ARGS   ?=
SCRIPTS = simclr autoencoder bert mae gpt lora flamingo
BENCHES = mae simclr bert gpt lora flamingo
# Files of tests that run one after another in one process, which imports PyTorch once; long ones first.
TOGETHER = readme run processes device lora-adapt-forgetting-prompt_or_training bert-gpt-mae \
           experiments-small_experiments-same_encoder flamingo-few_shot simclr-autoencoder common-texts-muon-paste-copies
TESTS   = $(TOGETHER) $(filter-out $(subst -, ,$(TOGETHER)),$(patsubst tests/test_%.py,%,$(wildcard tests/test_*.py)))
ENV     = .venv/installed
BENCH   = .venv-bench/installed

help: ## list what can be made
	@echo "make SCRIPT [ARGS=\"--flag value ...\"]"
	@for s in $(SCRIPTS); do sed -n "1s/^\"\"\"\(.*\)/  $$s: \1/p" $$s.py; done
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1: \2/p' Makefile

$(SCRIPTS): $(ENV)
	.venv/bin/python $@.py $(ARGS)

# With ARGS as pytest takes them; without, the files of tests two at a time on one core each: these
# models are too small for more.
test: $(ENV) ## run the tests
ifneq ($(ARGS),)
	.venv/bin/python -m pytest -q tests $(ARGS)
else
	@$(MAKE) --no-print-directory -j2 -k $(patsubst %,test-%,$(TESTS))
endif

test-%: $(ENV)
	@out=$$(OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q $(patsubst %,tests/test_%.py,$(subst -, ,$*)) 2>&1); status=$$?; \
	printf '%s\n' "$$out"; exit $$status

runs: $(ENV) ## show all finished runs as one table
	.venv/bin/python common.py

compare: $(ENV) ## SimCLR, autoencoder and MAE from few labels (ARGS=--quick)
	.venv/bin/python experiments/compare.py $(ARGS)

adapt: $(ENV) ## all ways to adapt a GPT, at several numbers of examples (ARGS=--quick)
	.venv/bin/python experiments/adapt.py $(ARGS)

few-shot: $(ENV) ## Flamingo's answers beside its language model's (ARGS=--quick)
	.venv/bin/python experiments/few_shot.py $(ARGS)

bench: $(BENCH) ## our speed beside other packages (ARGS=--quick; make bench-mae: one of them)
	@for name in $(BENCHES); do \
	  .venv-bench/bin/python experiments/bench_$$name.py $(ARGS) || failed=1; \
	done; exit $${failed:-0}

bench-%: $(BENCH)
	.venv-bench/bin/python experiments/bench_$*.py $(ARGS)

# With a Python that has PyTorch for CUDA, and transformers and peft: make gpu PYTHON=python3
gpu: ## all that is measured on a CUDA GPU (ARGS=--quick, on a CPU, too)
	$(PYTHON) experiments/gpu.py $(ARGS)

results: $(ENV) ## write the figures of results/ into the README and the docstrings
	.venv/bin/python tests/test_readme.py

clean: ## remove the environments; runs and downloaded data stay
	rm -rf .venv .venv-bench

$(ENV): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(BENCH): experiments/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r experiments/requirements.txt
	@touch $@

.PHONY: help test runs compare adapt few-shot bench gpu results clean $(SCRIPTS)
