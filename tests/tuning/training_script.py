"""A training script in miniature: one with the conventions of the recipes, and no model.

    training_script.py CONFIG [--key value …]

Its loss is a known function of its settings: (log10(learning_rate) + 2)² + weight_decay + 1 / step,
evaluated after each step; from a learning_rate of 1 on it diverges. The run that the file `held`
names waits after its second step, as long as that is there and nobody stops it.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def settings() -> dict:
    values = json.loads(Path(sys.argv[1]).read_text())
    words = sys.argv[2:]
    is_printed = "--print_config" in words
    words = [word for word in words if word != "--print_config"]
    for name, text in zip(words[::2], words[1::2], strict=True):
        if name[2:] not in values:
            fail(f"{name}: unknown key {name[2:]!r}: the nearest valid one is 'learning_rate'")
        try:
            values[name[2:]] = json.loads(text)
        except ValueError:
            values[name[2:]] = text
    if not isinstance(values["learning_rate"], float):
        fail(f"learning_rate must be a number, not {values['learning_rate']!r}")
    if is_printed:
        print(json.dumps(values))
        sys.exit(0)
    return values


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    values = settings()
    folder = Path(values["output_dir"])
    state, metrics = folder / "checkpoints" / "step", folder / "metrics.jsonl"
    state.parent.mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    (folder / "config.yaml").write_text(json.dumps(values))
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    done = int(state.read_text()) if state.exists() else 0
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(lines[:done]))
    for step in range(done + 1, values["max_steps"] + 1):
        if values["learning_rate"] >= 1:
            fail("5 steps in a row were skipped: loss not finite")
        loss = (math.log10(values["learning_rate"]) + 2) ** 2 + values["weight_decay"] + 1 / step
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "eval_loss": loss, "eval_score": -loss}) + "\n")
        if step == values["killed_before"]:
            os.kill(os.getpid(), signal.SIGKILL)
        aside = state.with_name("aside")
        aside.write_text(str(step))
        aside.replace(state)
        if step == values["killed_after"]:
            os.kill(os.getpid(), signal.SIGKILL)
        held = Path(values["held"])
        while step == 2 and held.exists() and held.read_text() == folder.name and not stopped:
            time.sleep(0.01)
        if stopped:
            print(f"stopped after step {step}")
            return
    (folder / "finished.json").write_text("{}")


if __name__ == "__main__":
    main()
