PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Without bytecode every process would compile torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test5 lint benchmark embedding install

demo: install
	$(BIN)/distill demo --output demo

# Two tests at once, each on one core; a file's tests share what they train.
PYTEST_OPTIONS = -n 2 --dist loadscope
test test5: export OMP_WAIT_POLICY = passive
test test5: export OMP_NUM_THREADS = 1

test: install
	$(BIN)/pytest $(PYTEST_OPTIONS)

# Tests with transformers 5, in an environment that takes all else from the first one. TESTS: which of them.
TESTS ?= tests
test5: install
	test -d $(VENV)5 || $(PYTHON) -m venv $(VENV)5
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(VENV)5/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth
	grep -viE '^(transformers|tokenizers|huggingface|hf[-_]|optimum|typer)' constraints.txt > $(VENV)5/constraints.txt
	$(VENV)5/bin/pip install --quiet --no-compile --constraint $(VENV)5/constraints.txt ".[train-5,cpu,dev]"
	$(VENV)5/bin/pip install --quiet --no-deps --force-reinstall .
	cd $(VENV)5 && bin/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(PYTEST_OPTIONS) \
		$(addprefix $(CURDIR)/,$(TESTS))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p distill
	cd $(VENV) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --allow-untyped-calls \
		$(CURDIR)/benchmarks

benchmark: install
	$(BIN)/python benchmarks/latency.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/runtime.py
	$(MAKE) demo/runs/two_layers LAYERS=2
	$(MAKE) demo/runs/one_layer LAYERS=1
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/runtime.py --bundle runs/two_layers
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/runtime.py --bundle runs/one_layer
	$(BIN)/python benchmarks/int8_ceiling.py
	$(BIN)/python benchmarks/int8_accuracy.py
	$(BIN)/python benchmarks/streaming.py --bundle runs/one_layer
	$(BIN)/python benchmarks/service.py
	$(BIN)/python benchmarks/cuda.py
	$(BIN)/python benchmarks/explanations.py

demo/runs/%:
	cd demo && ../$(BIN)/distill train-student --layers $(LAYERS) --output runs/$(@F)_student && \
		../$(BIN)/distill export --int8 --max-drop 3 --student runs/$(@F)_student --output runs/$(@F)

# ORT: an unpacked release of ONNX Runtime, for the C++ example; left out without it.
embedding: install
	cd examples/embedding/javascript && npm install --ignore-scripts --no-audit --no-fund
	$(if $(ORT),$(MAKE) -C examples/embedding/cpp ORT=$(ORT))
	$(BIN)/python benchmarks/embedding.py

install: $(VENV)/.installed

# A plain install (not editable), so that type checkers and imports see what a user's site-packages would hold.
$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard distill/* teacher/* student/* export/* explain/* explain/templates/* examples/* examples/embedding/*.py)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.dependencies -a $(VENV)/.dependencies -nt constraints.txt -a $(VENV)/.dependencies -nt pyproject.toml || \
		{ $(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch && \
		  $(BIN)/pip install --quiet --no-compile --constraint constraints.txt ".[train,cpu,qlora,serve,dev]" && touch $(VENV)/.dependencies; }
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@
