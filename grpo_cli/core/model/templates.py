"""Check a chat template, an untrusted program, by rendering it in a child process with limits."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import transformers

from grpo_cli.core.errors import CountdownError

SECONDS, CHARACTERS, BYTES = 2, 100_000, 1 << 29
HINT = "use an instruction-tuned model whose template takes system and user messages, or fix its chat_template.jinja"


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
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
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
