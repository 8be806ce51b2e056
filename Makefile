# make demo and make test do everything on a fresh machine with Python 3.11+; nothing but the package registry is needed.

PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test bench ablation claim chaos chaos-tests lint lock audit clean

demo: .venv/installed-run
	.venv/bin/python jobs/demo.py --output demo-output

# Two processes, of one thread each: most tests wait as long as they compute.
test: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

# make bench LITDATA_PYTHON=/venv/bin/python compares with LitData as well, which has a virtual environment of its own.
bench: .venv/installed-test
	.venv/bin/python tests/benchmarks/bench_codec.py
	.venv/bin/python tests/benchmarks/bench_memory.py --memory-gb 0.5
	.venv/bin/python tests/benchmarks/roofline.py
	.venv/bin/python tests/benchmarks/roofline.py --model small --batch 16
	.venv/bin/python tests/benchmarks/bench_decode.py
	.venv/bin/python tests/benchmarks/bench_pipeline.py
	.venv/bin/python tests/benchmarks/bench_commit.py
	.venv/bin/python tests/benchmarks/bench_start.py
	.venv/bin/python tests/benchmarks/bench_estimate.py
	.venv/bin/python tests/benchmarks/bench_peers.py
	.venv/bin/python tests/benchmarks/bench_layout.py
	.venv/bin/python tests/benchmarks/bench_scale.py
	.venv/bin/python tests/benchmarks/bench_reader.py $(if $(LITDATA_PYTHON),--litdata-python "$(LITDATA_PYTHON)")

# make ablation TEACHER=FOLDER, a frozen image VAE such as TAEF2; FLAGS="--steps 800" for more.
ablation: .venv/installed-test
	@test -n "$(TEACHER)" || { echo "make ablation needs TEACHER=FOLDER, a frozen image VAE such as TAEF2" >&2; exit 2; }
	.venv/bin/python tests/benchmarks/ablation.py --teacher "$(TEACHER)" --output ablation-output $(FLAGS)

# make claim TEACHER=FOLDER, the image VAE that `small` was made for (TAEF2). About 35 minutes of one core; what is
# finished is kept, claim-output/claim.md has the tables, and time.json what each part took.
claim: .venv/installed-test
	@test -n "$(TEACHER)" || { echo "make claim needs TEACHER=FOLDER, the image VAE TAEF2" >&2; exit 2; }
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" .venv/bin/python tests/benchmarks/claim.py --teacher "$(TEACHER)" --output claim-output $(FLAGS)

# Some hours; FLAGS="--part 30" does thirty minutes of the seeds, FLAGS="--part 30 --resume" the next thirty.
chaos: .venv/installed-test
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" .venv/bin/python -m chaos.run --state chaos-state $(FLAGS)

chaos-tests: .venv/installed-test
	.venv/bin/python -m pytest -m slow

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# After constraints.txt has changed.
lock: .venv/installed-test
	$(PIP) uv
	.venv/bin/python tests/lock.py

# Known holes in what is locked, as far as the registry at hand tells of them; fails where it does not.
audit: .venv/pip-audit
	.venv/pip-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

.venv/pip-audit: .venv/bin/pip
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check pip-audit

clean:
	rm -rf .venv demo-output

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed-run: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) --editable ".[test]"
	touch $@
