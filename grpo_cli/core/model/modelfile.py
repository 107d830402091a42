"""A Modelfile for Ollama: the chat template in Go's language, the prompt's turns, greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import read_json
from grpo_cli.core.model.load import load_tokenizer
from grpo_cli.core.model.templates import rendered
from grpo_cli.core.task.task import Message

ROLES = ("system", "user", "assistant", "user")


def modelfile(folder: Path, file: str, messages: Sequence[Message]) -> str:
    """The Modelfile of a GGUF file of the model in `folder`; the user replaces the last of the `messages`.

    Raises CountdownError if the template or a message has three quotes in a row, which a Modelfile cannot hold.
    """
    tokenizer, generation = load_tokenizer(str(folder)), read_json(folder / "generation_config.json")
    ends = tokenizer.convert_ids_to_tokens(generation["eos_token_id"])
    lines = [f"FROM ./{file}", f"TEMPLATE {_quoted(_template(tokenizer))}"]
    for message in messages[:-1]:
        kind = "SYSTEM" if message["role"] == "system" else f"MESSAGE {message['role']}"
        lines.append(f"{kind} {_quoted(message['content'])}")
    limit = f"num_predict {generation['max_new_tokens']}"
    for parameter in ("temperature 0", "repeat_penalty 1", limit, *(f'stop "{end}"' for end in ends)):
        lines.append(f"PARAMETER {parameter}")
    return "".join(f"{line}\n" for line in lines)


def _quoted(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise CountdownError('a Modelfile cannot hold a text with `"""`, or one that ends in `"`', "reword the prompt")
    return f'"""{text}"""'


def _template(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """The chat template in the form that Ollama repeats for every pair of turns.

    What stands before each user turn opens it; what else stands before the first one ends the system turn.
    """
    marks = [f"turn {index} of {role}" for index, role in enumerate(ROLES)]
    text = rendered(tokenizer, [{"role": role, "content": mark} for role, mark in zip(ROLES, marks, strict=True)])
    before = []
    for mark in marks:
        piece, _, text = text.partition(mark)
        before.append(piece)
    system, first, _, later = before
    user = next(first[start:] for start in range(len(first) + 1) if later.endswith(first[start:]))
    return (
        f"{{{{ if .System }}}}{system}{{{{ .System }}}}{first.removesuffix(user)}{{{{ end }}}}"
        f"{user}{{{{ .Prompt }}}}{text}{{{{ .Response }}}}{later.removesuffix(user)}"
    )
