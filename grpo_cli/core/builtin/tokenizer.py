"""The built-in model's tokenizer: a real Qwen2Tokenizer, trained on the task's prompts and traces.

Qwen's pre-tokenizer splits numbers into digits. Here every whole number up to 200 is an added token, with and without a
leading space, so a line of arithmetic is a third shorter and comparing with the target means comparing two tokens.
Added tokens are matched before the pre-tokenizer runs and are part of the file format, so AutoTokenizer loads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from grpo_cli.core.task.prompts import ANSWER, SYSTEM, THINK

LARGEST_NUMBER = 200
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VERDICTS = (", need", ". No.\n", ". Yes!\n")  # one token each, so the verdict directly follows the target
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    f"{{{{- '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Qwen2.5's own template for messages without tools, with the task's system message as its default."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Qwen2Tokenizer:
    """A Qwen2Tokenizer with merges learned from `texts`, and about `vocabulary` tokens besides the added ones."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(with_added_tokens=False), merges=merges, eos_token=TURN_END, pad_token=END_OF_TEXT
    )
    tokenizer.add_tokens([AddedToken(TURN_START, special=True, normalized=False)], special_tokens=True)
    numbers = [f"{space}{number}" for space in ("", " ") for number in range(LARGEST_NUMBER + 1)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*THINK, *ANSWER, *VERDICTS, *numbers)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
