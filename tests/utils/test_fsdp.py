"""Checkpoints of PyTorch's fully sharded data parallel (FSDP2), on CPU: any number of processes."""

import json

import pytest

from launching import run

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from utils import checkpoint
from utils.fragments import optimizer_step_count

folder, mode = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(50, 17),
    torch.nn.Linear(17, 33),
    torch.nn.LayerNorm(33),
    torch.nn.Linear(33, 50),
)
if mode != "plain":
    for module in (*model, model):
        fully_shard(module)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)

def step(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, 50, (2, 4, 8), generator=generator)[:, rank::world_size]
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss.item() / world_size

newest = folder / "checkpoints" / "step-00000003"
if mode == "save":
    for seed in range(3):
        step(seed)
    steps = optimizer_step_count(optimizer)
    checkpoint.save(newest, model, optimizer, {"optimizer_step": steps})
else:
    state = checkpoint.read_state(newest)
    checkpoint.load(newest, model, optimizer, state["optimizer_step"])
losses = [step(seed) for seed in range(3, 8)]
if rank == 0:
    (folder / f"{mode}-{world_size}.json").write_text(json.dumps(losses))
dist.barrier()
os._exit(0)  # gloo may abort while it takes itself down
"""


@pytest.mark.parametrize("mode", ["sharded", "plain"])
def test_a_sharded_run_continues_on_any_number_of_processes(tmp_path, mode):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def train(mode: str, processes: int) -> list[float]:
        arguments, log = [str(tmp_path), mode], tmp_path / f"{mode}-{processes}.log"
        run("multi_cpu", processes, arguments, log, script=str(script))
        return json.loads((tmp_path / f"{mode}-{processes}.json").read_text())

    reference = train("save", 2)
    if mode == "sharded":
        assert train("sharded", 2) == reference
        assert train("sharded", 4) == pytest.approx(reference, rel=1e-6)
    else:
        assert train("plain", 1) == pytest.approx(reference, rel=1e-6)
