"""Start a recipe on several processes as `accelerate launch` does, in a second instead of ten.

The processes are forked from a server that has imported the libraries; the environment is made
from the launch config by Accelerate's own functions.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

ROOT = Path(__file__).parent.parent
CAUSAL_LM = "recipes/pretrain/causal_lm.py"
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "accelerate",
        "deepspeed",
        "utils.training",
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

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until the log holds the text."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, self.output()
            if not any(process.is_alive() for process in self.processes):
                assert text in self.output(), self.output()
            time.sleep(0.01)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def run(config: str | None, processes: int, arguments: list[str], log: Path, **options) -> str:
    """Run to the end; the output. Fails the test unless every rank ends with status 0."""
    with Launch(config, processes, arguments, log, **options) as launch:
        statuses = launch.wait()
        assert statuses == [0] * processes, launch.output()
        return launch.output()


def _environment(config: str, processes: int, script: str) -> dict[str, str]:
    parser = accelerate_launch.launch_command_parser()
    file = f"accelerate_configs/{config}.yaml"
    args = parser.parse_args(["--config_file", file, "--num_processes", str(processes), script])
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def _run(environment: dict[str, str], script: str, arguments: list[str], log: str) -> None:
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
    runpy.run_path(script, run_name="__main__")
