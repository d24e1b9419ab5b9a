"""Start a recipe on several processes as `accelerate launch` does, in a second instead of ten.

The processes are forked from a server that has imported the libraries; the environment is made
from the launch config by Accelerate's own functions.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

ROOT = Path(__file__).parent.parent
CAUSAL_LM = "recipes/causal_lm/pretrain.py"
TINY_RUN = {
    "model": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "sequence_length": 32,
    "global_batch_size": 16,
    "per_device_batch_size": 4,
    "lanes": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "report_to": [],
}
BERT = "recipes/bert/pretrain.py"
TINY_BERT = {
    "model": {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
TIMINGS = ("tokens_per_second", "mfu")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "torch",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "accelerate.commands.launch",
        "deepspeed",
        "pytest",
        "torch._inductor.compile_fx",
        "functorch.compile",
        "torch.utils.cpp_extension",
        "evaluate",
        "matplotlib.figure",
        "peft",
        "scipy.stats",
        "sklearn.metrics",
        "datasets",
        "transformers.optimization",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "bits_per_byte",
        "utils.memory",
        "utils.report",
    ]
)


class Launch:
    """The running processes of a recipe; a context manager that leaves none behind.

    Args:
        config: name of a file in accelerate_configs, or None for plain `python recipe.py`.
        log: where stdout and stderr of all ranks go.
    """

    def __init__(
        self, config: str | None, processes: int, arguments: list[str], log: Path, script=CAUSAL_LM
    ):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        environment = _environment(config, processes, script) if config else {}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        self.processes = []
        for rank in range(processes):
            ranks = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            is_group = config is not None and config != "cpu"
            values = environment | (ranks if is_group else {})
            process = _server.Process(target=_run, args=(values, script, arguments, str(log)))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit statuses, in the order of the ranks; a process that hangs is killed: -9."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Whether it came true before all processes had ended; a test that hangs fails."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.output()
            if not self.is_alive():
                return condition()
            time.sleep(0.001)
        return True

    def wait_for(self, text: str) -> None:
        """Until the log holds the text."""
        assert self.wait_until(lambda: text in self.output()), self.output()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def run(config: str | None, processes: int, arguments: list[str], log: Path, **options) -> str:
    """Run to the end; the output. Fails the test unless every rank ends with status 0."""
    with Launch(config, processes, arguments, log, **options) as launch:
        statuses = launch.wait()
        assert statuses == [0] * processes, launch.output()
        return launch.output()


def start_server() -> None:
    """Import the libraries now: what is started from here on takes its usual time."""
    process = _server.Process(target=int)
    process.start()
    process.join()


def tiny_run(output_dir: Path, train: Path, tokenizer: Path, **settings: Any) -> list[str]:
    """The command line of a run of a tiny model; `settings` over TINY_RUN."""
    values = {
        "output_dir": str(output_dir),
        "train_sources": [{"path": str(train)}],
        "tokenizer": str(tokenizer),
        **TINY_RUN,
        **settings,
    }
    return command_line(values)


def command_line(settings: dict[str, Any]) -> list[str]:
    """As it is typed: `--name value`, what is not text as YAML has it."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


def tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The settings for train.jsonl, validation.jsonl and test.jsonl of a folder."""
    parts = ("train", "validation", "test")
    return {f"{part}_data": [{"path": str(folder / f"{part}.jsonl")}] for part in parts}


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what a clock measured."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def steps(output_dir: Path) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [record for record in metrics(output_dir) if "loss" in record]


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(output_dir.glob("checkpoints/step-*"))


def predictions(output_dir: Path) -> list[dict[str, Any]]:
    lines = (output_dir / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def write_state(checkpoint: Path, state: dict) -> None:
    """As states once were: with the sizes of the files, and no checksums."""
    sizes = {name: (checkpoint / name).stat().st_size for name in state["files"]}
    kept = {key: value for key, value in state.items() if key != "checksum"}
    (checkpoint / "state.json").write_text(json.dumps({**kept, "files": sizes}))


def _environment(config: str, processes: int, script: str) -> dict[str, str]:
    parser = accelerate_launch.launch_command_parser()
    file = f"accelerate_configs/{config}.yaml"
    args = parser.parse_args(["--config_file", file, "--num_processes", str(processes), script])
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def _run(environment: dict[str, str], script: str, arguments: list[str], log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a script begins
    os.environ.update(environment)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
