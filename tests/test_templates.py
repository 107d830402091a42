"""Prompts of chat templates as reasoning models have them; what is scored is what the model wrote."""

import datetime
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pytest
from conftest import SMALL, Command
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.model.load import load, load_tokenizer
from grpo_cli.core.model.modelfile import modelfile
from grpo_cli.core.model.policy import Policy
from grpo_cli.core.model.templates import encode, rendered
from grpo_cli.core.rl.warm_start import Lesson, _sequences
from grpo_cli.core.rollout.selfcheck import load_checked
from grpo_cli.core.run.export import limit_completions
from grpo_cli.core.task.prompts import Style, prompt
from grpo_cli.core.task.puzzle import Puzzle
from grpo_cli.core.task.scoring import score
from grpo_cli.core.task.task import Message

PUZZLE = Puzzle((3, 5, 2), 13)
ANSWER = "<think>\n5 * 2 + 3 = 13\n</think>\n<answer>5 * 2 + 3</answer>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
STRIPPED = """{%- if message.role == 'assistant' and '</think>' in message.content %}
{{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"""
REJECTED = "{%- if message.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + TURN


def with_template(folder: Path, *, turn: str = TURN, start: str = "", end: str = "") -> Path:
    """The folder with another chat template: what stands before all, each turn, and after the assistant's header."""
    body = "{%- for message in messages %}" + turn + "{%- endfor %}"
    (folder / "chat_template.jinja").write_text(f"{start}{body}{{{{ '<|im_start|>assistant\\n{end}' }}}}")
    return folder


