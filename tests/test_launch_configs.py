"""Every launch config is what its name says, and every command of the two READMEs can be run."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin

from launching import CAUSAL_LM, ROOT, checkpoints, run, steps, tiny_run

LAUNCH = ROOT / "accelerate_configs"
DEEPSPEED = ROOT / "ds_configs"
SLURM = "accelerate_configs/slurm_multi_node.sh"
# distributed_type, on CPU only, machines, processes, DeepSpeed config
TOPOLOGIES = {
    "cpu": ("NO", True, 1, 1, None),
    "multi_cpu": ("MULTI_GPU", True, 1, 2, None),
    "single_gpu": ("NO", False, 1, 1, None),
    "multi_gpu": ("MULTI_GPU", False, 1, 8, None),
    "zero1": ("DEEPSPEED", False, 1, 8, "zero1"),
    "zero2": ("DEEPSPEED", False, 1, 8, "zero2"),
    "zero3": ("DEEPSPEED", False, 1, 8, "zero3"),
    "zero3_offload": ("DEEPSPEED", False, 1, 8, "zero3_offload"),
    "zero3_multi_node": ("DEEPSPEED", False, 2, 16, "zero3"),
    "fsdp2": ("FSDP", False, 1, 8, None),
}
# stage, device of the optimizer, device of the weights, processes that hold all weights (ZeRO++)
ZERO = {
    "zero1": (1, None, None, 1),
    "zero2": (2, None, None, 1),
    "zero2_offload": (2, "cpu", None, 1),
    "zero3": (3, None, None, 1),
    "zero3_offload": (3, "cpu", "cpu", 1),
    "zero3_hpz": (3, None, None, 8),
}
COMMANDS = [
    (folder, command)
    for folder in (LAUNCH, DEEPSPEED)
    for block in re.findall(r"(?:^ {4}.*\n)+", (folder / "README.md").read_text(), re.M)
    for command in block.replace("\\\n", " ").splitlines()
    if command.split()[0] in ("accelerate", "python", "sbatch")
]


def names(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*{suffix}")}


def test_no_file_is_unknown_to_these_tests():
    assert names(LAUNCH, ".yaml") == set(TOPOLOGIES)
    assert names(DEEPSPEED, ".json") == set(ZERO)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_accelerate_reads_the_launch_config(name):
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    kind, on_cpu, machines, processes, deepspeed = TOPOLOGIES[name]
    assert config.distributed_type.value == kind
    assert (config.use_cpu, config.num_machines, config.num_processes) == (
        on_cpu,
        machines,
        processes,
    )
    assert config.mixed_precision is None  # the recipe's setting
    if machines > 1:
        assert config.main_process_port is not None
    elif processes > 1:
        assert config.main_process_port == 0
    # what stands in a section is an option of the launcher, which drops others without a word
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.deepspeed_config, *config.fsdp_config} <= options
    if deepspeed:
        file = config.deepspeed_config["deepspeed_config_file"]
        assert file == f"ds_configs/{deepspeed}.json"
        assert config.deepspeed_config["zero3_init_flag"] == (ZERO[deepspeed][0] == 3)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_the_launcher_takes_every_setting_from_the_launch_config():
    # it has a default of its own for these, and what a file says is lost
    lost = {"rdzv_backend", "same_network", "main_training_function"}
    for name in TOPOLOGIES:
        assert not lost & set(yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_reads_the_config_that_accelerate_fills_in(name, precision):
    from deepspeed.runtime.config import DeepSpeedConfig

    known = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
    }
    path = DEEPSPEED / f"{name}.json"
    assert set(json.loads(path.read_text())) <= known  # DeepSpeed takes any key without a word

    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    plugin.set_mixed_precision(precision)
    plugin.deepspeed_config_process(
        must_match=False,
        train_batch_size=8,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=4,
        gradient_clipping=0.5,
    )
    assert "auto" not in json.dumps(plugin.deepspeed_config)

    config = DeepSpeedConfig(plugin.deepspeed_config)
    zero = config.zero_config  # refuses unknown keys
    offload = zero.offload_optimizer, zero.offload_param
    devices = [section and section.device for section in offload]
    assert (zero.stage, *devices, zero.zero_hpz_partition_size) == ZERO[name]
    assert zero.overlap_comm
    assert zero.contiguous_gradients
    assert config.bfloat16_config.enabled == (precision == "bf16")
    assert config.bfloat16_config.check_grad_overflow
    assert config.float16_config.enabled == (precision == "fp16")
    assert config.float16_config.loss_scale == 0  # dynamic
    assert config.train_batch_size == 8
    assert config.gradient_accumulation_steps == 4
    assert config.gradient_clipping == 0.5
    # without it Accelerate puts DeepSpeed's CPU Adam in the place of the recipe's optimizer
    assert config.zero_force_ds_cpu_optimizer == (zero.offload_optimizer is None)


@pytest.mark.parametrize(("folder", "suffix"), [(LAUNCH, ".yaml"), (DEEPSPEED, ".json")])
def test_the_readme_lists_each_file_once(folder, suffix):
    rows = re.findall(rf"^\| `(\w+){suffix}` \|", (folder / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(names(folder, suffix))


def test_the_readmes_show_commands():
    assert len(COMMANDS) >= 9
    assert {command.split()[0] for _, command in COMMANDS} == {"accelerate", "python", "sbatch"}


@pytest.mark.parametrize(("folder", "command"), COMMANDS)
def test_the_command_of_the_readme_can_be_run(folder, command):
    words = shlex.split(command)
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), word
    if words[0] == "accelerate":
        arguments = launch_command_parser().parse_args(words[2:])
        assert (ROOT / arguments.config_file).exists()
        assert arguments.training_script == CAUSAL_LM
        assert arguments.training_script_args[0].startswith("recipes/causal_lm/configs/")


@pytest.fixture
def settings(corpus_folder, tokenizer_folder):
    """settings(output_dir, **more): the arguments of a tiny run, in fp32 without dropout."""

    def arguments(output_dir: Path, **more) -> list[str]:
        train = corpus_folder / "train-0.jsonl"
        return tiny_run(output_dir, train, tokenizer_folder, **more)

    return arguments


@pytest.fixture
def launcher(tmp_path):
    """launcher(command, **environment): a process; what names tmp_path ends with the test."""

    def start(command: list[str], **environment: str) -> subprocess.Popen:
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PATH": path} | environment,
            stdout=(tmp_path / "log").open("w"),
            stderr=subprocess.STDOUT,
        )

    yield start
    for process in psutil.process_iter():  # also those whose parent has left them behind
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(tmp_path) in word for word in process.cmdline()):
                process.kill()


def test_the_optimizer_steps_in_host_memory(settings, launcher, tmp_path):
    """The recipe's AdamW under both offload configs gives the losses of one plain process."""
    run(None, 1, settings(tmp_path / "plain", max_steps=6), tmp_path / "plain.log")
    for max_steps in (3, 6):  # the second continues from the checkpoint of the first
        arguments = settings(tmp_path / "zero3", max_steps=max_steps)
        run("zero3_offload", 2, arguments, tmp_path / "zero3.log")
    options = ["--config_file", "accelerate_configs/zero2.yaml", "--num_processes", "2"]
    override = ["--deepspeed_config_file", "ds_configs/zero2_offload.json"]
    arguments = settings(tmp_path / "zero2", max_steps=6)
    process = launcher(["accelerate", "launch", *options, *override, CAUSAL_LM, *arguments])
    assert process.wait(300) == 0, (tmp_path / "log").read_text()

    expected = [record["loss"] for record in steps(tmp_path / "plain")]
    assert len(expected) == 6
    for folder in ("zero2", "zero3"):
        found = [record["loss"] for record in steps(tmp_path / folder)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", SLURM], cwd=ROOT, check=True)
    assert os.access(ROOT / SLURM, os.X_OK)


def test_the_slurm_script_ends_the_run_in_order(settings, launcher, tmp_path):
    """Two nodes, both this machine: at USR1 the recipe writes a checkpoint and all exit with 0."""
    stand_ins = {
        "scontrol": "printf '127.0.0.1\\n127.0.0.1\\n'",
        "srun": """
            while [[ $1 == --* ]]; do shift; done
            for node in 0 1; do SLURM_NODEID=$node "$@" & processes+=($!); done
            for process in ${processes[@]}; do wait $process || status=$?; done
            exit ${status:-0}
        """,
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    recipe = tmp_path / "pretrain.py"  # a path that no other process on this machine has
    recipe.symlink_to(ROOT / CAUSAL_LM)
    for port in range(20_000, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):  # nobody is there
                break

    process = launcher(
        ["bash", SLURM, str(recipe), *settings(tmp_path / "run", max_steps=10**6)],
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_ID=str(port - 20_000),
        SLURM_JOB_NODELIST="node[0-1]",
    )
    end = time.monotonic() + 200
    while "step 2/" not in (tmp_path / "log").read_text():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert checkpoint.name == f"step-{len(steps(tmp_path / 'run')):08}"
    assert json.loads((checkpoint / "state.json").read_text())
