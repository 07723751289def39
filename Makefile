# Each target first installs what it needs and lacks; the second start is instant. `make help` lists them.
PROFILE ?=
ONLY    ?=
SET     ?=
NPROC   ?=
STRICT  ?=
KEY     ?=
ARGS    ?=
FORCE   ?=

# What somebody passes reaches the shell as it was written, quoted: KEY="it's" is a key, and nothing in it is run.
q = '$(subst ','\'',$(1))'
each = $(foreach word,$(2),$(1) $(call q,$(value word)))
profile = --profile $(call q,$(or $(value PROFILE),$(1)))
profile_if_given = $(if $(value PROFILE),$(call profile))
SETS = $(call each,--set,$(value SET))
unexport PROFILE ONLY SET NPROC STRICT KEY ARGS FORCE
# What the account sets for its own Pythons and tests; dgutils/paths.py keeps the rest of it out.
unexport $(filter-out PYTHON,$(filter PYTHON% PYTEST_%,$(.VARIABLES)))

PY := .venv/bin/python
RUN := $(PY) -m dgutils.paths
.DEFAULT_GOAL := help
.PHONY: help reproduce keep plan fetch rehearse test report check-report html publish trace lab bench doctor lint clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# Remade only when the pins change: everything else in .venv follows from them.
.venv/.complete: requirements.txt
	@PYTHON=$(call q,$(value PYTHON)) sh dgutils/setup.sh venv
	@touch $@

reproduce: .venv/.complete  ## run the six notebooks; PROFILE=quick (default), smoke, ...; ONLY=03; SET="name=value ..."; NPROC=8; FORCE=1; VERBOSE=1
	@sh dgutils/setup.sh data
	@$(if $(value NPROC),$(PY) -m dgutils work $(call profile,quick) --nproc $(call q,$(value NPROC)) $(SETS))
	@$(PY) -m dgutils reproduce $(call profile,quick) $(call each,--only,$(value ONLY)) $(SETS) $(if $(value FORCE),--force)
	@$(RUN) -m report.site $(call profile,quick)

keep: .venv/.complete  ## put the scores of PROFILE=cifar10 (default) where git holds them, for another machine to go on
	@$(PY) -m dgutils keep $(call profile,cifar10)

plan: .venv/.complete  ## what PROFILE=quick (default) would compute, download and take; runs nothing
	@$(PY) -m dgutils plan $(call profile,quick)

fetch: .venv/.complete  ## download the weights of PROFILE=paper (default): the only step that needs the network
	@$(PY) -m dgutils fetch $(call profile,paper)

# In a folder of weights of its own, so that no real run ever sees the stand-ins.
rehearse: .venv/.complete  ## the paper profile at its full architectures, random weights, a handful of images: does it run?
	@DGUTILS_WEIGHTS=runs/rehearsal/weights $(PY) tests/standins.py rehearsal
	@DGUTILS_WEIGHTS=runs/rehearsal/weights $(PY) -m dgutils reproduce --profile rehearsal $(SETS)
	@sh dgutils/setup.sh tex
	@$(RUN) -m report.build --profile rehearsal

# As many at once as there are cores (tests/conftest.py), one thread each; a worker that is done takes over another's.
test: .venv/.complete  ## run every test; ARGS="-k name" goes to pytest
	@sh dgutils/setup.sh data
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" $(RUN) -m pytest -n auto --dist worksteal $(ARGS)

report: .venv/.complete  ## build report/report.pdf; PROFILE=quick (default: committed results, else your own); STRICT=1
	@sh dgutils/setup.sh tex
	@test -n $(call q,$(value PROFILE)$(wildcard report/results/*/06.json)) || \
		{ echo "no results yet: running the quick profile first"; $(MAKE) --no-print-directory reproduce; }
	@$(RUN) -m report.build $(profile_if_given) $(if $(value STRICT),--strict)

check-report: .venv/.complete  ## is the report's form in order: paper, length, fonts, references, anonymity, no typed number?
	@sh dgutils/setup.sh tex
	@$(RUN) -m report.check $(profile_if_given)

html: .venv/.complete  ## executed notebooks and figures as a site to open from disk: runs/quick/site/index.html
	@$(RUN) -m report.site $(profile_if_given)

publish: .venv/.complete  ## renew docs/report.pdf and docs/pages/, which can be read without running anything
	@sh dgutils/setup.sh tex
	@$(PY) -m dgutils reproduce --profile quick
	@$(RUN) -m report.publish

trace: .venv/.complete  ## where a number of the report comes from: KEY=arm.paper.first.fd, figure:NN_slug or table:name
	@$(RUN) -m report.trace $(profile_if_given) -- $(call q,$(value KEY))

lab: .venv/.complete  ## open the notebooks in JupyterLab; ARGS="--no-browser" goes to it
	@sh dgutils/setup.sh data
	@$(RUN) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

bench: .venv/.complete  ## measure the claims of speed and memory, write docs/bench.md; nothing else should run meanwhile
	@$(RUN) tests/bench.py $(ARGS)

# Needs no packages: it says which are missing.
doctor:  ## is everything here that PROFILE=quick (default) needs?
	@$$(command -v .venv/bin/python || command -v python3) -m dgutils doctor $(call profile,quick)

lint: .venv/.complete  ## ruff
	@$(PY) -m ruff check .

clean:  ## remove .venv and caches; keeps runs/, results and figures
	@rm -rf .venv .account .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find dgutils tests -name __pycache__ -type d -exec rm -rf {} +
