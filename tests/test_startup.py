"""What a script has imported when it prints its help, or that a key is wrong: nothing slow."""

import json

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
# one interpreter runs a script twice; `command` ends a process by os._exit, which leaves no hooks
PROGRAM = """
import json, os, runpy, sys

program = sys.argv[1]
exits = []

def leave(status):
    raise SystemExit(status)

os._exit = leave
sys.path[0] = os.path.dirname(os.path.abspath(program)) if program.endswith(".py") else os.getcwd()
for option in ("--help", "--no_such_key"):
    sys.argv = [program, option] + ["1"] * (option != "--help")
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        exits.append(end.code)
print(json.dumps([exits, list(sys.modules)]))
"""


@pytest.mark.parametrize("program", [*map(str, SCRIPTS), "utils.export"])
def test_what_is_slow_is_imported_after_the_settings_are_checked(program):
    ended = start("-c", PROGRAM, program)
    assert "no_such_key" in ended.stderr, ended.stderr
    exits, modules = json.loads(ended.stdout.splitlines()[-1])
    assert exits == [0, 2]
    loaded = {slow for slow in SLOW for name in modules if f"{name}.".startswith(f"{slow}.")}
    assert not loaded


def test_all_scripts_are_looked_at():
    assert {"recipes/causal_lm/pretrain.py", "recipes/corpus/sample.py"} <= {*map(str, SCRIPTS)}
    assert len(SCRIPTS) >= 10
