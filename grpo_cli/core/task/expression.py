"""Parse text to an exact value and the numbers used.

expression := term (('+' | '-') term)*        term := factor (('*' | '/') factor)*
factor     := ('+' | '-') factor | '(' expression ')' | number

The grammar contains only the allowed operations, and signs only if `-` is allowed. Text is matched against the grammar,
never evaluated by Python; nothing here recurses, raises or backtracks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

SPACE = " \t\n\r\f\v"  # the only white space in and around an expression
MAX_CHARACTERS = 256
MAX_DEPTH = 64
MAX_SPANS = 100

# Character classes repeat possessively to prevent backtracking; groups do not, because Python before 3.11.5 matches
# possessive groups wrongly (github.com/python/cpython/issues/106052).
_OPERAND = rf"[-+({SPACE}]*+(?:0|[1-9][0-9]*+)[){SPACE}]*+"
_UNBALANCED = re.compile(rf"{_OPERAND}(?:[-+*/]{_OPERAND})*")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_SIGN = re.compile(rf"(?:^|[-+*/(])[{SPACE}]*[-+]")
_TYPOGRAPHIC = {"\\times": "*", "×": "*", "·": "*", "−": "-", "\\div": "/", "÷": "/"}
_PARENTHESIS = re.compile(r"[()]")

# Spans that look like arithmetic within one line. Malformed numbers and unknown operators belong to a span, so
# `2.5 + 3` or `4 / 5 + 3` fails as a whole instead of being read as `5 + 3`; a list's bullet is matched on its own.
_SPAN = re.compile(
    r"(?m:^[ \t]*+(?:[-+*]|[0-9]{1,3}[.)])[ \t])"
    r"|(?<![\w.])(?=[-+*(0-9])(?:[-+*()= \t/%^×·⋅−÷]++|[0-9]\w*+|\.[0-9]\w*+|\\[a-zA-Z]++)+"
)


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression of the grammar, as its tokens."""

    tokens: tuple[str, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers in reading order."""
        return tuple([int(token) for token in self.tokens if token.isdigit()])

    @property
    def value(self) -> int | Fraction | None:
        """The exact value; None for a division by zero."""
        outer: list[tuple[int | Fraction, int | Fraction, bool]] = []
        total: int | Fraction = 0
        term: int | Fraction = 1
        sign, after_operand, divides = 1, False, False
        for token in self.tokens:
            if token == "(":
                outer.append((total, sign * term, divides))
                total, term, sign, divides = 0, 1, 1, False
            elif token == "/":
                divides = True
            elif token in "+-":
                if after_operand:
                    total, term = total + term, 1
                sign = -sign if token == "-" else sign
            elif token != "*":
                operand: int | Fraction = sign * int(token) if token != ")" else total + term
                if token == ")":
                    total, term, divides = outer.pop()
                if divides and operand == 0:
                    return None
                term = Fraction(term) / operand if divides else term * operand
                sign, divides = 1, False
            after_operand = token not in "(+-*/"
        return total + term


def parse(text: str, operations: str = "+-*") -> Expression | None:
    """The expression in `text`, or None if it is anything else, too long or too deep."""
    if len(text) > MAX_CHARACTERS or not _UNBALANCED.fullmatch(text) or not _is_balanced(text):
        return None
    tokens = tuple(_TOKEN.findall(text))
    if not set(tokens).isdisjoint(set("+-*/").difference(operations)) or ("-" not in operations and _SIGN.search(text)):
        return None
    return Expression(tokens)


def _is_balanced(text: str) -> bool:
    depth = 0
    for parenthesis in _PARENTHESIS.findall(text):
        depth += 1 if parenthesis == "(" else -1
        if not 0 <= depth <= MAX_DEPTH:
            return False
    return depth == 0


def ascii_operators(text: str) -> str:
    r"""`text` with `×`, `·`, `−`, `÷`, `\times` and `\div` replaced by `*`, `-` and `/`."""
    for written, operator in _TYPOGRAPHIC.items():
        text = text.replace(written, operator)
    return text


def parse_lenient(text: str, operations: str = "+-*") -> Expression | None:
    """As `parse`, but accepts typographic operators, and a trailing `= N` if N is the value."""
    if len(text) > MAX_CHARACTERS:
        return None
    left, equals, right = ascii_operators(text).rpartition("=")
    if not equals:
        return parse(right, operations)
    expression, stated = parse(left, operations), parse(right)
    if expression and stated and len(stated.numbers) == 1 and stated.value == expression.value:
        return expression
    return None


def last_expression(text: str, numbers: Sequence[int], operations: str = "+-*") -> str | None:
    """The last span of prose that is an expression of at least two numbers.

    Of a chain `a = b = c`, the first part that uses all of `numbers` is used, else the first part. Spans do not cross
    lines; list bullets, emphasis, dashes and unpaired parentheses around them are dropped. To bound the time, only the
    last MAX_SPANS spans and the first MAX_SPANS parts of a chain are examined.
    """
    required = sorted(numbers)
    for span in islice(reversed(list(_SPAN.finditer(text))), MAX_SPANS):
        bare = map(_bare, span[0].split("=", MAX_SPANS))
        read = [(part, expression.numbers) for part in bare if (expression := parse(part, operations))]
        parts = [(part, used) for part, used in read if len(used) > 1]
        if parts:
            return next((part for part, used in parts if sorted(used) == required), parts[0][0])
    return None


def spans(line: str) -> list[str]:
    """Spans of a line that look like arithmetic, equations among them; at most MAX_SPANS."""
    return [span[0] for span in islice(_SPAN.finditer(line), MAX_SPANS) if len(span[0]) <= MAX_CHARACTERS]


def _bare(part: str) -> str:
    part = part.strip(" \t*").rstrip(" \t*+-")
    if len(part) > MAX_CHARACTERS:
        return ""
    unclosed = part.count("(") - part.count(")")
    return part.removeprefix("(" * unclosed).removesuffix(")" * -unclosed).strip(SPACE)
