# Each target first installs what it needs and lacks; the second start is instant. `make help` lists them.
PROFILE ?=
ONLY    ?=
SET     ?=
ARGS    ?=

PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help reproduce test report lab lint clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# Remade only when the pins change: everything else in .venv follows from them.
.venv/.complete: requirements.txt
	@PYTHON='$(PYTHON)' sh dgutils/setup.sh venv
	@touch $@

reproduce: .venv/.complete  ## run the six notebooks; PROFILE=quick (default), smoke; ONLY=03; SET="name=value ..."
	@sh dgutils/setup.sh data
	@$(PY) -m dgutils reproduce --profile $(or $(PROFILE),quick) \
		$(if $(ONLY),--only $(ONLY)) $(foreach pair,$(SET),--set '$(pair)')

test: .venv/.complete  ## run every test; ARGS="-k name" goes to pytest
	@sh dgutils/setup.sh data
	@$(PY) -m pytest $(ARGS)

report: .venv/.complete  ## build report/report.pdf; PROFILE=quick (default: committed results, else your own)
	@sh dgutils/setup.sh tex
	@test -n "$(PROFILE)$(wildcard report/results/*/06.json)" || \
		{ echo "no results yet: running the quick profile first"; $(MAKE) --no-print-directory reproduce; }
	@$(PY) -m dgutils report $(if $(PROFILE),--profile $(PROFILE))
	@cd report && max_print_line=500 latexmk -pdf -jobname=report -interaction=nonstopmode -halt-on-error -Werror main.tex \
		>report.latexmk 2>&1 || { grep -E '^(! [A-Z]|l\.[0-9])|Warning: (Citation|Reference).* undefined' report.log \
		|| tail report.latexmk; exit 2; } >&2
	@echo "report/report.pdf"

lab: .venv/.complete  ## open the notebooks in JupyterLab; ARGS="--no-browser" goes to it
	@sh dgutils/setup.sh data
	@JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(ARGS)

lint: .venv/.complete  ## ruff
	@$(PY) -m ruff check .

clean:  ## remove .venv and caches; keeps runs/, results and figures
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find dgutils tests -name __pycache__ -type d -exec rm -rf {} +
