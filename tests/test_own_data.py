"""The commands of the README's first screen, on files as people have them."""

import json
import re
import shlex

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from conftest import make_prose
from launching import ROOT, TINY_BERT, TINY_RUN, steps
from programs import documented_commands
from recipes.causal_lm import finetune, pretrain
from recipes.classification import finetune as finetune_classifier

TEMPLATE = ROOT / "recipes/causal_lm/chat_templates/plain.jinja"


def command_for(script: str) -> list[str]:
    """The README's words after the script."""
    first_screen = (ROOT / "README.md").read_text().partition("## Two commands")[0]
    (line,) = re.findall(rf"^    python {script} (.*)$", first_screen, re.M)
    return shlex.split(line)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "my texts"
    (folder / "letters").mkdir(parents=True)
    for number, document in enumerate(make_prose("text", 12)):
        text = document["text"].replace(". ", ".\r\n\r\n")
        path = folder / ("letters" if number % 2 else "") / f"{number}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "Thumbs.db").write_bytes(b"\0")
    return folder


def test_a_folder_of_texts(call, texts, tokenizer_folder, tmp_path):
    config, option, _ = command_for("recipes/causal_lm/pretrain.py")
    folder = tmp_path / "run"
    words = [config, option, str(texts), "--output_dir", str(folder)]
    words += ["--tokenizer", str(tokenizer_folder), "--model", json.dumps(TINY_RUN["model"])]
    words += ["--sequence_length", "32", "--report_to", "none"]
    ended = call(pretrain.main, words, folder)
    assert ended.status == 0, ended.error
    assert f"{texts}: files 12, each of them a document; lanes 2" in ended.output
    found = re.search(r"num_train_epochs 3: steps (\d+)", ended.output)
    assert int(found[1]) == len(steps(folder)) == steps(folder)[-1]["step"]
    tokens = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [path.read_text("utf-8-sig") for path in sorted(texts.rglob("*.txt"))]
    ids = tokens(documents, add_special_tokens=False)["input_ids"]
    assert steps(folder)[-1]["tokens"] == 3 * sum(len(x) + 2 for x in ids)  # bos and eos of each
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_a_model_goes_on_with_a_folder_of_texts(call, texts, tokenizer_folder, tmp_path):
    readme = (ROOT / "recipes/causal_lm/README.md").read_text()
    commands = documented_commands("recipes/causal_lm/pretrain.py", readme)
    (words,) = (words for words in commands if "pretrain_continued.yaml" in words[0])
    base = tmp_path / "gpt2"
    config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=32, n_layer=1, n_head=2)
    given = AutoModelForCausalLM.from_config(config)
    given.save_pretrained(base)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(base)
    words = [{"my_texts/": str(texts), "openai-community/gpt2": str(base)}.get(w, w) for w in words]
    folder = tmp_path / "run"
    words += ["--output_dir", str(folder), "--max_steps", "1", "--report_to", "none"]
    ended = call(pretrain.main, words, folder)
    assert ended.status == 0, ended.error
    trained = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, tensor in given.named_parameters():  # AdamW's first step is the learning rate
        change = (trained.get_parameter(name) - tensor).abs().max()
        assert 0 < change <= 5.1e-5, name
    own = AutoTokenizer.from_pretrained(tokenizer_folder).get_vocab()
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == own


@pytest.mark.parametrize(("separator", "name"), [(",", "my.csv"), ("\t", "my data.tsv")])
def test_a_table(separator, name, call, wordpiece_folder, tmp_path):
    config, data, _, label, column = command_for("recipes/classification/finetune.py")
    rows = [
        (d["text"].split(". ")[0], ("good", "bad")[i % 2])
        for i, d in enumerate(make_prose("t", 60))
    ]
    path = tmp_path / name
    lines = [separator.join(("review", column)), *(separator.join(row) for row in rows)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    base = tmp_path / "base"
    AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(**TINY_BERT["model"], vocab_size=320, pad_token_id=0)
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(wordpiece_folder).save_pretrained(base)
    folder = tmp_path / "run"
    words = [config, data, str(path), label, column, "--output_dir", str(folder)]
    words += ["--model_name_or_path", str(base), "--sequence_length", "64", "--report_to", "none"]
    ended = call(finetune_classifier.main, words, folder)
    assert ended.status == 0, ended.error
    assert f"{path}: the texts are taken from its column 'review'" in ended.output
    assert "labels: bad, good" in ended.output
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["train_data"][0]["path"] == str(path)
    assert AutoConfig.from_pretrained(folder / "model").id2label == {0: "bad", 1: "good"}
    path.write_text("id,review,y\n1,nice,good\n2,poor,bad\n".replace(",", separator))
    ended = call(finetune_classifier.main, words, folder)
    assert "text_column: which holds the texts? there are: 'id', 'review', 'y'" in ended.error
    ended = call(finetune_classifier.main, [*words, "--label_column", "z"], folder)
    assert "line 2: no column 'z'; there are: id, review, y" in ended.error


def test_conversations(call, tokenizer_folder, tmp_path):
    config, data, _, model, _ = command_for("recipes/causal_lm/finetune.py")
    base = tmp_path / "chat model"
    torch.manual_seed(0)
    settings = TINY_RUN["model"] | {"max_position_embeddings": 1024}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings, vocab_size=512)
    ).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(base)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": str(i)},
            ]
        }
        for i in range(40)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    words = [config, data, str(path), model, str(base), "--output_dir", str(folder)]
    words += ["--report_to", "none", "--max_steps", "3"]
    ended = call(finetune.main, words, folder)
    assert ended.status == 0, ended.error
    assert len(steps(folder)) == 3
    assert (folder / "model/adapter_config.json").exists()
