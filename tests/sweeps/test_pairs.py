"""Pairs of texts, by every kind of tokenizer and every encoder-decoder: what is trained is what
transformers makes of a source and a target, and what the exported folder reads and writes."""

import ast
import contextlib
import io
import json
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    LlamaTokenizer,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as MBART_CODES
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES

from classification_examples import check_tokenizer as check_for_classifier
from classification_examples import encode
from conftest import write_jsonl
from launching import TINY_RUN, command_line, predictions
from recipes.summarization import finetune as summarization
from recipes.summarization.finetune import TargetLoss
from sweeps.architectures import CannotBuild, model_types, sampled, sharpened, tiny_model
from text_pairs import IGNORE_INDEX, Pair, PairArguments, PairEncoder, check_tokenizer

PIECES = ["▁", *string.ascii_lowercase, ":", "▁the", "▁cat", "▁chat", "▁le", "at"]
TEXTS = [
    Pair("the cat", "le chat"),
    Pair(" a cat </s> the  cat<pad>", "le </s> chat </s>"),
    Pair("<s>the\ncat: <unk> [SEP] é", "chat"),
    Pair("the cat is a cat " * 9, "le chat est un chat " * 5),
]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def byte_level(template: str | None, **options):
    """GPT-2's kind: every byte a token."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if template is not None:
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special | options)


def unigram(first: tuple[str, ...], last: list[str]):
    pieces = [(piece, -2.0 - len(PIECES) / 100) for piece in PIECES]
    return [*((t, 0.0) for t in first), *pieces, *((token, 0.0) for token in last)]


def word_pieces():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    vocabulary = {word: index for index, word in enumerate(words)}
    return BertTokenizer(vocab=vocabulary, eos_token="[SEP]", bos_token="[CLS]")


def m2m100(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers.models.m2m_100 import tokenization_m2m_100

    lines = ["the cat is a cat and the dog is a dog", "le chat est un chat", "abc xyz jkq vw"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spm"),
        vocab_size=30,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(model.id_to_piece(i) for i in range(3, 30))]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    tokens = [f"__{code}__" for code in tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"]]
    files = str(folder / "vocab.json"), str(folder / "spm.model")
    return M2M100Tokenizer(*files, additional_special_tokens=tokens)


FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
NLLB_PIECES = {piece: i for i, piece in enumerate([*FAIRSEQ, *PIECES[:28]])}
TOKENIZERS = {
    "byte level": lambda _: byte_level(None),
    "byte level, begins": lambda _: byte_level("<s> $A"),
    "byte level, ends": lambda _: byte_level("$A </s>"),
    "byte level, begins and ends": lambda _: byte_level("<s> $A </s>"),
    "byte level, begins with its end": lambda _: byte_level("</s> $A", bos_token="</s>"),
    "byte level, pads with its end": lambda _: byte_level("<s> $A", pad_token="</s>"),
    "byte level, splits": lambda _: byte_level("<s> $A </s>", split_special_tokens=True),
    "byte level, cuts on the left": lambda _: byte_level("<s> $A </s>", truncation_side="left"),
    "bytes": lambda _: ByT5Tokenizer(),
    "t5": lambda _: T5Tokenizer(vocab=unigram(("<pad>", "</s>", "<unk>"), []), extra_ids=3),
    "llama": lambda _: LlamaTokenizer(
        vocab={t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *PIECES])}, merges=[]
    ),
    "word pieces": lambda _: word_pieces(),
    "mbart": lambda _: MBartTokenizer(vocab=unigram(FAIRSEQ, [*MBART_CODES, "<mask>"])),
    "mbart-50": lambda _: MBart50Tokenizer(vocab=unigram(FAIRSEQ, [*MBART50_CODES, "<mask>"])),
    "nllb": lambda _: NllbTokenizer(vocab=dict(NLLB_PIECES), merges=[]),
    "nllb, legacy": lambda _: NllbTokenizer(
        vocab=dict(NLLB_PIECES), merges=[], legacy_behaviour=True
    ),
    "m2m100": m2m100,
}
LANGUAGES = {
    "mbart": ("en_XX", "ro_RO"),
    "mbart-50": ("de_DE", "sl_SI"),
    "nllb": ("eng_Latn", "ron_Latn"),
    "nllb, legacy": ("deu_Latn", "fra_Latn"),
    "m2m100": ("de", "fr"),
}


@pytest.fixture
def saved(tmp_path):
    """saved(kind): the folder of such a tokenizer."""

    def save(kind):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        TOKENIZERS[kind](folder).save_pretrained(folder)
        return folder

    return save


def languages_of(kind):
    return dict(zip(("source_lang", "target_lang"), LANGUAGES.get(kind, (None, None)), strict=True))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_encoder_decoder_reads_what_the_exported_tokenizer_writes(kind, saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved(kind))
    arguments = PairArguments(
        source_prefix="<s> the: ", max_source_length=24, max_target_length=12, **languages_of(kind)
    )
    check_tokenizer(tokenizer, arguments)
    tokenizer.model_max_length = arguments.max_source_length
    config = AutoConfig.for_model("t5")
    encode = PairEncoder(tokenizer, arguments, config)
    examples = encode(TEXTS)
    tokenizer.save_pretrained(tmp_path / "export")
    client = AutoTokenizer.from_pretrained(tmp_path / "export")
    end = tokenizer.eos_token_id
    cut = 0
    for pair, example in zip(TEXTS, examples, strict=True):
        ids, length = example["input_ids"].tolist(), example["source_length"]
        source = client(arguments.source_prefix + pair.source, truncation=True)["input_ids"]
        assert ids[:length] == source
        target = client(text_target=pair.target)["input_ids"]
        if kind in ("byte level", "byte level, begins", "llama") or "with its end" in kind:
            target = [*target, end]  # the tokenizer writes none
        labels = ids[length:]
        assert len(labels) == min(len(target), 12)
        if len(target) <= 12:
            assert labels == target
        else:  # the closing tokens are kept
            cut += 1
            assert end in labels
            assert labels[-1] == target[-1]
    assert (encode.cut_sources, encode.cut_targets) == (
        sum(len(client(arguments.source_prefix + p.source)["input_ids"]) > 24 for p in TEXTS),
        cut,
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_classifier_reads_what_the_exported_tokenizer_writes(kind, saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved(kind))
    config = AutoConfig.for_model("bert" if kind == "word pieces" else "llama")
    check_for_classifier(tokenizer, config, 16)
    sources, targets = [pair.source for pair in TEXTS], [pair.target for pair in TEXTS]
    for columns in ([sources], [sources, targets]):
        rows = [*zip(*columns, strict=True)]
        examples, cut = encode(tokenizer, rows)
        tokenizer.save_pretrained(tmp_path / "export")
        client = AutoTokenizer.from_pretrained(tmp_path / "export")
        for row, example in zip(rows, examples, strict=True):
            inputs = client(*row, truncation=True)  # as transformers' pipeline does
            del inputs["attention_mask"]
            assert {name: ids.tolist() for name, ids in example.items()} == dict(inputs)
        assert cut == sum(len(client(*row)["input_ids"]) > 16 for row in rows) > 0


def run_code(code: str, folder, source: str) -> str:
    """What the code of a card writes for a source."""
    code = code.replace('"."', repr(str(folder)))
    code = code.replace('"The text that is to be read."', repr(source))
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        exec(compile(ast.parse(code), "card", "exec"), {})
    return written.getvalue()


def assert_card_writes_predictions(run) -> None:
    card = (run / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    for record in predictions(run):
        assert run_code(code, run / "model", record["source"]) == record["prediction"] + "\n"


SMALL = {
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
FAIRSEQ_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
GIVEN = {
    "t5": ("t5", {"model_type": "t5", **T5, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "bytes": ("bytes", {"model_type": "t5", **T5, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "bart": ("byte level, begins and ends", {"model_type": "bart", **SMALL}),
    "mbart": ("mbart", {"model_type": "mbart", **SMALL, **FAIRSEQ_IDS}),
    "mbart-50": ("mbart-50", {"model_type": "mbart", **SMALL, **FAIRSEQ_IDS}),
    "nllb": ("nllb", {"model_type": "m2m_100", **SMALL, **FAIRSEQ_IDS}),
    "m2m100": ("m2m100", {"model_type": "m2m_100", **SMALL, **FAIRSEQ_IDS}),
    "llama": ("byte level, begins and ends", {**TINY_RUN["model"], "num_hidden_layers": 1}),
}


@pytest.fixture
def given(saved, tmp_path):
    """given(name): the folder of a model with large random weights and its tokenizer."""

    def make(name, **generation):
        kind, settings = GIVEN[name]
        folder = saved(kind)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(**{**ids, **settings}, vocab_size=len(tokenizer))
        torch.manual_seed(0)
        auto_model = summarization.transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto_model = AutoModelForSeq2SeqLM
        model = sharpened(auto_model.from_config(config), 0.5)
        # so that there is a text to compare
        ids = {*tokenizer.all_special_ids}
        if kind in LANGUAGES:
            tokenizer.tgt_lang = LANGUAGES[kind][1]
            ids -= {*tokenizer(text_target="a")["input_ids"]}
        options = {"suppress_tokens": sorted(ids - {tokenizer.eos_token_id})}
        for option, value in (options | generation).items():
            setattr(model.generation_config, option, value)
        model.save_pretrained(folder)
        return kind, folder

    return make


@pytest.fixture
def summarize(call, tmp_path):
    """summarize(folder, name, **settings): the recipe, one step from a given model."""

    def begin(folder, name="run", **settings):
        rows = [{"document": pair.source, "summary": pair.target} for pair in TEXTS]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        values = {
            "output_dir": tmp_path / name,
            "model_name_or_path": folder,
            "max_source_length": 24,
            "max_target_length": 8,
            "min_new_tokens": 5,
            "global_batch_size": 4,
            "per_device_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "report_to": [],
            **{f"{part}_data": [{"path": path}] for part in ("train", "validation", "test")},
        }
        return call(summarization.main, command_line(values | settings), tmp_path / name)

    return begin


def assert_documented_start(name, folder, language):
    """As transformers' documentation of the model has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(f"__{language}__" if name == "m2m100" else language)
    generation = GenerationConfig.from_pretrained(folder)
    start = (generation.decoder_start_token_id, generation.forced_bos_token_id)
    assert start == ((token, None) if name == "mbart" else (tokenizer.eos_token_id, token))


