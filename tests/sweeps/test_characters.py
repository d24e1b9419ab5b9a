"""Characters and tokens: every kind of tokenizer x scripts x marks of a chat, and spans of answers.

What is learnt is what was said, to the character, and stands behind the very tokens that a client
gives; an answer's span holds the answer, as the rule of transformers' `run_qa.py` finds it wherever
that rule holds.
"""

import itertools
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from answers import best_spans, make_windows
from chat_rendering import turn_ends
from conversations import ConversationArguments, set_chat_template, to_examples
from questions import Answer, Question
from utils.loss import IGNORE_INDEX
from utils.tables import TableRow

TEXTS = [
    "Where is it?",
    " a blank before",
    "a blank behind ",
    "\nnew lines\n\n  and blanks\n",
    "\n\nYes",
    "cafe\u0301 cre\u0300me, e\u0301te\u0301",
    "café crème",
    "東京は日本の首都です。",
    "مَرْحَبًا بِالعالَم",
    "नमस्ते दुनिया",
    "👩\u200d💻🙂 👍🏽",
    "🙂",
    "zero\u200bwidth\u200b",
    "\u200bahead",
    "soft\u00adhyphen \u00a0 hard blank",
    "İstanbul ǅ ﬁne",
    "7",
    "x = [1,\n\t2]\r\n",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<sep>"]
CHAT = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
STRIPPED = [normalizers.NFD(), normalizers.StripAccents()]
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "stripped": normalizers.Sequence(STRIPPED),
    "lowercase": normalizers.Lowercase(),
    "bert": normalizers.BertNormalizer(),
}
BYTES = pre_tokenizers.ByteLevel.alphabet()
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(backend: Tokenizer, trainer) -> Tokenizer:
    words = [text for text in TEXTS for _ in range(3)] + ["### Answer:\n", "user\nassistant: \n\n"]
    backend.train_from_iterator(words, trainer)
    return backend


def bpe_trainer(alphabet: list[str], **options):
    return trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
        **options,
    )


def wordpiece(normalizer: str) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    if NORMALIZERS[normalizer]:
        backend.normalizer = NORMALIZERS[normalizer]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    return trained(backend, trainer)


def byte_level(prefix: bool, trim: bool | None, normalizer: str = "none") -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if NORMALIZERS[normalizer]:
        backend.normalizer = NORMALIZERS[normalizer]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    trained(backend, bpe_trainer(BYTES))
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    return backend


def llama_3() -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return trained(backend, bpe_trainer(BYTES))


FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def unigram(scheme: str) -> Tokenizer:
    """As sentencepiece: ▁ for blanks, bytes for what is not in the vocabulary."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=[*SPECIAL, *FALLBACK],
        unk_token="<unk>",
        show_progress=False,
        max_piece_length=6,
    )
    state = json.loads(trained(backend, trainer).to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def llama_2() -> Tokenizer:
    """BPE with byte fallback over the whole text; a normalizer writes the ▁."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = bpe_trainer([])
    trainer.special_tokens = [*trainer.special_tokens, *FALLBACK]
    trainer.limit_alphabet = 60
    state = json.loads(trained(backend, trainer).to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    state["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(state))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    **{f"wordpiece-{name}": lambda name=name: wordpiece(name) for name in NORMALIZERS},
    **{
        f"bytes-prefix_{prefix}-trim_{trim}": lambda p=prefix, t=trim: byte_level(p, t)
        for prefix, trim in itertools.product((False, True), (None, False, True))
    },
    "bytes-NFC": lambda: byte_level(False, True, "NFC"),
    "llama-3": llama_3,
    **{f"unigram-{s}": lambda s=s: unigram(s) for s in ("first", "always", "never")},
    "llama-2": llama_2,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def named_tokenizer(request) -> tuple[str, PreTrainedTokenizerFast]:
    backend = TOKENIZERS[request.param]()
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "<sep>")]
    pair = processors.TemplateProcessing(
        single="<s> $A <sep>", pair="<s> $A <sep> $B:1 <sep>:1", special_tokens=special
    )
    trimming = [backend.post_processor] if backend.post_processor else []
    backend.post_processor = processors.Sequence([*trimming, pair])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="<sep>",
    )
    made.add_tokens(CHAT, special_tokens=True)
    return request.param, made