def with_special_tags(folder: Path) -> Path:
    """The folder with a tokenizer whose tags are special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    tokenizer.save_pretrained(folder)
    return folder


def policy_of(folder: Path) -> Policy:
    return load(str(folder), device="cpu", precision="float32")


def completion(policy: Policy, text: str) -> list[int]:
    return [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.end_ids[0]]


def test_special_tokens_that_the_model_wrote_are_scored(folder: Path) -> None:
    policy = policy_of(with_special_tags(folder))
    tokens = completion(policy, ANSWER)
    assert set(policy.tokenizer.all_special_ids) & set(tokens[:-1])
    assert policy.decode(tokens) == ANSWER
    assert score(policy.decode(tokens), PUZZLE).reward == 1.0


def test_only_end_tokens_are_left_out_of_the_text(tiny_policy: Policy) -> None:
    text = "<answer>5 * 2<|im_start|> + 3</answer>"
    assert tiny_policy.decode(completion(tiny_policy, text)) == text
    assert score(text, PUZZLE).reason == "not_an_expression"


@pytest.mark.parametrize("special", [True, False])
def test_prompt_and_warm_start_tokenize_tags_alike(special: bool, folder: Path) -> None:
    """A template that names added tokens makes control tokens of them."""
    with_template(with_special_tags(folder) if special else folder, start=f"{{% set tags = '{''.join(TAGS)}' %}}")
    policy = policy_of(folder)
    sequences = _sequences(policy, [Lesson(PUZZLE, prompt(PUZZLE), ANSWER)])
    for tag in policy.tokenizer.convert_tokens_to_ids(TAGS):
        assert sequences.prompts[0].count(tag) == 3  # the example and two instructions
        assert sequences.completions[0].count(tag) == 1


@pytest.mark.parametrize(
    ("end", "opening"),
    [
        ("<think>\\n", "<think>\n"),  # DeepSeek-R1, Qwen3.5
        ("<think>", "<think>"),
        ("<think>\\nOkay,", "<think>\nOkay,"),
        ("<think>\\n\\n</think>\\n\\n", ""),  # Qwen3 without thinking
        ("<think>\\n\\n</think>\\n\\n<answer>", "<answer>"),
        ("", ""),
    ],
)
def test_a_tag_that_the_prompt_opens_counts_for_the_completion(end: str, opening: str, folder: Path) -> None:
    policy = policy_of(with_template(folder, end=end))
    assert policy.opening == opening
    if opening.startswith("<think>"):
        rest = "5 * 2 + 3 = 13\n</think>\n<answer>5 * 2 + 4</answer>"
        scored = score(policy.decode(completion(policy, rest)), PUZZLE)
        assert (scored.reward, scored.well_formed, scored.cheat) == (0.2, True, None)


@pytest.mark.parametrize(
    ("end", "prefix"), [("<think>\\n", ""), ("<think>", ""), ("<think>\\nOkay,", "<think>\nOkay,")]
)
def test_a_warm_start_does_not_open_a_tag_again(end: str, prefix: str, folder: Path) -> None:
    policy = policy_of(with_template(folder, end=end))
    sequences = _sequences(policy, [Lesson(PUZZLE, prompt(PUZZLE, "zero-shot"), ANSWER)])
    text = policy.tokenizer.decode(sequences.prompts[0] + sequences.completions[0])
    turn = text.rpartition("<|im_start|>assistant\n")[2]
    expected = prefix + ANSWER.removeprefix("<think>" if prefix else "")
    assert turn == f"{expected}<|im_end|>"
    assert policy.decode(sequences.completions[0]) == expected


@pytest.mark.parametrize("turn", [STRIPPED, REJECTED])
def test_an_example_that_the_template_strips_goes_into_the_users_turn(turn: str, folder: Path) -> None:
    policy = policy_of(with_template(folder, turn=turn))
    text = policy.tokenizer.decode(policy.encode(prompt(PUZZLE)))
    assert "5 * 2 + 3 = 10 + 3 = 13, need 13. Yes!\n</think>\n<answer>5 * 2 + 3</answer>\n\nUsing the" in text
    assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant") == 1
    notes: list[str] = []
    load_checked(str(folder), name="model", device="cpu", precision="float32", note=notes.append)
    assert any("worked examples go into the user's turn" in note for note in notes)


def test_turns_that_a_template_keeps_are_left_alone(folder: Path, tiny_policy: Policy) -> None:
    assert tiny_policy.tokenizer.decode(tiny_policy.encode(prompt(PUZZLE))).count("<|im_start|>user") == 2
    notes: list[str] = []
    load_checked(str(folder), name="model", device="cpu", precision="float32", note=notes.append)
    assert not any("user's turn" in note for note in notes)


def test_a_template_that_changes_a_question_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(
        str(with_template(folder, turn=TURN.replace("message['content']", "message['content'][:30]")))
    )
    with pytest.raises(CountdownError, match="the chat template changes the text of a prompt"):
        encode(tokenizer, prompt(PUZZLE))


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the clock of templates show a day in January 2030."""

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Self:
                return cls(2030, 1, day, day, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


@pytest.mark.parametrize("form", ["%d %b %Y", "%A %H:%M:%S"])
def test_every_day_has_the_same_prompt(form: str, folder: Path, on_day: Callable[[int], None]) -> None:
    tokenizer = load_tokenizer(str(with_template(folder, start=f"{{{{ strftime_now('{form}') }}}}")))
    found = []
    for day in (1, 2):
        on_day(day)
        found.append(encode(tokenizer, prompt(PUZZLE)))
    assert found[0] == found[1]


@pytest.mark.parametrize("drawn", ["range(1000) | random", "lipsum(1)"])
def test_a_template_that_draws_at_random_writes_one_prompt(drawn: str, folder: Path) -> None:
    tokenizer, state = load_tokenizer(str(with_template(folder, start=f"{{{{ {drawn} }}}}"))), random.getstate()
    assert encode(tokenizer, prompt(PUZZLE)) == encode(tokenizer, prompt(PUZZLE))
    assert random.getstate() == state


def test_a_run_resumes_the_next_day(folder: Path, countdown: Command, on_day: Callable[[int], None]) -> None:
    with_template(folder, start="{{ strftime_now('%d %b %Y') }}")
    on_day(1)
    assert countdown("train", "--model", folder, "--run", "first", *SMALL, "--num-iterations", 1).code == 0
    on_day(2)
    resumed = countdown("train", "--run", "first", "--resume", "--num-iterations", 2)
    assert resumed.code == 0, resumed.err


def executed(text: str, messages: Sequence[Message]) -> str:
    """The prompt that Ollama makes: it repeats the template for each pair of turns, the last up to `.Response`."""
    template, prompted = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL), ""
    assert template is not None
    turns = {"system": "", "user": "", "assistant": ""}
    for index, message in enumerate(messages):
        turns[message["role"]] = message["content"]
        last = index == len(messages) - 1
        if message["role"] == "assistant" or last:
            body = template[1].partition("{{ .Response }}")[0] if last else template[1]
            system = r"\1" if turns["system"] else ""
            body = re.sub(r"\{\{ if .System \}\}(.*?)\{\{ end \}\}", system, body, flags=re.DOTALL)
            for name, role in (("System", "system"), ("Prompt", "user"), ("Response", "assistant")):
                body = body.replace(f"{{{{ .{name} }}}}", turns[role])
            prompted += body
            turns = dict.fromkeys(turns, "")
    return prompted


