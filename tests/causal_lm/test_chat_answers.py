"""What is learnt through templates as models ship them, which mark nothing: counted by hand."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chat_answers import UnknownAnswer, find_answers
from chat_rendering import PROBE, render_chat, turn_ends
from conftest import learnt_pieces
from conversations import ConversationArguments, set_chat_template, to_examples
from utils.config import InputError
from utils.tables import TableRow

TEMPLATES = Path(__file__).parent / "templates"
BAR = "\uff5c"  # a wide one
CHATML = ["<|im_start|>", "<|im_end|>"]
CALL_TOKENS = ["tool_calls_begin", "tool_calls_end", "tool_call_begin", "tool_call_end", "tool_sep"]
TOKENS = {
    "chatml": CHATML,
    "smollm2": CHATML,
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "phi4": [*CHATML, "<|im_sep|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "zephyr": [],
    "llama3.1": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    "mistral": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "deepseek_v3": [
        f"<{BAR}User{BAR}>",
        f"<{BAR}Assistant{BAR}>",
        *(f"<{BAR}{name}{BAR}>" for name in CALL_TOKENS),
    ],
    "deepseek_r1": [f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"],
}
EOS = "<|end_of_text|>"
ENDS = {
    **dict.fromkeys(["chatml", "smollm2", "qwen2.5", "qwen3", "phi4"], "<|im_end|>"),
    **dict.fromkeys(["zephyr", "mistral", "deepseek_v3", "deepseek_r1"], EOS),
    **dict.fromkeys(["gemma", "gemma3"], "<end_of_turn>"),
    **{"phi3": "<|end|>", "llama3.1": "<|eot_id|>"},
}
TRIMMED = ("llama3.1", "mistral", "gemma", "gemma3")
TURNS = [
    {"role": "user", "content": "Where? 🙂"},
    {"role": "assistant", "content": " 👩‍🚀 here, or\n\nthere. \n"},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Now."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
LOOK = {"name": "look", "arguments": {"at": "it", "n": 2}}
AGENT = [
    {"role": "user", "content": "Where?"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "call00001", "type": "function", "function": LOOK}],
    },
    {"role": "tool", "content": "Here: 🙂.", "tool_call_id": "call00001", "name": "look"},
    {"role": "assistant", "content": "Here."},
]
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}


def arguments(**settings) -> ConversationArguments:
    made = ConversationArguments(**settings)
    made.sequence_length = 2048
    return made


@pytest.fixture
def tokenizer(tokenizer_folder):
    """One that tokens can be added to."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def shipped(tokenizer_folder):
    """shipped(name): a tokenizer that comes with the template, and its tokens."""

    def load(name: str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.add_tokens(TOKENS[name], special_tokens=True)
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        set_chat_template(tokenizer, arguments())
        return tokenizer

    return load


def example_of(tokenizer, messages: list[dict], **columns) -> dict:
    rows = [TableRow({"messages": messages, **columns}, "rows.jsonl", "line", 7)]
    return to_examples(rows, tokenizer, arguments())[0][0]


def learnt(tokenizer, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
    """What the loss falls on, piece by piece; all is in the tokens that a client gives."""
    example = example_of(tokenizer, messages, tools=tools)
    whole = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    assert example["input_ids"].tolist() == whole
    return learnt_pieces(tokenizer, example["shift_labels"])


def refused(tokenizer, messages: list[dict], **columns) -> str:
    with pytest.raises(InputError) as error:
        example_of(tokenizer, messages, **columns)
    return str(error.value)


def as_written(name: str, content: str) -> str:
    content = content.strip() if name in TRIMMED else content
    return (" " if name == "mistral" else "") + content + ENDS[name]


@pytest.mark.parametrize("has_system", [False, True])
@pytest.mark.parametrize("name", TOKENS)
def test_the_answers_and_their_ends_are_learnt(shipped, name, has_system):
    tokenizer = shipped(name)
    if name == "gemma" and has_system:
        assert refused(tokenizer, [SYSTEM, *TURNS]) == (
            "rows.jsonl, line 7: the chat_template cannot write the conversation: System role not "
            "supported"
        )
        return
    expected = [as_written(name, turn["content"]) for turn in TURNS[1::2]]
    if name == "qwen3":
        expected[1] = "<think>\n\n</think>\n\nNow.<|im_end|>"
    assert learnt(tokenizer, [SYSTEM] * has_system + TURNS) == expected
    assert tokenizer.convert_tokens_to_ids(ENDS[name]) == turn_ends(tokenizer)[0]


CALLS = {
    **dict.fromkeys(
        ["qwen2.5", "qwen3"],
        '<tool_call>\n{"name": "look", "arguments": {"at": "it", "n": 2}}\n</tool_call><|im_end|>',
    ),
    "llama3.1": '{"name": "look", "parameters": {"at": "it", "n": 2}}<|eot_id|>',
    "mistral": (
        '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "it", "n": 2}, "id": "call00001"}]'
        + EOS
    ),
    "deepseek_v3": (
        f"<{BAR}tool_calls_begin{BAR}><{BAR}tool_call_begin{BAR}>function<{BAR}tool_sep{BAR}>look"
        '\n```json\n{"at": "it"}'
        f"\n```<{BAR}tool_call_end{BAR}><{BAR}tool_calls_end{BAR}>{EOS}"
    ),
}


@pytest.mark.parametrize("has_system", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learnt(shipped, name, has_system):
    tokenizer, turns, tools = shipped(name), AGENT, [SCHEMA]
    if name == "deepseek_v3":  # which wants text, and knows its tools from the system prompt
        look = {"name": "look", "arguments": '{"at": "it"}'}
        call = {"id": "call00001", "type": "function", "function": look}
        turns, tools = [AGENT[0], AGENT[1] | {"tool_calls": [call]}, *AGENT[2:]], None
    answer = "<think>\n\n</think>\n\nHere." if name == "qwen3" else "Here."
    expected = [CALLS[name], as_written(name, answer)]
    assert learnt(tokenizer, [SYSTEM] * has_system + turns, tools) == expected
    # what follows a finished agent's turn
    more = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]
    found = learnt(tokenizer, [SYSTEM] * has_system + turns + more, tools)
    assert found[0] == CALLS[name]
    assert len(found) == 3


@pytest.mark.parametrize("name", sorted(TOKENS.keys() - CALLS.keys()))
def test_calls_that_a_template_does_not_write_are_refused(shipped, name):
    message = refused(shipped(name), AGENT)
    assert message.startswith("rows.jsonl, line 7: the chat_template ")
    assert "does not write tool_calls" in message or "cannot write" in message


def test_thinking_is_learnt_where_it_is_written(shipped):
    thought = "<think>\nHm.\n</think>\n\n"
    turns = [turn | {"content": thought + turn["content"]} for turn in TURNS]
    turns = [turns[i] if i % 2 else TURNS[i] for i in range(4)]
    found = learnt(shipped("qwen3"), turns)
    assert found == [as_written("qwen3", " 👩‍🚀 here, or\n\nthere. \n"), f"{thought}Now.<|im_end|>"]
    found = learnt(shipped("deepseek_r1"), turns)
    assert found == [f"\n\n{turn['content']}{EOS}" for turn in TURNS[1::2]]


def test_a_prompt_that_no_answer_follows_is_told(shipped, capsys):
    shipped("deepseek_v3")
    assert capsys.readouterr().err == ""
    shipped("deepseek_r1")
    assert "something else before an answer than with add_generation_prompt" in (
        capsys.readouterr().err
    )


def test_ends_that_are_spelled_out_are_what_is_said(shipped):
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "It is <|im_end|>"
    turns[3]["content"] = "It is <|im_end|>, yes"
    for name in ("qwen2.5", "phi4"):
        expected = [f"{turn['content']}<|im_end|>" for turn in turns[1::2]]
        assert learnt(shipped(name), turns) == expected


def test_turns_without_weight_are_not_learnt(shipped):
    turns = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    for name in ("mistral", "phi3"):
        assert learnt(shipped(name), turns) == [as_written(name, "Now.")]


def test_what_a_role_says_is_written_or_refused(shipped):
    # zephyr knows no tools, and leaves out what they say
    turns = [*TURNS[:2], {"role": "tool", "content": "It."}, TURNS[3]]
    assert refused(shipped("zephyr"), turns) == (
        "rows.jsonl, line 7: the chat_template does not write what 'tool' says: choose one that "
        "does, or take it out of the data"
    )


MARK = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_without_its_marks_a_template_marks_the_same(tokenizer, name):
    tokenizer.add_tokens([*CHATML, *TOKENS["llama3.1"]], special_tokens=True)
    blanks = [TURNS[0], {"role": "assistant", "content": "\n\n 👩‍🚀<|im_end|> \n"}]
    long = [SYSTEM, *TURNS * 3, *blanks]
    set_chat_template(tokenizer, arguments(chat_template=name))
    marked = [example_of(tokenizer, turns) for turns in (TURNS, blanks, long)]
    tokenizer.chat_template, count = MARK.subn("", tokenizer.chat_template)
    assert count == 2
    for example, turns in zip(marked, (TURNS, blanks, long), strict=True):
        found = example_of(tokenizer, turns)
        for key in ("input_ids", "shift_labels"):
            assert found[key].tolist() == example[key].tolist()


def test_an_unknown_word_is_no_end(wordpiece_folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(wordpiece_folder)
    tokenizer.add_tokens(CHATML, special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    for turn in PROBE:
        monkeypatch.setitem(turn, "content", "☃")
    assert tokenizer.unk_token_id in tokenizer("☃")["input_ids"]
    assert turn_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


# templates by name


@pytest.fixture
def of_several(tokenizer_folder, tmp_path):
    """of_several(default=name, …): a tokenizer with templates of these names, as it is read."""

    def load(**names):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.add_tokens([*CHATML, *TOKENS["llama3.1"]], special_tokens=True)
        texts = {key: (TEMPLATES / f"{name}.jinja").read_text() for key, name in names.items()}
        tokenizer.chat_template = texts
        tokenizer.save_pretrained(tmp_path / "-".join(names))
        return AutoTokenizer.from_pretrained(tmp_path / "-".join(names))

    return load


def test_the_template_for_tools_writes_what_has_tools(of_several):
    tokenizer = of_several(default="chatml", tool_use="llama3.1")
    set_chat_template(tokenizer, arguments())
    assert learnt(tokenizer, TURNS)[1] == "Now.<|im_end|>"
    assert learnt(tokenizer, AGENT, [SCHEMA]) == [CALLS["llama3.1"], "Here.<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == [
        "<|im_end|>",
        "<|eot_id|>",
        EOS,
    ]


def test_a_template_of_the_tokenizer_is_chosen_by_its_name(of_several, tmp_path):
    tokenizer = of_several(default="chatml", tool_use="llama3.1")
    set_chat_template(tokenizer, arguments(chat_template="tool_use"))
    assert learnt(tokenizer, TURNS)[1] == "Now.<|eot_id|>"
    tokenizer.save_pretrained(tmp_path / "exported")
    read = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert read.chat_template == (TEMPLATES / "llama3.1.jinja").read_text()
    tokenizer = of_several(rag="chatml", tool_use="qwen2.5")
    message = "none of the name default: give one of rag, tool_use, chatml, llama3, plain, or a j"
    with pytest.raises(InputError, match=message):
        set_chat_template(tokenizer, arguments())
    with pytest.raises(InputError, match="there is no rog; there are rag, tool_use, chatml, llam"):
        set_chat_template(tokenizer, arguments(chat_template="rog"))


@pytest.mark.parametrize("name", ["phi3", "zephyr"])
def test_tokens_that_a_given_template_puts_together_are_looked_for(tokenizer, name):
    settings = {"chat_template": str(TEMPLATES / f"{name}.jinja")}
    names = ["<|assistant|>", "<|system|>", "<|user|>"]
    names = sorted([*names, "<|end|>"]) if name == "phi3" else names
    with pytest.raises(InputError) as error:
        set_chat_template(tokenizer, arguments(**settings))
    assert str(error.value).endswith(f"or set add_tokens: [{', '.join(names)}]")
    assert set_chat_template(tokenizer, arguments(**settings, add_tokens=names)) == names
    assert learnt(tokenizer, TURNS) == [as_written(name, turn["content"]) for turn in TURNS[1::2]]
    assert set_chat_template(tokenizer, arguments(**settings, add_tokens=names)) == []


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1"])
def test_arguments_in_text_are_written_as_json_or_refused(shipped, name):
    function = {"name": "look", "arguments": json.dumps(LOOK["arguments"])}
    call = {"id": "call00001", "type": "function", "function": function}
    turns = [AGENT[0], AGENT[1] | {"tool_calls": [call]}, *AGENT[2:]]
    if name == "qwen3":  # which writes them as they stand
        assert learnt(shipped(name), turns)[0] == CALLS[name]
    else:
        assert refused(shipped(name), turns) == (
            "rows.jsonl, line 7: the chat_template writes the arguments of a call as a text in "
            "quotes, not as JSON: give a mapping, not text"
        )


def test_what_is_said_beside_a_call_is_written_or_refused(shipped):
    turns = [AGENT[0], AGENT[1] | {"content": "I look."}, *AGENT[2:]]
    call = CALLS["qwen2.5"]
    assert learnt(shipped("qwen2.5"), turns, [SCHEMA])[0] == f"I look.\n{call}"
    # blanks say nothing
    turns_of_blanks = [AGENT[0], AGENT[1] | {"content": "\n"}, *AGENT[2:]]
    assert learnt(shipped("llama3.1"), turns_of_blanks, [SCHEMA])[0] == CALLS["llama3.1"]
    assert "does not write what 'assistant' says beside a call: choose" in (
        refused(shipped("llama3.1"), turns, tools=[SCHEMA])
    )


def test_a_name_in_the_text_of_the_own_template_is_another_s(tokenizer):
    tokenizer.chat_template = "{# no chatml #}{{ messages[0].content }}"
    with pytest.raises(
        InputError, match=r"writes <\|im_end\|>, which is no token of the tokenizer"
    ):
        set_chat_template(tokenizer, arguments(chat_template="chatml"))


# templates in which it cannot be told


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("{{ '<|im_start|>' + m.role }}", "turn 2: the chat_template does not write what it says"),
        (
            "{{ m.content + '<|im_end|>' }}"
            "{% if loop.index == 4 %}{{ messages[1].content }}{% endif %}",
            "turn 4: the chat_template does not write it in one place",
        ),
        (
            "{% if loop.first %}{{ messages[-1].content }}{% endif %}"
            "{{ m.content + '<|im_end|>' }}",
            "turn 4: the chat_template does not write it in one place",
        ),
    ],
)
def test_an_answer_that_cannot_be_told_is_refused(tokenizer, turn, message):
    tokenizer.add_tokens(CHATML, special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    with pytest.raises(InputError) as error:
        set_chat_template(tokenizer, arguments())
    assert message in str(error.value)


def test_a_user_s_end_is_none_of_the_assistant_s(tokenizer):
    """Users' turns end with a token, the assistant's do not."""
    tokenizer.add_tokens(CHATML, special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ '\n' if m.role == 'assistant' and not loop.last else '<|im_end|>' }}{% endfor %}"
    )
    assert refused(tokenizer, TURNS).startswith(
        "rows.jsonl, line 7: the chat_template writes no token after turn 2 at which generation"
    )


WITH_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson + '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (WITH_CALLS, "the chat_template writes no token after turn 2 at which generation stops"),
        (
            WITH_CALLS.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
            "turn 2: where its call begins cannot be told: with add_generation_prompt the chat_",
        ),
    ],
)
def test_a_call_that_cannot_be_told_is_refused(tokenizer, template, message):
    tokenizer.add_tokens(CHATML, special_tokens=True)
    tokenizer.chat_template = template
    turns = [{k: v for k, v in turn.items() if k != "name"} for turn in AGENT]
    assert refused(tokenizer, turns).startswith(f"rows.jsonl, line 7: {message}")


def test_a_call_without_arguments_is_learnt(shipped):
    function = {"name": "look", "arguments": {}}
    call = {"id": "call00001", "type": "function", "function": function}
    turns = [AGENT[0], AGENT[1] | {"tool_calls": [call]}, *AGENT[2:]]
    assert learnt(shipped("qwen2.5"), turns) == [
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>',
        "Here.<|im_end|>",
    ]


def test_spans_are_characters_of_what_transformers_writes(shipped):
    tokenizer = shipped("gemma3")
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)

    def write(messages, **options):
        return render_chat(tokenizer, messages, **options).text

    spans = find_answers(write, TURNS, whole, ["<end_of_turn>"])
    assert [whole[slice(*span)] for span in spans] == [
        "👩‍🚀 here, or\n\nthere.<end_of_turn>",
        "Now.<end_of_turn>",
    ]
    with pytest.raises(UnknownAnswer, match="turn 2: the chat_template does not write what it say"):
        find_answers(lambda messages, **options: "Hi", TURNS, "Hi")
