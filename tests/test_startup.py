"""What a script has imported when it prints its help, says that a key is wrong, or goes on.

Settings with `lora` are checked by the names that peft has for them: those import it.
"""

import json
from pathlib import Path

import pytest

from programs import ROOT, start

SLOW = (
    "accelerate",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "torch._inductor",
    "transformers.models",
)
SCRIPTS = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.glob("recipes/*/*.py"))
    if "command(main)" in path.read_text()
]
# One interpreter runs a script three times. `command` ends a process by os._exit, without hooks.
PROGRAM = """
import json, os, runpy, sys

from utils import config

program, *words = sys.argv[1:]
exits, parse = [], config.parse

def leave(status):
    raise SystemExit(status)

def parse_only(settings):
    parse(settings)
    raise SystemExit("checked")

os._exit, config.parse = leave, parse_only
sys.path[0] = os.path.dirname(os.path.abspath(program))
for options in (["--help"], ["--no_such_key", "1"], words):
    sys.argv = [program, *options]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        exits.append(end.code)
print(json.dumps([exits, list(sys.modules)]))
"""


def settings_of(script: Path) -> list[str]:
    if script.stem == "export":
        return ["--checkpoint", "step-1", "--output_dir", "model"]
    configs = sorted((ROOT / script.parent).glob(f"configs/{script.stem}_*.yaml"))
    return [str(path) for path in configs if path.stem.endswith("_smoke")][-1:] or [*configs[:1]]


@pytest.mark.parametrize("script", [*SCRIPTS, Path("utils/export.py")], ids=str)
def test_what_is_slow_is_imported_after_the_settings_are_checked(script):
    ended = start("-c", PROGRAM, script, *settings_of(script))
    assert "no_such_key" in ended.stderr, ended.stderr
    exits, modules = json.loads(ended.stdout.splitlines()[-1])
    assert exits == [0, 2, "checked"]
    loaded = {slow for slow in SLOW for name in modules if f"{name}.".startswith(f"{slow}.")}
    assert not loaded


def test_all_scripts_are_looked_at():
    assert {"recipes/causal_lm/pretrain.py", "recipes/corpus/sample.py"} <= {*map(str, SCRIPTS)}
    assert len(SCRIPTS) >= 10
