"""Chat messages -> the text and token ids of a prompt, by a model's chat template, an untrusted program.

Every prompt has the same date. A template is checked once, in a child process with limits.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
from collections.abc import Sequence
from datetime import datetime, tzinfo
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self, cast

import jinja2
import transformers
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.task.prompts import ANSWER, THINK
from grpo_cli.core.task.task import Message

SECONDS, CHARACTERS, BYTES = 2, 100_000, 1 << 29
HINT = "use an instruction-tuned model whose template takes system and user messages, or fix its chat_template.jinja"


PROBE = [{"role": "system", "content": "Solve it."}, {"role": "user", "content": "Make 13 of 3, 5 and 2."}]


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
    marked = [_marked(tokenizer, message) for message in messages]
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
    turn = _rendered(tokenizer, PROBE).rpartition(PROBE[-1]["content"])[2]
    for tag, closing in (THINK, ANSWER):
        start = turn.rfind(tag)
        if start >= 0 and closing not in turn[start:]:
            return turn[start:]
    return ""


def _marked(tokenizer: transformers.PreTrainedTokenizerBase, message: Message) -> Message:
    """The message with marks around control tokens."""
    control = set(tokenizer._get_control_tokens(tokenizer.get_chat_template())) - {*THINK, *ANSWER}
    longest_first = sorted(control, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing
    return {"role": message["role"], "content": mark_control_tokens(message["content"], pattern)}


def _complete(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The text of the messages; None if the template rejects them or strips one."""
    try:
        text = _rendered(tokenizer, messages)
    except jinja2.TemplateError:
        return None
    return text if all(message["content"].strip() in text for message in messages) else None


def _rendered(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    clock, chat_template_utils.datetime = chat_template_utils.datetime, _FixedDate
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    finally:
        chat_template_utils.datetime = clock


class TemplateError(Exception):
    """Why a template could not be rendered."""


class TooCostlyError(TemplateError):
    """The template takes too much time or memory, or crashes."""


def check_template(name: str, tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> None:
    """Refuse a template that fails on `messages` (the system's first), drops one, or is too costly."""
    try:
        text = render(tokenizer, messages)
    except TemplateError as error:
        rejected = not isinstance(error, TooCostlyError) and _takes(tokenizer, messages[1:])
        fault = "rejects a system message" if rejected else "fails"
        raise CountdownError(f"the chat template of `{name}` {fault}: {error}", HINT) from error
    for message in messages:
        if message["content"] not in text:
            raise CountdownError(f"the chat template of `{name}` leaves out the {message['role']} message", HINT)


def _takes(tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> bool:
    try:
        render(tokenizer, messages)
    except TemplateError:
        return False
    return True


def render(tokenizer: transformers.PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The text of `messages`. Forks, so imports are already loaded and it takes hundredths of a second."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(tokenizer, list(messages), writer), daemon=True)
    child.start()
    writer.close()
    try:
        if not reader.poll(SECONDS):
            raise TooCostlyError(f"it takes more than {SECONDS} seconds")
        text, error = reader.recv()
    except EOFError:
        raise TooCostlyError("rendering it ends the process") from None
    finally:
        child.kill()
        child.join()
        reader.close()
    if error:
        raise TemplateError(error)
    return str(text)


def _render(
    tokenizer: transformers.PreTrainedTokenizerBase, messages: list[dict[str, str]], writer: Connection
) -> None:
    _limit_resources()
    text, error = "", ""
    try:
        text = _rendered(tokenizer, messages)
    except MemoryError:
        error = f"it takes more than {BYTES >> 20} MB of memory"
    except Exception as problem:  # templates may raise anything
        error = " ".join(str(problem)[:500].split()) or type(problem).__name__
    if len(text) > CHARACTERS:
        text, error = "", f"two short messages become {len(text):,} characters"
    writer.send((text, error))


def _limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))  # if the parent cannot stop it
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