@pytest.mark.parametrize(
    ("name", "adapter"), [*((name, False) for name in GIVEN), ("t5", True), ("mbart-50", True)]
)
def test_the_code_of_the_card_writes_the_predictions(name, adapter, given, summarize):
    kind, folder = given(name, no_repeat_ngram_size=1)
    settings = {name: code for name, code in languages_of(kind).items() if code}
    settings["source_prefix"] = "<s>the: "
    if name == "llama":
        settings["source_suffix"] = "</s>\n"
    if adapter:
        settings |= {"lora": {"r": 2, "init_lora_weights": False}, "num_beams": 2}
    ended = summarize(folder, **settings)
    assert ended.status == 0, ended.error
    assert len({record["prediction"] for record in predictions(ended.folder)}) > 1
    if kind in LANGUAGES:
        assert_documented_start(name, ended.folder / "model", LANGUAGES[kind][1])
    assert_card_writes_predictions(ended.folder)


@pytest.mark.parametrize(("kind", "positions"), [("bert", 40), ("roberta", 38)])
def test_a_model_made_of_two_has_the_positions_of_each(kind, positions, saved, summarize):
    """RoBERTa's positions begin behind that of the padding."""
    folder = saved("word pieces")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        AutoConfig.for_model(kind, **size), AutoConfig.for_model(kind, **size)
    )
    config.decoder_start_token_id = tokenizer.cls_token_id
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    sharpened(EncoderDecoderModel(config)).save_pretrained(folder)
    ended = summarize(folder, "fits", max_source_length=positions)
    assert ended.status == 0, ended.error
    assert_card_writes_predictions(ended.folder)
    ended = summarize(folder, "long", max_source_length=positions + 1)
    assert ended.error == (
        f"error: max_source_length: {positions + 1} is more than the model's "
        f"max_position_embeddings of {positions}\n"
    )


