"""BERT runs that are killed, or whose processes and ZeRO stages change, over a change of phase."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from killing import STAGES, partial_checkpoints, result, script_with
from launching import BERT, TINY_BERT, Launch, checkpoints, metrics, run, state, steps, tiny_run
from utils.sources import HELD_OUT_CHECKED

SETTINGS = {  # 16 rows a step, the last ones in micro-batches of one
    **TINY_BERT,
    "phases": [
        {"sequence_length": 32, "steps": 14},
        {"sequence_length": 64, "steps": 26, "per_device_batch_size": 1},
    ],
    "sequence_length": 64,
    "max_steps": 40,
    "learning_rate": 1e-3,
    "warmup_steps": 12,
    "weight_decay": 0.5,
    "save_steps": 10,
}
CHAINS = {  # the other stages: tests/utils/test_elastic.py
    "no ZeRO": [("cpu", 1), ("multi_cpu", 2), ("multi_cpu", 4), (None, 1)],
    "ZeRO-3": [("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3", 1)],
}


LEGS = (10, 20, 30)  # the steps at which the launch changes; the phase changes at 14
AT_STEP = """
seed, step, *_ = arguments
if (step, rank) == (STEP, RANK):
    ACTION
return original(*arguments, **options)
"""
TOLD = "os.kill(os.getpid(), signal.SIGTERM)"
HANG = 'print("here", flush=True); time.sleep(600)'


def at_step(step, rank, action):
    """Code for the place of `random_key`, which every micro-batch calls."""
    code = AT_STEP.replace("STEP", str(step)).replace("RANK", str(rank))
    return "utils.engine.random_key", code.replace("ACTION", action)


IN_SECOND_SAVE = f"""
if call == 2:
    {HANG}
return original(*arguments, **options)
"""
# where the first process hangs when all are killed, and the checkpoints then
KILLS = [
    (at_step(6, 0, HANG), []),
    (("utils.checkpoint.save_file", IN_SECOND_SAVE), ["step-00000010"]),
    (at_step(23, 0, HANG), ["step-00000010", "step-00000020"]),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, prose_folder, wordpiece_folder):
    """launch(config, processes, output_dir, script): a `Launch` of the run."""
    log = tmp_path_factory.mktemp("logs") / "log.txt"

    def begin(config, processes, output_dir, script=BERT):
        data = prose_folder / "train.jsonl", wordpiece_folder
        return Launch(config, processes, tiny_run(output_dir, *data, **SETTINGS), log, script)

    return begin


@pytest.fixture(scope="module")
def finish(launch):
    def run_to_the_end(*arguments):
        with launch(*arguments) as running:
            statuses = running.wait()
            assert set(statuses) == {0}, running.output()
            return running.output()

    return run_to_the_end


@pytest.fixture(scope="module")
def reference(tmp_path_factory, finish):
    """One process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    finish(None, 1, folder)
    return folder


@pytest.mark.parametrize("chain", CHAINS)
def test_processes_and_stages_change_and_the_run_goes_on(
    chain, tmp_path, launch, finish, reference
):
    output_dir = tmp_path / "run"
    for (config, processes), last in zip(CHAINS[chain], LEGS, strict=False):
        script = script_with(tmp_path / "told.py", *at_step(last - 1, processes - 1, TOLD), BERT)
        output = finish(config, processes, output_dir, script)
        assert f"stopped after step {last}; resume with: " in output
    finish(*CHAINS[chain][-1], output_dir)
    found, expected = steps(output_dir), steps(reference)
    assert [record["step"] for record in found] == list(range(1, 41))
    for key in ("tokens", "learning_rate"):
        assert [record[key] for record in found] == [record[key] for record in expected]
    for key in ("loss", "mlm_loss", "nsp_loss", "grad_norm"):
        np.testing.assert_allclose(
            [record[key] for record in found], [record[key] for record in expected], rtol=1e-5
        )
    last, last_expected = (state(checkpoints(folder)[-1]) for folder in (output_dir, reference))
    assert last["stream"] == last_expected["stream"]
    weights = load_file(output_dir / "model" / "model.safetensors")
    for name, expected_weight in load_file(reference / "model" / "model.safetensors").items():
        if name.endswith("key.bias"):
            continue  # has no gradient but rounding
        difference = np.linalg.norm(weights[name] - expected_weight)
        assert difference < 1e-5 * np.linalg.norm(expected_weight) + 1e-8, name


@pytest.mark.parametrize("stage", ["no DeepSpeed"])  # the others: tests/utils/test_kill.py
def test_kills_leave_no_trace_in_metrics_and_weights(stage, tmp_path, launch, finish):
    config, processes = STAGES[stage]
    undisturbed, output_dir = tmp_path / "undisturbed", tmp_path / "run"
    finish(config, processes, undisturbed)
    for hang, whole in KILLS:
        script = script_with(tmp_path / "hang.py", *hang, BERT)
        with launch(config, processes, output_dir, script) as running:
            running.wait_for("here")
            running.kill()
        assert [path.name for path in checkpoints(output_dir)] == whole
    finish(config, processes, output_dir)
    assert result(output_dir) == result(undisturbed)
    assert not partial_checkpoints(output_dir)


def test_a_broken_held_out_record_stops_all_processes_with_one_message(
    tmp_path, prose_folder, wordpiece_folder
):
    """Though it is in the share of the second alone, and beyond what is read before a run."""
    count = HELD_OUT_CHECKED + 1
    records = [json.dumps({"text": f"A sentence {number}."}) for number in range(count)]
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join([*records, "{"]))
    settings = {**TINY_BERT, "max_steps": 1, "validation_sources": [{"path": str(file)}]}
    words = tiny_run(tmp_path / "run", prose_folder / "train.jsonl", wordpiece_folder, **settings)
    with Launch("multi_cpu", 2, words, tmp_path / "log.txt", BERT) as running:
        assert running.wait() == [2, 2], running.output()
    (error,) = (x for x in running.output().splitlines() if x.startswith("error: "))
    assert error.startswith(f"error: {file}, line {count + 1}: not JSON")
    assert "Traceback" not in running.output()


def test_evaluations_do_not_depend_on_the_processes(
    tmp_path, prose_folder, wordpiece_folder, reference
):
    """Nor does the pseudo-perplexity; ranks may have no document at all."""
    settings = {
        **TINY_BERT,
        "model_name_or_path": str(reference / "model"),
        "max_steps": 1,
        "validation_sources": [{"path": str(prose_folder / "validation.jsonl")}],
        "test_sources": [{"path": str(prose_folder / "validation.jsonl")}],
        "pseudo_perplexity_documents": 2,
    }
    shown = []
    for config, processes in ((None, 1), ("zero3", 2), ("multi_cpu", 4)):
        folder = tmp_path / f"{config}"
        words = tiny_run(folder, prose_folder / "train.jsonl", wordpiece_folder, **settings)
        output = run(config, processes, words, tmp_path / "log.txt", script=BERT)
        evaluation = [r for r in metrics(folder) if "eval_loss" in r][-1]
        numbers = [v for v in evaluation.values() if isinstance(v, float)]
        printed = [line.split(": ")[1] for line in output.splitlines() if "of the test" in line]
        shown.append(numbers + [float(number) for number in printed])
    assert len(shown[0]) >= 10
    np.testing.assert_allclose(shown[1], shown[0], rtol=1e-4)
    np.testing.assert_allclose(shown[2], shown[0], rtol=1e-4)