def same(name: str, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], str]:
    """What is left of a text behind such a tokenizer: WordPiece loses blanks, some normalize."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if name == "llama-2":
        return lambda text: text
    if not name.startswith("wordpiece"):
        return lambda text: normalizer.normalize_str(text) if normalizer else text

    def bare(text: str) -> str:
        for special in (*SPECIAL, *CHAT):
            text = text.replace(special, "")
        text = normalizer.normalize_str(text) if normalizer else text
        return "".join(text.split())

    return bare


# a turn's end in the mark or behind it, a heading in it, blanks and nothing at all before an answer
TURN = (
    "{%% if m.role != 'assistant' %%}{{ m.role + ': ' + m.content + '\\n' }}{%% else %%}%s"
    "{%% endif %%}"
)
OWN = {
    "end behind": "{{ 'A: ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}",
    "end and line": (
        "{{ 'A:\\n' }}{% generation %}{{ m.content + eos_token + '\\n' }}{% endgeneration %}"
    ),
    "blank before end": (
        "{{ 'A:\\n\\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ ' ' + eos_token }}"
    ),
    "heading in it": "{% generation %}{{ 'A: ' + m.content + eos_token }}{% endgeneration %}",
    "nothing before": "{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
}
HEADINGS = {"end behind": "A: ", "end and line": "A:\n", "blank before end": "A:\n\n"} | {
    "heading in it": "A: ",
    "nothing before": "",
}


def own_template(name: str) -> str:
    turns = "{% for m in messages %}" + TURN % OWN[name] + "{% endfor %}"
    heading = HEADINGS[name].replace("\n", "\\n")
    return turns + "{% if add_generation_prompt %}{{ '" + heading + "' }}{% endif %}"


def runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """From and to of the tokens that are learnt, piece by piece."""
    held = np.concatenate([[0, 0], labels[:-1] != IGNORE_INDEX, [0]]).astype(int)
    edges = np.flatnonzero(np.diff(held))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain", *OWN])
def test_what_is_learnt_is_what_was_said_behind_what_a_client_gives(
    named_tokenizer, tmp_path, template
):
    name, tokenizer = named_tokenizer
    settings = ConversationArguments(chat_template=template)
    if template in OWN:
        settings.chat_template = str(tmp_path / "own.jinja")
        (tmp_path / "own.jinja").write_text(own_template(template))
    settings.sequence_length = 10_000
    set_chat_template(tokenizer, settings)
    draw = random.Random(0)
    rows = []
    for number, first in enumerate(TEXTS):
        turns = []
        for answer in (first, *draw.sample(TEXTS, 2)):
            turns += [
                {"role": "user", "content": draw.choice(TEXTS)},
                {"role": "assistant", "content": answer},
            ]
        rows.append(TableRow({"messages": turns}, "rows", "line", number))
    rest = same(name, tokenizer)
    stops = turn_ends(tokenizer)
    examples, _ = to_examples(rows, tokenizer, settings)
    for example in examples:
        ids, turns = example["input_ids"].tolist(), example["messages"]
        found = runs(example["shift_labels"])
        assert len(found) == 3
        before, is_joined = 0, False
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        for number, (begin, end) in enumerate(found):
            answer = turns[2 * number + 1]["content"]
            assert ids[end - 1] in stops
            said = rest(tokenizer.decode(ids[:end]))
            blank = " " if template == "blank before end" else ""
            expected = tokenizer.decode(ids[:begin]) + rest(answer) + blank
            assert said == rest(expected + tokenizer.decode(ids[end - 1 : end])), answer
            prompt = tokenizer.apply_chat_template(
                turns[: 2 * number + 1], add_generation_prompt=True
            )["input_ids"]
            # earlier answers may have been cut where they began to be generated
            assert prompt[-(begin - before) :] == ids[before:begin], answer
            is_joined |= whole[: len(prompt)] != prompt
            before = end
        assert (ids == whole) is not is_joined


# answers


def run_qa(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token as examples/pytorch/question-answering/run_qa.py finds them.

    None where its rule fails: the answer is not held, or these are not the tokens of its first and
    its last character, or not all of them.
    """
    first, last = 0, len(offsets) - 1
    if not (offsets[first][0] <= start and offsets[last][1] >= end):
        return None
    while first < len(offsets) and offsets[first][0] <= start:
        first += 1
    while last >= 0 and offsets[last][1] >= end:
        last -= 1
    first, last = first - 1, last + 1
    if last == len(offsets):
        return None
    before, behind = [(0, 0), *offsets][first], [*offsets, (end, end)][last + 1]
    begins = offsets[first][0] <= start < offsets[first][1] and before[1] <= start
    ends = offsets[last][0] < end <= offsets[last][1] and end <= behind[0]
    return (first, last) if begins and ends else None


def questions_about(texts: list[str], count: int) -> list[Question]:
    draw, questions = random.Random(1), []
    for number in range(count):
        words = " ".join(draw.choices(texts, k=6)).split()
        context = "".join(word + draw.choice([" ", "  ", "\n"]) for word in words)
        first = draw.randrange(len(words))
        start = 0
        for word in words[: first + 1]:
            at = context.index(word, start)
            start = at + len(word)
        end = at
        for word in words[first : first + draw.randint(1, 2)]:
            end = context.index(word, end) + len(word)
        answer = Answer(context[at:end], at)
        questions.append(Question(str(number), "Where?", context, [answer], f"row {number}"))
    return questions


def test_the_span_of_an_answer_holds_it_and_is_that_of_run_qa(named_tokenizer):
    name, tokenizer = named_tokenizer
    compared = 0
    questions = questions_about(TEXTS, 60)
    stride = 24
    windows = make_windows(questions, tokenizer, 64, stride, keep_offsets=True)
    for number, question in enumerate(questions):
        own = [window for window in windows if window["question"] == number]
        (answer,) = question.answers
        held = [window for window in own if window["start"] not in (window["cls"], IGNORE_INDEX)]
        tokens = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        assert held or len(tokens) > stride, answer
        encoded = tokenizer(
            ["Where?"],
            [question.context],
            truncation="only_second",
            max_length=64,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for row, window in enumerate(own):
            begin, end = window["context"]
            offsets = encoded["offset_mapping"][row][begin:end]
            assert encoded["input_ids"][row] == window["input_ids"].tolist()
            found = (window["start"] - begin, window["end"] - begin)
            reference = run_qa(offsets, answer.start, answer.end)
            if reference:
                compared += 1
                assert found == reference, answer
        for window in held:
            length = len(window["input_ids"])
            start, end = np.full((2, length), -9.0)
            start[window["start"]] = end[window["end"]] = 9.0
            _, ((_, *place), *_) = best_spans(window, start, end, 99, 1)
            said = question.context[slice(*place)].strip()
            assert answer.text.lstrip("\u200b") in said
            if not name.startswith(("unigram-first", "llama-2")):  # whose tokens hold blanks
                assert said.lstrip("\u200b") == answer.text.lstrip("\u200b")
    assert compared > 30