def test_a_given_model_is_searched_as_it_says_unless_the_settings_say_more(given, summarize):
    options = {
        "num_beams": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
        "forced_bos_token_id": 5,
        "eos_token_id": [2, 5],  # with which it begins
        "do_sample": True,
        "temperature": 0.5,
        "max_length": 20,
        "min_length": 10,
    }
    _, folder = given("bart", **options)
    kept = summarize(folder, "kept", source_prefix="the ", min_new_tokens=0)
    assert kept.status == 0, kept.error
    found = GenerationConfig.from_pretrained(kept.folder / "model").to_diff_dict()
    ours = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 0, "pad_token_id": 0}
    expected = options | ours
    for name in ("temperature", "max_length", "min_length"):  # nothing is drawn; lengths are ours
        del expected[name]
    assert found.items() >= expected.items()
    assert not {"temperature", "max_length", "min_length"} & found.keys()
    assert "num_beams 3, " in kept.output
    assert_card_writes_predictions(kept.folder)
    ended = summarize(folder, "set", num_beams=1, no_repeat_ngram_size=0)
    found = GenerationConfig.from_pretrained(ended.folder / "model").to_diff_dict()
    assert (found["num_beams"], found["no_repeat_ngram_size"]) == (1, 0)
    assert not {"length_penalty", "early_stopping"} & found.keys()  # there are no beams
    # of a run's own export nothing has to be said again
    ended = summarize(kept.folder / "model", "on")
    assert "source_prefix: 'the '" in (ended.folder / "config.yaml").read_text()
    ended = summarize(folder, "refused", num_beams=1, length_penalty=2.0)
    assert ended.error.endswith(
        "error: length_penalty: it weighs beams against each other: raise num_beams\n"
    )
    assert not ended.folder.exists()


