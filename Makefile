# Flags for a script go into ARGS: make mae ARGS="--mask-ratio 0.5 --steps 5000"
PYTHON ?= python3
ARGS   ?=
SCRIPTS = simclr autoencoder bert mae gpt lora flamingo
TESTS   = readme $(filter-out readme,$(patsubst tests/test_%.py,%,$(wildcard tests/test_*.py)))
ENV     = .venv/installed
BENCH   = .venv-bench/installed

help: ## list what can be made
	@echo "make SCRIPT [ARGS=\"--flag value ...\"]"
	@for s in $(SCRIPTS); do sed -n "1s/^\"\"\"\(.*\)/  $$s: \1/p" $$s.py; done
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1: \2/p' Makefile

$(SCRIPTS): $(ENV)
	.venv/bin/python $@.py $(ARGS)

# With ARGS as pytest takes them; without, the files of tests two at a time on one core each, the
# longest first: these models are too small for more.
test: $(ENV) ## run the tests
ifneq ($(ARGS),)
	.venv/bin/python -m pytest -q tests $(ARGS)
else
	@$(MAKE) --no-print-directory -j2 -k $(patsubst %,test-%,$(TESTS))
endif

test-%: $(ENV)
	@out=$$(OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/test_$*.py 2>&1); status=$$?; \
	printf '%s\n' "$$out"; exit $$status

runs: $(ENV) ## show all finished runs as one table
	.venv/bin/python common.py

compare: $(ENV) ## what SimCLR, the autoencoder and MAE know, from few labels (ARGS=--quick)
	.venv/bin/python benchmarks/compare.py $(ARGS)

bench: $(BENCH) ## measure our speed beside other packages
	.venv-bench/bin/python benchmarks/bench_mae.py
	.venv-bench/bin/python benchmarks/bench_simclr.py
	.venv-bench/bin/python benchmarks/bench_bert.py
	.venv-bench/bin/python benchmarks/bench_gpt.py
	.venv-bench/bin/python benchmarks/bench_lora.py
	.venv-bench/bin/python benchmarks/bench_flamingo.py

bench-%: $(BENCH)
	.venv-bench/bin/python benchmarks/bench_$*.py $(ARGS)

results: $(ENV) ## write the figures of results/ into the README and the docstrings
	.venv/bin/python tests/test_readme.py

clean: ## remove the environments; runs and downloaded data stay
	rm -rf .venv .venv-bench

$(ENV): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(BENCH): benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

.PHONY: help test runs compare bench results clean $(SCRIPTS)
