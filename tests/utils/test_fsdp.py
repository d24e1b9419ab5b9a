"""PyTorch's fully sharded data parallel (FSDP2), on CPU; tests/utils/test_elastic.py has more."""

import numpy as np

from launching import BERT, TINY_BERT, TINY_RUN, Launch, metrics, run, steps, tiny_run


def test_losses_and_sums_of_gradients_are_in_fp32(tmp_path, corpus_folder, tokenizer_folder):
    """In bf16 a sum of 16 x 31 losses would be off by up to 0.4%; and texts are those of DDP."""
    model = {**TINY_RUN["model"], "tie_word_embeddings": True}
    settings = {
        **{"mixed_precision": "bf16", "max_steps": 6, "eval_steps": 3, "model": model},
        "validation_sources": [{"path": str(corpus_folder / "validation.jsonl")}],
        **{"eval_documents": 10, "sample_prompts": ["Book"], "learning_rate": 1e-3},
    }
    for config in ("fsdp2", "multi_cpu"):
        words = tiny_run(
            tmp_path / config, corpus_folder / "train-0.jsonl", tokenizer_folder, **settings
        )
        output = run(config, 2, words, tmp_path / "log.txt")
        assert ("parallelism: FSDP2" in output) == (config == "fsdp2")
    found, expected = (steps(tmp_path / config) for config in ("fsdp2", "multi_cpu"))
    for key, tolerance in (("loss", 5e-4), ("grad_norm", 2e-2)):
        values = [[record[key] for record in records] for records in (found, expected)]
        np.testing.assert_allclose(*values, rtol=tolerance)
    evaluations = [
        [r["eval_loss"] for r in metrics(tmp_path / config) if "eval_loss" in r]
        for config in ("fsdp2", "multi_cpu")
    ]
    np.testing.assert_allclose(*evaluations, rtol=5e-4)
    assert len([r for r in metrics(tmp_path / "fsdp2") if "samples" in r]) == 2


def test_an_encoder_whose_embeddings_are_its_output_layer(tmp_path, prose_folder, wordpiece_folder):
    settings = {**TINY_BERT, "max_steps": 4, "dataloader_num_workers": 0}
    losses = []
    for config, processes in (("fsdp2", 2), (None, 1)):
        folder = tmp_path / f"{config}"
        words = tiny_run(folder, prose_folder / "train.jsonl", wordpiece_folder, **settings)
        run(config, processes, words, tmp_path / "log.txt", script=BERT)
        losses.append([record["grad_norm"] for record in steps(folder)])
        losses[-1] += [record["mlm_loss"] for record in steps(folder)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_first_version_is_refused(tmp_path, corpus_folder, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("launching._environment", lambda *_: {"ACCELERATE_USE_FSDP": "true"})
    words = tiny_run(tmp_path / "run", corpus_folder / "train-0.jsonl", tokenizer_folder)
    with Launch("cpu", 1, words, tmp_path / "log.txt") as launch:
        assert launch.wait() == [2]
        message = "error: FSDP: give fsdp_version: 2 in the launch config, as fsdp2.yaml does\n"
        assert launch.output() == message