def test_languages_are_known_needed_and_kept(given, summarize):
    _, folder = given("mbart-50")
    asked = {"source_lang": "de_DE", "target_lang": "sl_SI"}
    ended = summarize(folder, "first", **asked)
    again = summarize(ended.folder / "model", "again")
    assert again.status == 0, again.error
    one, other = (GenerationConfig.from_pretrained(run.folder / "model") for run in (ended, again))
    assert one.forced_bos_token_id == other.forced_bos_token_id is not None

    def refused(message, folder=folder, **settings):
        ended = summarize(folder, "refused", **settings)
        assert (ended.status, ended.error) == (2, f"error: {message}\n")
        assert not ended.folder.exists()

    nearest = "MBart50Tokenizer knows no 'sl_SL': the nearest language is 'sl_SI'"
    refused(f"target_lang: {nearest}", source_lang="de_DE", target_lang="sl_SL")
    some = "MBart50Tokenizer needs one of its languages: ar_AR, cs_CZ, de_DE, en_XX, es_XX, "
    refused(f"target_lang: {some}et_EE, fi_FI, fr_XX, gu_IN, …", source_lang="de_DE")
    refused(f"source_lang: {some}et_EE, fi_FI, fr_XX, gu_IN, …", target_lang="de_DE")


def test_a_model_from_scratch_begins_and_ends_with_our_tokens(saved, summarize, tmp_path):
    """BART's defaults are ids of its own vocabulary: 2 is its end, here it is a letter."""
    tokenizer = byte_level("<s> $A </s>")
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<fill>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "ours")
    scratch = {"model_name_or_path": None, "tokenizer": tmp_path / "ours"}
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert end > 200
    for model, start, last in (
        ({"model_type": "bart", **SMALL}, end, end),
        ({"model_type": "blenderbot", **SMALL}, tokenizer.bos_token_id, end),
        ({"model_type": "mbart", **SMALL}, end, end),
        ({"model_type": "m2m_100", **SMALL, "max_position_embeddings": 512}, end, None),
        ({"model_type": "bart", **SMALL, "decoder_start_token_id": 4}, 4, end),
    ):
        ended = summarize(None, f"{model['model_type']} {start}", **scratch, model=model)
        assert ended.status == 0, ended.error
        found = GenerationConfig.from_pretrained(ended.folder / "model")
        assert (found.decoder_start_token_id, found.forced_eos_token_id) == (start, last)
        assert (found.eos_token_id, found.pad_token_id) == (end, padding)
    byte_level("<s> $A </s>", pad_token="</s>").save_pretrained(tmp_path / "ours")
    ended = summarize(None, "refused", **scratch, model={"model_type": "mbart", **SMALL})
    assert ended.error.endswith(
        "error: tokenizer: mbart begins with the last token of a target that is no padding: give a "
        "tokenizer whose pad_token is not its eos_token\n"
    )


