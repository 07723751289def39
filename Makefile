# Each target first installs what it needs and lacks; the second start is instant. `make help` lists them.
PROFILE ?=
ONLY    ?=
SET     ?=
NPROC   ?=
STRICT  ?=
KEY     ?=
ARGS    ?=

PY := .venv/bin/python
SETS = $(if $(SET),--set $(foreach pair,$(SET),'$(pair)'))
.DEFAULT_GOAL := help
.PHONY: help reproduce keep plan fetch rehearse test report check-report html trace lab bench doctor lint clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# Remade only when the pins change: everything else in .venv follows from them.
.venv/.complete: requirements.txt
	@PYTHON='$(PYTHON)' sh dgutils/setup.sh venv
	@touch $@

reproduce: .venv/.complete  ## run the six notebooks; PROFILE=quick (default), smoke, ...; ONLY=03; SET="name=value ..."; NPROC=8
	@sh dgutils/setup.sh data
	@$(if $(NPROC),$(PY) -m dgutils work --profile $(or $(PROFILE),quick) --nproc $(NPROC) $(SETS))
	@$(PY) -m dgutils reproduce --profile $(or $(PROFILE),quick) $(if $(ONLY),--only $(ONLY)) $(SETS)
	@$(PY) -m report.site --profile $(or $(PROFILE),quick)

keep: .venv/.complete  ## put the scores of PROFILE=cifar10 (default) where git holds them, for another machine to go on
	@$(PY) -m dgutils keep --profile $(or $(PROFILE),cifar10)

plan: .venv/.complete  ## what PROFILE=quick (default) would compute, download and take; runs nothing
	@$(PY) -m dgutils plan --profile $(or $(PROFILE),quick)

fetch: .venv/.complete  ## download the weights of PROFILE=paper (default): the only step that needs the network
	@$(PY) -m dgutils fetch --profile $(or $(PROFILE),paper)

# In a folder of weights of its own, so that no real run ever sees the stand-ins.
rehearse: .venv/.complete  ## the paper profile at its full architectures, random weights, a handful of images: does it run?
	@DGUTILS_WEIGHTS='$(CURDIR)/runs/rehearsal/weights' $(PY) -m dgutils stand-ins --profile rehearsal
	@DGUTILS_WEIGHTS='$(CURDIR)/runs/rehearsal/weights' $(PY) -m dgutils reproduce --profile rehearsal $(SETS)
	@sh dgutils/setup.sh tex
	@$(PY) -m report.build --profile rehearsal

test: .venv/.complete  ## run every test; ARGS="-k name" goes to pytest
	@sh dgutils/setup.sh data
	@$(PY) -m pytest $(ARGS)

report: .venv/.complete  ## build report/report.pdf; PROFILE=quick (default: committed results, else your own); STRICT=1
	@sh dgutils/setup.sh tex
	@test -n "$(PROFILE)$(wildcard report/results/*/06.json)" || \
		{ echo "no results yet: running the quick profile first"; $(MAKE) --no-print-directory reproduce; }
	@$(PY) -m report.build $(if $(PROFILE),--profile $(PROFILE)) $(if $(STRICT),--strict)

check-report: .venv/.complete  ## is the report's form in order: paper, length, fonts, references, anonymity, no typed number?
	@sh dgutils/setup.sh tex
	@$(PY) -m report.check $(if $(PROFILE),--profile $(PROFILE))

html: .venv/.complete  ## executed notebooks and figures as a site to open from disk: runs/quick/site/index.html
	@$(PY) -m report.site $(if $(PROFILE),--profile $(PROFILE))

trace: .venv/.complete  ## where a number of the report comes from: KEY=arm.paper.first.fd, figure:NN_slug or table:name
	@$(PY) -m report.trace $(KEY) $(if $(PROFILE),--profile $(PROFILE))

lab: .venv/.complete  ## open the notebooks in JupyterLab; ARGS="--no-browser" goes to it
	@sh dgutils/setup.sh data
	@JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

bench: .venv/.complete  ## measure the claims of speed and memory, write docs/bench.md; nothing else should run meanwhile
	@$(PY) tests/bench.py $(ARGS)

# Needs no packages: it says which are missing.
doctor:  ## is everything here that PROFILE=quick (default) needs?
	@$$(command -v .venv/bin/python || command -v python3) -m dgutils doctor --profile $(or $(PROFILE),quick)

lint: .venv/.complete  ## ruff
	@$(PY) -m ruff check .

clean:  ## remove .venv and caches; keeps runs/, results and figures
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find dgutils tests -name __pycache__ -type d -exec rm -rf {} +
