"""Chat messages -> the text and token ids of a prompt, by a model's chat template.

Every prompt has the same date and random draws. transformers renders templates in a sandbox; `check_template` tries one
once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from datetime import datetime, tzinfo
from typing import Self, cast

import jinja2
import transformers
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.prompts import ANSWER, THINK
from grpo_cli.core.task.task import Message

CHARACTERS = 100_000  # most that two short messages may become
HINT = "use an instruction-tuned model whose template takes system and user messages, or fix its chat_template.jinja"


PROBE: list[Message] = [
    {"role": "system", "content": "Solve it."},
    {"role": "user", "content": "Make 13 of 3, 5 and 2."},
]


class _FixedDate(datetime):
    """The date that Llama's template writes without a clock: a run must resume, and an eval repeat, on any day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2024, 7, 26, tzinfo=tz)


def encode(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The token ids of a prompt.

    Control tokens in a message are text like any other: only the template opens and closes turns. Tags are tokens where
    the tokenizer has them, as in completions. If the template strips a message, such as the thought of an earlier turn,
    all turns are joined in the user's; CountdownError if that does not help either.
    """
    control = _control_pattern(tokenizer)
    marked: list[Message] = [
        {"role": message["role"], "content": mark_control_tokens(message["content"], control)} for message in messages
    ]
    text = _complete(tokenizer, marked) or _complete(tokenizer, joined(marked))
    if text is None:
        raise CountdownError("the chat template changes the text of a prompt", HINT)
    return cast("list[int]", encode_marked_chat(tokenizer, text))


def joined(messages: Sequence[Message]) -> list[Message]:
    """The messages with all turns in a single one of the user."""
    turns = [message["content"] for message in messages if message["role"] != "system"]
    system = [message for message in messages if message["role"] == "system"]
    return [*system, {"role": "user", "content": "\n\n".join(turns)}]


def strips_thoughts(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether the template leaves the thought out of an earlier turn."""
    thought = f"{THINK[0]}\nIt is 3 * 5 - 2.\n{THINK[1]}\n{ANSWER[0]}3 * 5 - 2{ANSWER[1]}"
    return _complete(tokenizer, [*PROBE, {"role": "assistant", "content": thought}, PROBE[-1]]) is None


def opening(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """The end of every prompt, from a tag that it opens without closing it; empty if there is none."""
    turn = rendered(tokenizer, PROBE).rpartition(PROBE[-1]["content"])[2]
    for tag, closing in (THINK, ANSWER):
        start = turn.rfind(tag)
        if start >= 0 and closing not in turn[start:]:
            return turn[start:]
    return ""


def _control_pattern(tokenizer: transformers.PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches a control token, the longest first. transformers lists a tokenizer's tokens in milliseconds each time."""
    control = set(tokenizer._get_control_tokens(tokenizer.get_chat_template())) - {*THINK, *ANSWER}
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


def _complete(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The text of the messages; None if the template rejects them or strips one."""
    try:
        text = rendered(tokenizer, messages)
    except jinja2.TemplateError:
        return None
    return text if all(message["content"].strip() in text for message in messages) else None


def rendered(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    clock, chat_template_utils.datetime = chat_template_utils.datetime, _FixedDate
    state = random.getstate()
    random.seed(0)  # for Jinja's `random` and `lipsum`
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    finally:
        chat_template_utils.datetime = clock
        random.setstate(state)


def check_template(name: str, tokenizer: transformers.PreTrainedTokenizerBase, messages: list[Message]) -> None:
    """Refuse a template that fails on `messages` (the system's first), drops one, or writes far more than they say."""
    try:
        text = rendered(tokenizer, messages)
    except Exception as error:  # templates may raise anything
        reason = " ".join(str(error)[:500].split()) or type(error).__name__
        raise CountdownError(f"the chat template of `{name}` fails: {reason}", HINT) from error
    if len(text) > CHARACTERS:
        raise CountdownError(f"the chat template of `{name}` makes {len(text):,} characters of two messages", HINT)
    for message in messages:
        if message["content"] not in text:
            raise CountdownError(f"the chat template of `{name}` leaves out the {message['role']} message", HINT)
