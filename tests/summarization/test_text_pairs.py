"""Pairs of texts as tokens: what the model reads, what it is to write, where it is cut."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from text_pairs import (
    Pair,
    PairArguments,
    PairEncoder,
    check_tokenizer,
    own_prefix,
    read_pairs,
)
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.tables import Table

ENCODER_DECODER = SimpleNamespace(is_encoder_decoder=True)
DECODER = SimpleNamespace(is_encoder_decoder=False)
PAIRS = [Pair("kato miren", "sul"), Pair("vorel dramika tosul bavor", "né pi")]


def parts(example):
    ids, length = example["input_ids"].tolist(), example["source_length"]
    return ids[:length], ids[length:]


def test_encoder_decoder_reads_what_the_tokenizer_makes(tokenizer):
    encode = PairEncoder(tokenizer, PairArguments(source_prefix="summarize: "), ENCODER_DECODER)
    for pair, example in zip(PAIRS, encode(PAIRS), strict=True):
        source, target = parts(example)
        assert source == tokenizer("summarize: " + pair.source)["input_ids"]
        assert target == [*tokenizer(text_target=pair.target)["input_ids"], tokenizer.eos_token_id]
    assert (encode.cut_sources, encode.cut_targets) == (0, 0)


def test_decoder_goes_on_from_the_prompt(tokenizer):
    settings = PairArguments(source_prefix="Read: ", source_suffix="\nTL;DR:\n")
    encode = PairEncoder(tokenizer, settings, DECODER)
    for pair, example in zip(PAIRS, encode(PAIRS), strict=True):
        source, target = parts(example)
        assert source == tokenizer(f"Read: {pair.source}\nTL;DR:\n")["input_ids"]
        assert target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(target[:-1]) == pair.target
        assert tokenizer.bos_token_id not in target


def test_a_tokenizer_that_ends_every_text(tokenizer_folder):
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end_of_text|>", special_tokens=[("<|end_of_text|>", end)]
    )
    source, target = parts(PairEncoder(tokenizer, PairArguments(), ENCODER_DECODER)(PAIRS)[0])
    assert (source.count(end), source[-1]) == (1, end)
    assert (target.count(end), target[-1]) == (1, end)
    settings = PairArguments(source_suffix=":", max_source_length=4)
    encode = PairEncoder(tokenizer, settings, DECODER)
    for example in encode(PAIRS):
        source, target = parts(example)
        assert end not in source  # it would end the text before the target begins
        assert len(source) == 4
        assert (target.count(end), target[-1]) == (1, end)
    assert encode.cut_sources == 1


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    settings = PairArguments(source_suffix="\nTL;DR:\n", max_source_length=12, max_target_length=3)
    suffix = tokenizer(settings.source_suffix, add_special_tokens=False)["input_ids"]
    encode = PairEncoder(tokenizer, settings, DECODER)
    pairs = [Pair("ka", "ba"), Pair(PAIRS[1].source, "dramika vorel")]
    kept, cut = map(parts, encode(pairs))
    assert (encode.cut_sources, encode.cut_targets) == (1, 1)
    assert len(kept[0]) < 12
    whole = tokenizer(PAIRS[1].source)["input_ids"]
    assert cut[0] == whole[: 12 - len(suffix)] + suffix  # the source alone is shortened
    target = tokenizer("dramika vorel", add_special_tokens=False)["input_ids"]
    assert cut[1] == [*target[:2], tokenizer.eos_token_id]
    settings.max_source_length = len(suffix) + 1
    with pytest.raises(InputError) as error:
        PairEncoder(tokenizer, settings, DECODER)(pairs)
    assert str(error.value) == (
        f"max_source_length: {len(suffix) + 1} leaves no room for a source beside the "
        f"{len(suffix)} tokens of source_suffix"
    )


def test_a_target_that_just_fits_is_not_cut(tokenizer):
    tokens = len(tokenizer("dramika vorel", add_special_tokens=False)["input_ids"])
    for room, cut in ((tokens, 1), (tokens + 1, 0)):
        settings = PairArguments(source_suffix=":", max_target_length=room)
        encode = PairEncoder(tokenizer, settings, DECODER)
        encode([Pair("ka", "dramika vorel")])
        assert encode.cut_targets == cut


def test_special_tokens_in_a_text_are_read_as_the_tokenizer_reads_them(tokenizer_folder):
    for options, ends in (({}, 3), ({"split_special_tokens": True}, 1)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **options)
        encode = PairEncoder(tokenizer, PairArguments(source_suffix=":"), DECODER)
        (example,) = encode([Pair("ka <|end_of_text|> to", "mi <|end_of_text|> ren")])
        assert example["input_ids"].tolist().count(tokenizer.eos_token_id) == ends


def test_the_end_token_stays_in_the_loss_where_it_pads(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    for config, suffix in ((ENCODER_DECODER, ""), (DECODER, ":")):
        encode = PairEncoder(tokenizer, PairArguments(source_suffix=suffix), config)
        examples = encode(PAIRS)
        batch = encode.collate(examples)
        for row, example in enumerate(examples):
            labels = batch["labels"][row]
            assert labels[labels != IGNORE_INDEX].tolist() == parts(example)[1]
            assert (labels == end).sum() == 1


def test_batches(tokenizer):
    for config, suffix in ((ENCODER_DECODER, ""), (DECODER, ":")):
        encode = PairEncoder(tokenizer, PairArguments(source_suffix=suffix), config)
        examples = encode(PAIRS)
        batch = encode.collate(examples)
        for row, example in enumerate(examples):
            source, target = parts(example)
            read = source if config.is_encoder_decoder else source + target
            mask = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][mask].tolist() == read
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            labels = batch["labels"][row]
            assert labels[labels != IGNORE_INDEX].tolist() == target
            if not config.is_encoder_decoder:  # at their places
                places = slice(len(source), len(source) + len(target))
                assert labels[places].tolist() == batch["input_ids"][row, places].tolist()
        empty = encode.collate([])
        assert empty["attention_mask"].tolist() == [[1]]
        assert empty["labels"].tolist() == [[IGNORE_INDEX]]


def test_columns_and_what_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"translation": {"en": "one", "ro": "unu"}}, {"translation": {"en": "two", "ro": " "}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    columns = PairArguments(source_column="translation.en", target_column="translation.ro")
    assert read_pairs([Table(str(path))], columns) == [("one", "unu", f"{path}, line 1", str(path))]
    with pytest.raises(InputError) as error:
        read_pairs([Table(str(path))], PairArguments(source_column="translation.de"))
    assert str(error.value) == (
        f"{path}, line 1: no column 'translation.de'; there are: translation.en, translation.ro"
    )
    with pytest.raises(InputError) as error:
        read_pairs([Table(str(path))], PairArguments())
    assert str(error.value) == f"{path}, line 1: no column 'document'; there are: translation"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        read_pairs([Table(str(path))], columns)
    assert str(error.value) == f"{path}, line 2: translation.ro is empty"


def test_a_tokenizer_without_an_end(wordpiece):
    with pytest.raises(InputError) as error:
        check_tokenizer(wordpiece, PairArguments())
    assert str(error.value) == "tokenizer: it has no eos_token, which ends a target"


def test_the_prefix_of_the_given_model_is_kept_unless_another_is_set():
    known = {"summarization": {"prefix": "summarize: ", "num_beams": 4}, "translation_en_to_de": {}}
    for setting, task, prefix in (
        (None, "summarization", "summarize: "),
        ("", "summarization", ""),
        ("TL;DR ", "summarization", "TL;DR "),
        (None, "translation", ""),
    ):
        config = SimpleNamespace(is_encoder_decoder=True, task_specific_params=dict(known))
        assert own_prefix(config, PairArguments(source_prefix=setting), task) == prefix
        assert config.task_specific_params == {task: {"prefix": prefix}}  # of the export
    config = SimpleNamespace(is_encoder_decoder=False, task_specific_params=None)
    assert own_prefix(config, PairArguments(), "summarization") == ""