CHAT = "{%- for message in messages %}" + TURN + "{%- endfor %}{{ '<|im_start|>assistant\\n' }}"
LLAMA = CHAT.replace("<|im_start|>", "<|header|>").replace("\\n'", "<|end|>\\n\\n'")
NAMED = "{{ '<s>' }}" + CHAT.replace("<|im_start|>", "").replace("<|im_end|>", "")
MISTRAL = """{%- for message in messages %}
{{- '[SYS]' + message.content + '[/SYS]' if message.role == 'system' else '' }}
{{- '[INST]' + message.content + '[/INST]' if message.role == 'user' else '' }}
{{- message.content + '</s>' if message.role == 'assistant' else '' }}{%- endfor %}"""


TRIPLE = r'"""(?:(?!""").)*"""'
INSTRUCTIONS = (  # of Ollama's grammar, those that are written
    r"FROM \./\S+", rf"(TEMPLATE|SYSTEM) {TRIPLE}", rf"MESSAGE (user|assistant) {TRIPLE}",
    r"PARAMETER (temperature|repeat_penalty|num_predict) \d+", r'PARAMETER stop "[^"\n]+"',
)  # fmt: skip


@pytest.mark.parametrize("text", ['Say """done""".', 'Answer in "quotes"'])
def test_a_modelfile_of_a_prompt_that_it_cannot_hold_is_refused(text: str, folder: Path) -> None:
    policy_of(folder).save(folder)
    limit_completions(folder, 77)
    with pytest.raises(CountdownError, match="a Modelfile cannot hold"):
        modelfile(folder, "first.gguf", [{"role": "system", "content": text}, {"role": "user", "content": "?"}])


@pytest.mark.parametrize("style", ["one-shot", "zero-shot"])
@pytest.mark.parametrize("template", [CHAT, LLAMA, NAMED, MISTRAL])
def test_a_modelfile_makes_the_prompt_of_the_chat_template(template: str, style: Style, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    policy_of(folder).save(folder)
    limit_completions(folder, 77)
    messages = prompt(Puzzle((4, 7, 3), 25), style)
    text = modelfile(folder, "first.gguf", messages)
    assert executed(text, messages) == rendered(load_tokenizer(str(folder)), messages)
    assert re.fullmatch(f"(({'|'.join(INSTRUCTIONS)})\n)+", text, re.DOTALL)
    assert text.startswith("FROM ./first.gguf\n") and 'PARAMETER stop "<|im_end|>"\n' in text
    assert f'SYSTEM """{messages[0]["content"]}"""\n' in text and "PARAMETER num_predict 77\n" in text
    assert [turn in text for turn in (messages[1]["content"], messages[-1]["content"])] == [style == "one-shot", False]
