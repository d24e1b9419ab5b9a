"""What is learnt from a conversation: all that it says, up to where generation stops."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import chat_rendering
from chat_rendering import PROBE, set_ends, turn_ends
from comparing import run_code_of_card
from conftest import learnt_pieces, write_jsonl
from conversation_rows import read_messages
from conversations import ConversationArguments, set_chat_template, to_examples
from launching import TINY_RUN, command_line, metrics
from recipes.causal_lm import finetune
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.tables import TableRow

CHAT = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Now, or\nlater."},
]
# as Hermes and Qwen have it
TOOLS = """
{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif -%}
{{- m.content or '' -}}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def row(values: dict) -> TableRow:
    return TableRow(values, "rows.jsonl", "line", 7)


def arguments(**settings) -> ConversationArguments:
    made = ConversationArguments(**settings)
    made.sequence_length = 512
    return made


@pytest.fixture(scope="module")
def chat_folder(tokenizer_folder: Path, tmp_path_factory) -> Path:
    """A tokenizer with the tokens of every shipped template; its end is that of a document."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(CHAT, special_tokens=True)
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_tokenizer(chat_folder):
    return AutoTokenizer.from_pretrained(chat_folder)


@pytest.fixture
def with_template(chat_tokenizer, tmp_path):
    """with_template(jinja): the tokenizer with such a template."""

    def given(template: str):
        (tmp_path / "own.jinja").write_text(template)
        set_chat_template(chat_tokenizer, arguments(chat_template=str(tmp_path / "own.jinja")))
        return chat_tokenizer

    return given


def learnt(tokenizer, messages: list[dict], **columns) -> list[str]:
    """What the loss falls on, piece by piece."""
    ((example,), _) = to_examples([row({"messages": messages, **columns})], tokenizer, arguments())
    return learnt_pieces(tokenizer, example["shift_labels"])


def refused(tokenizer, messages: list[dict], **columns) -> str:
    with pytest.raises(InputError) as error:
        to_examples([row({"messages": messages, **columns})], tokenizer, arguments())
    return str(error.value)


# where a turn ends

TURN = "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\n' }}%s{%% endfor %%}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def marked(answer: str, other: str = "{{ m.content + '<|im_end|>\n' }}") -> str:
    choice = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + other + "{% endif %}"
    return TURN % choice + PROMPT


MARK, UNMARK = "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    "answer",
    [
        MARK + "{{ m.content }}" + UNMARK + "{{ '<|im_end|>\n' }}",
        MARK + "{{ m.content + '<|im_end|>' }}" + UNMARK + "{{ '\n' }}",
        MARK + "{{ m.content + '<|im_end|>\n' }}" + UNMARK,
    ],
    ids=["behind the mark", "at its end", "in it"],
)
def test_a_turn_is_learnt_to_its_end_wherever_the_mark_ends(with_template, answer):
    tokenizer = with_template(marked(answer))
    assert learnt(tokenizer, TURNS) == ["Here.<|im_end|>", "Now, or\nlater.<|im_end|>"]
    names = ("<|im_end|>", "<|end_of_text|>")
    assert turn_ends(tokenizer) == tokenizer.convert_tokens_to_ids(list(names))
    assert tokenizer.eos_token == "<|end_of_text|>"


def test_an_end_of_tool_calls_is_one_too(with_template):
    end = "('<|eot_id|>' if m.tool_calls else '<|im_end|>')"
    calls = "(m.tool_calls | tojson if m.tool_calls else '')"
    tokenizer = with_template(marked(f"{MARK}{{{{ m.content + {calls} + {end} }}}}{UNMARK}"))
    stops = ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>"]
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == stops


DOUBLED = "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ENDLESS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "1 seconds",
    "{{ 9 ** (9 ** 9) }}": "1 seconds",
    "{{ 'a' * 10 ** 10 }}": "1 GiB",
    "{% set n = namespace(x='ab') %}" + DOUBLED: "1 (GiB|seconds)",
}


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_template_without_a_bound_is_refused(endless, with_template, monkeypatch):
    monkeypatch.setattr(chat_rendering, "TEMPLATE_SECONDS", 1)
    turns = marked(MARK + "{{ m.content + '<|im_end|>' }}" + UNMARK)
    with_template(turns)
    with pytest.raises(InputError, match=rf"own.jinja takes more than {ENDLESS[endless]} to write"):
        with_template(turns + endless)


def test_what_a_template_fails_with_is_told_with_the_conversation(with_template):
    turns = marked(MARK + "{{ m.content + '<|im_end|>' }}" + UNMARK)
    for fault in ("{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{{ messages[9].content }}"):
        tokenizer = with_template("{% if messages|length > 4 %}" + fault + "{% endif %}" + turns)
        place = "rows.jsonl, line 7: the chat_template cannot write the conversation: "
        with pytest.raises(InputError, match=f"^{place}"):
            learnt(tokenizer, [*PROBE, *PROBE])


def test_a_template_that_writes_no_end_is_refused(with_template):
    with pytest.raises(InputError, match="writes no token after the assistant's last turn at whic"):
        with_template(marked(MARK + "{{ m.content + '\n' }}" + UNMARK))


def test_marks_in_a_macro_stand_elsewhere(with_template):
    macro = "{% macro said(m) %}{{ 'assistant: ' }}" + MARK + "{{ m.content }}" + UNMARK
    turn = "{{ m.content if m.role == 'user' else said(m) + eos_token }}"
    with pytest.raises(InputError, match="marks something else than what the assistant says"):
        with_template(macro + "{% endmacro %}{% for m in messages %}" + turn + "{% endfor %}")


def test_a_turn_without_an_end_is_named(with_template):
    end = "{{ eos_token if loop.last else '\n' }}"
    turn = "{{ '# ' + m.role + '\n' }}" + MARK + "{{ m.content }}" + end + UNMARK
    user = "{{ '# ' + m.role + '\n' + m.content + '\n' }}"
    choice = "{% if m.role == 'assistant' %}" + turn + "{% else %}" + user + "{% endif %}"
    tokenizer = with_template("{% for m in messages %}" + choice + "{% endfor %}")
    assert learnt(tokenizer, TURNS[:2]) == ["Here.<|end_of_text|>"]
    assert refused(tokenizer, TURNS) == (
        "rows.jsonl, line 7: the chat_template writes no token after turn 2 at which generation "
        "stops: write {{ eos_token }} there"
    )


def test_a_heading_that_clients_write_is_not_learnt(with_template, capsys):
    answer = "{{ m.content + eos_token }}"
    heading = "{{ '<|im_start|>' + m.role + '\n' }}"
    everyone = heading + "{{ m.content + '<|im_end|>\n' }}"
    turn = "{% if m.role == 'assistant' %}" + MARK + heading + answer + UNMARK
    template = (
        "{% for m in messages %}" + turn + "{% else %}" + everyone + "{% endif %}{% endfor %}"
    )
    assert learnt(with_template(template + PROMPT), TURNS[:2]) == ["Here.<|end_of_text|>"]
    assert capsys.readouterr().err == ""
    with_template(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: chat_template: ")
    assert "writes something else before an answer than with add_generation_prompt" in warning


def test_what_a_given_model_stops_at_is_kept(chat_tokenizer):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    end, own, other = chat_tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|end_of_text|>", "<|eot_id|>"]
    )
    for given, expected in ((None, [end, own]), (own, [end, own]), ([other], [end, own, other])):
        settings = GenerationConfig(eos_token_id=given, pad_token_id=0, max_length=77)
        set_ends(settings, chat_tokenizer)
        assert (settings.eos_token_id, settings.pad_token_id) == (expected, 0)
        assert settings.max_length == 77
    set_chat_template(chat_tokenizer, arguments(chat_template="plain"))
    settings = GenerationConfig()
    set_ends(settings, chat_tokenizer)
    assert (settings.eos_token_id, settings.pad_token_id) == (own, chat_tokenizer.pad_token_id)


MODEL = TINY_RUN["model"] | {"max_position_embeddings": 256}


@pytest.fixture
def instruct(call, chat_folder, tmp_path):
    """instruct(**settings): the recipe, on four questions and with chatml."""
    words = ("ka", "to", "mi", "ren")
    rows = [{"prompt": f"{word}?", "completion": word.upper()} for word in words]
    table = [{"path": write_jsonl(tmp_path / "words.jsonl", rows)}]
    given = {
        "output_dir": tmp_path / "run",
        "train_data": table,
        "validation_data": table,
        "chat_template": "chatml",
        "sequence_length": 256,
        "global_batch_size": 4,
        "learning_rate": 1e-2,
        "sample_answers": 2,
        "report_to": [],
    }

    def start(**settings) -> Path:
        ended = call(finetune.main, command_line(given | settings), tmp_path / "run")
        assert ended.status == 0, ended.error
        return ended.folder

    return start


def test_it_learns_and_the_export_stops_where_a_turn_ends(instruct, chat_folder):
    run = instruct(tokenizer=str(chat_folder), model=MODEL, max_steps=60, save_steps=60)
    samples = next(r["samples"] for r in reversed(metrics(run)) if "samples" in r)
    assert samples == [
        {"prompt": "ka?", "text": "\n\nKA"},
        {"prompt": "to?", "text": "\n\nTO"},
    ]
    exported = str(run / "model")
    tokenizer, given = (AutoTokenizer.from_pretrained(f) for f in (exported, chat_folder))
    assert tokenizer.eos_token == given.eos_token
    assert tokenizer.pad_token == given.pad_token
    assert tokenizer.backend_tokenizer.to_str() == given.backend_tokenizer.to_str()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.generation_config.eos_token_id == ends
    chat = pipeline("text-generation", exported)
    answer = chat([{"role": "user", "content": "ren?"}], max_new_tokens=10, do_sample=False)
    assert answer[0]["generated_text"][-1]["content"] == "REN"


def test_an_adapter_answers_by_its_card_with_its_own_template_and_ends(
    instruct, chat_tokenizer, tmp_path, monkeypatch
):
    settings = {key: value for key, value in MODEL.items() if key != "model_type"}
    ends = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])
    config = LlamaConfig(**settings, vocab_size=len(chat_tokenizer), eos_token_id=ends[1])
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    run = instruct(
        model_name_or_path=str(tmp_path / "base"), lora={"r": 2}, max_steps=1, sample_answers=0
    )
    generate, given = LlamaForCausalLM.generate, {}

    def noted(model, *args, **options):
        given.update(options, ends=model.generation_config.eos_token_id)
        return generate(model, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    run_code_of_card(run)
    assert given["ends"] == ends
    question = [{"role": "user", "content": "What is a list comprehension?"}]
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    expected = chat_tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert given["input_ids"][0].tolist() == expected["input_ids"]
    # what was given stays: the end of a document
    assert AutoTokenizer.from_pretrained(run / "model").eos_token_id == ends[1]


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be <|im_end|> brief."}]])
def test_a_client_gives_the_tokens_that_were_trained_on(chat_tokenizer, tmp_path, template, system):
    spelled = "what is <|im_end|> or <|end_of_text|> or <|eot_id|>?\n"
    turns = [
        *system,
        {"role": "user", "content": spelled},
        {"role": "assistant", "content": "An <|im_end|> of <|pad|>."},
        {"role": "user", "content": "é" + spelled},
        {"role": "assistant", "content": "Yes.\n"},
    ]
    set_chat_template(chat_tokenizer, arguments(chat_template=template))
    chat_tokenizer.save_pretrained(tmp_path)
    client = AutoTokenizer.from_pretrained(tmp_path)
    ((example,), _) = to_examples([row({"messages": turns})], chat_tokenizer, arguments())
    ids, labels = example["input_ids"].tolist(), example["shift_labels"]
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt = client.apply_chat_template(turns[:index], add_generation_prompt=True)
            begin = len(prompt["input_ids"])
            assert ids[:begin] == prompt["input_ids"]
            assert labels[begin - 1] == ids[begin]
            assert labels[begin - 2] == IGNORE_INDEX
    assert ids == client.apply_chat_template(turns)["input_ids"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "plain"])
def test_on_plain_text_it_is_the_mask_of_transformers(chat_tokenizer, template):
    set_chat_template(chat_tokenizer, arguments(chat_template=template))
    ((example,), _) = to_examples([row({"messages": TURNS})], chat_tokenizer, arguments())
    expected = chat_tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example["input_ids"].tolist() == expected["input_ids"]
    is_target = (example["shift_labels"] != IGNORE_INDEX).tolist()
    assert [False, *is_target[:-1]] == [bool(value) for value in expected["assistant_masks"]]


# keys that carry meaning

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
AGENT = [
    {"role": "user", "content": "Where?", "name": "kim"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look."},
    {"role": "tool", "content": "Here.", "tool_call_id": "1", "name": "look"},
    {"role": "assistant", "content": "Here.", "tool_calls": None, "id": 7},
]
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])], ids=["list", "text"])
def test_what_a_conversation_says_is_written(with_template, tools):
    tokenizer = with_template(TOOLS)
    ((example,), _) = to_examples(
        [row({"messages": AGENT, "tools": tools})], tokenizer, arguments()
    )
    plain = [{k: v for k, v in turn.items() if v is not None} for turn in AGENT]
    assert example["messages"] == plain
    expected = tokenizer.apply_chat_template(plain, tools=[SCHEMA])["input_ids"]
    assert example["input_ids"].tolist() == expected
    said = tokenizer.decode(expected)
    for part in ("parameters", "user kim\n", "tool look\n", '"at": "it"'):
        assert part in said
    assert learnt(tokenizer, AGENT, tools=tools) == [
        '<think>Look.</think>{"name": "look", "arguments": {"at": "it"}}<|im_end|>',
        "Here.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("tools", "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson"),
        ("name", " + (' ' + m.name if m.name else '')"),
        ("reasoning_content", "{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content"),
        ("tool_calls", "{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}"),
    ],
)
def test_what_a_template_leaves_out_is_refused(with_template, key, written):
    assert written in TOOLS
    tokenizer = with_template(TOOLS.replace(written, written.replace(key, "other")))
    message = (
        f"rows.jsonl, line 7: the chat_template does not write {key}: choose one that does, or "
        "take it out of the data"
    )
    assert refused(tokenizer, AGENT, tools=[SCHEMA]) == message
    set_chat_template(tokenizer, arguments(chat_template="chatml"))
    turns = [dict(turn) for turn in TURNS]
    if key == "tools":
        assert refused(tokenizer, TURNS, tools=[SCHEMA]) == message
    else:
        turns[1] |= {key: AGENT[1].get(key, "kim")}
        assert refused(tokenizer, turns) == message
        turns[1] |= {"content": None} if key == "tool_calls" else {}
        assert "does not write tool_calls" in refused(tokenizer, turns) or key != "tool_calls"


def test_what_says_nothing_is_let_go(chat_tokenizer):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    turns = [turn | {"id": 3, "tool_calls": [], "name": "", "date": "today"} for turn in TURNS]
    expected = learnt(chat_tokenizer, TURNS)
    for tools in (None, [], "", "[]"):
        assert learnt(chat_tokenizer, turns, tools=tools) == expected
    message = "tools must be a list of JSON schemas, not"
    for tools in ("look", {"name": "look"}, ["look"]):
        assert message in refused(chat_tokenizer, TURNS, tools=tools)


# weights


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"weight": 0}, {"weight": 1}, [1]),
        ({"weight": 1.0}, {"weight": 0.0}, [0]),
        ({"train": False}, {"train": True}, [1]),
        ({"train": None}, {"weight": None}, [0, 1]),
        ({"training": True}, {"loss": False}, [0]),
    ],
)
def test_turns_without_weight_are_read_and_not_learnt(chat_tokenizer, first, second, expected):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    said = ["Here.<|im_end|>", "Now, or\nlater.<|im_end|>"]
    turns = [TURNS[0], TURNS[1] | first, TURNS[2] | {"weight": 0, "train": False}]
    turns.append(TURNS[3] | second)
    assert learnt(chat_tokenizer, turns) == [said[number] for number in expected]
    whole = chat_tokenizer.apply_chat_template(TURNS)["input_ids"]
    ((example,), _) = to_examples([row({"messages": turns})], chat_tokenizer, arguments())
    assert example["input_ids"].tolist() == whole


@pytest.mark.parametrize(
    ("turn", "flags", "message"),
    [
        (2, {"weight": 0.5}, "turn 2: weight must be 0 or 1, not 0.5"),
        (2, {"train": "no"}, "turn 2: train must be 0 or 1, not 'no'"),
        (2, {"weight": float("nan")}, "turn 2: weight must be 0 or 1, not nan"),
        (1, {"train": True}, "turn 1: train: nothing is learnt from 'user'"),
        (2, {"weight": 0}, "every turn of the assistant has weight 0: nothing to learn from it"),
    ],
)
def test_weights_that_are_refused(chat_tokenizer, turn, flags, message):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    turns = [dict(turn) for turn in TURNS[:2]]
    turns[turn - 1] |= flags
    assert refused(chat_tokenizer, turns) == f"rows.jsonl, line 7: {message}"


def test_a_weight_needs_a_mark_of_its_own(with_template):
    twice = MARK + "{{ 'A' }}" + UNMARK + MARK + "{{ m.content + eos_token }}" + UNMARK
    tokenizer = with_template(marked(twice))
    assert learnt(tokenizer, TURNS[:2]) == ["AHere.<|end_of_text|>"]
    turns = [*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert "marks 4 parts of the 2 turns of the assistant" in refused(tokenizer, turns)


# rows


@pytest.mark.parametrize("value", [0, 3, False, [], ["a"], {}, float("nan")])
def test_an_input_that_is_no_text_is_refused(value):
    values = {"instruction": "Add.", "input": value, "output": "3"}
    with pytest.raises(InputError) as error:
        read_messages(row(values), arguments())
    assert str(error.value) == f"rows.jsonl, line 7: input must be text, not {value!r}"


@pytest.mark.parametrize("role", [["user"], {"user": 1}, None, 3])
def test_a_role_that_is_no_text_is_refused(role):
    with pytest.raises(InputError, match="line 7: turn 1: unknown role"):
        read_messages(row({"messages": [{"role": role, "content": "x"}]}), arguments())


@pytest.mark.parametrize("value", ["", None])
def test_an_input_may_be_missing(value):
    values = {"instruction": "Add.", "input": value, "output": "3"}
    assert [m["content"] for m in read_messages(row(values), arguments())] == ["Add.", "3"]


def test_system_and_history_come_before_what_is_asked():
    values = {"instruction": "When?", "output": "Now.", "system": "Be brief."}
    expected = ["Be brief.", "Where?", "Here.", "When?", "Now."]
    for pairs in ([["Where?", "Here."]], '[["Where?", "Here."]]'):
        found = read_messages(row(values | {"history": pairs}), arguments())
        assert [m["content"] for m in found] == expected
        assert [m["role"] for m in found] == ["system", *("user", "assistant") * 2]
    for pairs in (None, [], "", "[]"):
        found = read_messages(row(values | {"history": pairs}), arguments())
        assert [m["content"] for m in found] == ["Be brief.", "When?", "Now."]
    for values in ({"prompt": "Where?", "completion": "Here."}, {"messages": TURNS[:2]}):
        for system in (None, " ", 3):
            assert read_messages(row(values | {"system": system}), arguments()) == TURNS[:2]
        found = read_messages(row(values | {"system": "Be brief."}), arguments())
        assert found == [{"role": "system", "content": "Be brief."}, *TURNS[:2]]
        assert read_messages(row({"messages": found, "system": "Be long."}), arguments()) == found
    values = {"instruction": "x", "output": "y", "history": "yes"}
    with pytest.raises(InputError, match=r"history must be \[\[question, answer\], …\], not 'yes'"):
        read_messages(row(values), arguments())


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Where?", "name": "kim"},
    {"from": "gpt", "value": "Here.", "weight": 0},
    {"from": "human", "value": "When?"},
    {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "it"}}'},
    {"from": "observation", "value": "Now."},
    {"from": "gpt", "value": "Now."},
]


def test_rows_of_sharegpt_are_read_by_the_names_of_openai():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?", "name": "kim"},
        {"role": "assistant", "content": "Here.", "weight": 0},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "Now."},
        {"role": "assistant", "content": "Now."},
    ]
    assert read_messages(row({"id": 1, "conversations": SHAREGPT}), arguments()) == expected
    # in a cell of a csv file; with the system prompt in a column of its own
    text = json.dumps(SHAREGPT[1:])
    values = {"conversations": text, "system": "Be brief."}
    assert read_messages(row(values), arguments()) == expected
    for messages in ([{"from": "bot", "value": "x"}], [{"from": "function_call", "value": "look"}]):
        with pytest.raises(
            InputError, match=f"line 7: turn 1: unknown role '{messages[0]['from']}'"
        ):
            read_messages(row({"conversations": messages}), arguments())
    with pytest.raises(InputError, match="turn 1: the content of 'user' is empty, or not text"):
        read_messages(row({"conversations": [{"from": "human"}]}), arguments())


def test_a_developer_gives_the_system_prompt():
    turns = [{"role": "developer", "content": "Be brief."}, *TURNS]
    expected = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert read_messages(row({"messages": turns, "system": "Be long."}), arguments()) == expected


def test_parts_of_a_content_are_joined_if_they_are_text():
    parts = [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]
    turns = [{"role": "user", "content": parts}, *TURNS[1:]]
    assert read_messages(row({"messages": turns}), arguments()) == TURNS
    for part, shown in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "'text'"),
        ("Where?", "'Where?'"),
    ):
        turns[0] = {"role": "user", "content": [*parts, part]}
        with pytest.raises(InputError) as error:
            read_messages(row({"messages": turns}), arguments())
        assert str(error.value) == (
            f"rows.jsonl, line 7: turn 1: a part of the content is {shown}: text alone is learnt "
            "from"
        )
    turns[0] = {"role": "user", "content": []}
    with pytest.raises(InputError, match="turn 1: the content of 'user' is empty"):
        read_messages(row({"messages": turns}), arguments())


def test_the_turns_of_a_prompt_are_not_learnt(chat_tokenizer):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    values = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    turns = read_messages(row(values), arguments())
    assert turns == [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert learnt(chat_tokenizer, turns) == ["Now, or\nlater.<|im_end|>"]
    with pytest.raises(InputError, match="prompt must be text, not"):
        read_messages(row({"prompt": TURNS[:3], "completion": "Now."}), arguments())


def test_half_of_a_character_is_refused(chat_tokenizer):
    set_chat_template(chat_tokenizer, arguments(chat_template="chatml"))
    turns = [TURNS[0], TURNS[1] | {"content": json.loads('"so \\ud83d"')}]
    assert refused(chat_tokenizer, turns).startswith(
        "rows.jsonl, line 7: messages is not Unicode: "
    )


def test_columns_inside_of_columns():
    values = {"chat": {"turns": TURNS, "tools": [], "rules": "Be brief."}, "a.b": None}
    columns = {"messages_column": "chat.turns", "system_column": "chat.rules"}
    assert read_messages(row(values), arguments(**columns))[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    with pytest.raises(InputError, match=r"none of the columns 'chat.none', .* there are: chat, a"):
        read_messages(row(values), arguments(messages_column="chat.none"))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"^tokenizer: Slow does not tell which characters"):
        set_chat_template(Slow(), arguments())