# whose labels were shifted wrongly, or not at all; whose loss is another
ONCE_WRONG = {"blenderbot", "encoder-decoder", "fsmt", "m2m_100", "mbart", "prophetnet"}
SWEPT = [name for name in model_types("seq2seq") if sampled(name) or name in ONCE_WRONG]


@pytest.mark.parametrize("model_type", SWEPT)
def test_the_loss_is_the_model_s_own(model_type, record):
    try:
        model = sharpened(tiny_model("seq2seq", model_type))
    except CannotBuild as error:
        record("seq2seq", model_type, loss=f"not built: {error}")
        return
    config = model.config
    if not config.is_encoder_decoder:
        record("seq2seq", model_type, loss="refused: no encoder-decoder of texts")
        return
    if model_type == "prophetnet":
        record("seq2seq", model_type, loss="refused unless disable_ngram_loss: true, eps: 0.0")
        model = sharpened(tiny_model("seq2seq", model_type, disable_ngram_loss=True, eps=0.0))
    if getattr(config, "decoder_start_token_id", None) in (None, config.pad_token_id):
        config.decoder_start_token_id = 3
    lengths = [(12, 7), (8, 3), (5, 6)]
    sources = torch.randint(5, 90, (3, 12))
    labels = torch.randint(5, 90, (3, 7))
    mask = torch.zeros_like(sources)
    for row, (source, target) in enumerate(lengths):
        mask[row, :source] = 1
        labels[row, target:] = IGNORE_INDEX
    inputs = {"input_ids": sources, "attention_mask": mask}
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    # as transformers.DataCollatorForSeq2Seq does
    more = {} if own is None else {"decoder_input_ids": own(labels=labels.clone())}
    objective = TargetLoss(model)
    with torch.no_grad():
        expected = float(model(**inputs, **more, labels=labels, use_cache=False).loss)
        loss = float(objective(**inputs, labels=labels)["loss"])
        nothing = objective(sources[:1, :1], mask[:1, :1], torch.full((1, 1), IGNORE_INDEX))
    count = sum(target for _, target in lengths)
    assert loss == pytest.approx(expected * count, rel=2e-6)
    assert float(nothing["loss"]) == 0
    if model_type != "prophetnet":
        record("seq2seq", model_type, loss="same")


@pytest.mark.parametrize("model_type", [t for t in SWEPT if sampled(t) or t in ("fsmt", "m2m_100")])
def test_every_encoder_decoder_writes_as_the_run_did(model_type, saved, summarize, record):
    folder = saved("word pieces")
    settings = {"disable_ngram_loss": True, "eps": 0.0} if model_type == "prophetnet" else {}
    try:
        model = sharpened(tiny_model("seq2seq", model_type, **settings))
    except CannotBuild:
        return
    if not model.config.is_encoder_decoder:
        return
    model.save_pretrained(folder)
    ended = summarize(folder)
    assert ended.status == 0, ended.error
    assert_card_writes_predictions(ended.folder)
    record("seq2seq", model_type, predictions="same")
