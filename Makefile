# Everything a developer runs. CI runs `make test`, which the README names; nothing else is hidden in it.
PYTHON ?= python3.11
BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
FETCH := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target

.PHONY: setup triton perf-analyzer tensorrt-bindings demo test test-slow test-gpu check fix bench zoo proto clean

setup: .venv/.installed  ## make .venv with everything; cheap to repeat

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) --editable '.[cpu,export,native,otel,dev]'
	touch $@

# Parts that only tests need. Without a network they are said to be missing, and the tests that need them skip.
triton: build/triton/.installed  ## a real Triton for tests/server/test_triton_parity.py (60 MB to fetch)

build/triton/.installed: | setup
	@$(FETCH) build/triton 'nvidia-pytriton==0.7.0' 'numpy==1.26.4' && touch $@ || \
		echo "build/triton cannot be fetched: the tests that compare with a real Triton will skip"

perf-analyzer: triton build/perf_analyzer/.installed  ## Triton's load generator for tests/clients/test_perf_analyzer.py (15 MB)

build/perf_analyzer/.installed: | setup
	@$(FETCH) build/perf_analyzer 'tritonclient==2.50.0' 'nvidia-cuda-runtime-cu12==12.9.79' && touch $@ || \
		echo "build/perf_analyzer cannot be fetched: its tests will skip"

tensorrt-bindings: build/tensorrt-bindings/.installed  ## TensorRT's Python bindings, 10 and 11, for tests/exporter/test_tensorrt_api.py (3 MB)

build/tensorrt-bindings/.installed: | setup
	@$(FETCH) build/tensorrt-bindings/10 'tensorrt-cu12-bindings==10.12.0.36' && \
		$(FETCH) build/tensorrt-bindings/11 'tensorrt-cu13-bindings==11.4.0.106' && touch $@ || \
		echo "build/tensorrt-bindings cannot be fetched: the tests that look at TensorRT's API will skip"

demo: setup  ## export the shipped LeNet-5 to INT8, serve it, classify real digits, show the metrics
	$(BIN)/python docs/demo.py

test: setup triton tensorrt-bindings  ## the checks and the default test suite: what CI runs
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope

test-slow: setup perf-analyzer  ## every network of the zoo, ImageNet-size exports, whole test sets: hours on 2 cores
	$(BIN)/python -m pytest -m slow

test-gpu: setup  ## what needs an NVIDIA GPU, with onnxruntime-gpu in the place of onnxruntime
	$(BIN)/python -m pytest -m gpu

check: setup  ## style, types, stale generated code; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_protos.py

fix: setup  ## repair what can be repaired by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## bare engine against served, in one run
	$(BIN)/python benchmarks/serving.py

zoo: setup  ## measure every network (NAMES="resnet18 vgg16": some), for docs/zoo.md and the thresholds of the tests
	$(BIN)/python benchmarks/zoo.py $(NAMES)

proto: setup  ## generate protos/**/*_pb2* again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/inference/*.proto

clean:
	rm -rf .venv .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
