"""The grammar against Python's own parser, and the reading of answers in prose, case by case."""

import ast
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.core.task.expression import MAX_CHARACTERS, MAX_DEPTH, last_expression, parse, parse_lenient

EXPRESSIONS = [
    ("7", (7,), 7),
    ("0", (0,), 0),
    ("5 * 2 + 3", (5, 2, 3), 13),
    ("5*2+3", (5, 2, 3), 13),
    ("\t5\n*\r2 +\f3\v", (5, 2, 3), 13),
    ("2 + 3 * 5", (2, 3, 5), 17),
    ("10 - 4 - 3", (10, 4, 3), 3),
    ("10 - (4 - 3)", (10, 4, 3), 9),
    ("(3 + 2) * 5", (3, 2, 5), 25),
    ("2 * (3 - 5) * 4", (2, 3, 5, 4), -16),
    ("-2 + 5 * 3", (2, 5, 3), 13),
    ("5 * 2 - -3", (5, 2, 3), 13),
    ("5 * -2", (5, 2), -10),
    ("-(2 + 3)", (2, 3), -5),
    ("-2 * -(3 - 5)", (2, 3, 5), -4),
    ("+-+-+7", (7,), 7),
    ("- - -7", (7,), -7),
    ("((((1))))", (1,), 1),
    ("53 + 2", (53, 2), 55),
]

NOT_EXPRESSIONS = [
    *["", " ", "+", "()", "(", ")", "1 +", "* 1", "1 + * 2", "(1", "1)", ")1(", "1) * (2", "(1 +) 2", "1 ()"],
    *["2 * 5.5", "2**3", "2 ** 3", "7 // 2", "7 / 2", "7 % 2", "3!", "2 ^ 3", "5 * 2 + 3 = 13", "1 == 1", "1,2"],
    *["5 2", "5(2)", "(5)(2)", "(5) 2", "2(3 + 4)", "[1]", "{1}", "<1>", "1;", "~1", "1 | 2", "not 1"],
    *["01", "00", "1 + 007", "1_0", "0x1", "0b1", "1e3", "1j", "1.", ".5", "1'000"],
    *["True", "x", "None", "abs(5)", "int()", "__import__('os')", "'1'", '"1"', "1 # 2", "1 \\\n+ 2", "lambda: 1"],
    *["\u0663", "\uff15", "²", "5 × 2", "5 · 2", "5 − 2", "5\xa0+ 2", "5\u2009+ 2", "5\u200b", "\ufeff5", "5\x00"],
]


@pytest.mark.parametrize(("text", "numbers", "value"), EXPRESSIONS)
def test_an_expression_has_its_numbers_and_exact_value(text: str, numbers: tuple[int, ...], value: int) -> None:
    expression = parse(text)
    assert expression is not None
    assert (expression.numbers, expression.value) == (numbers, value)


@pytest.mark.parametrize("text", NOT_EXPRESSIONS)
def test_nothing_else_is_an_expression(text: str) -> None:
    assert parse(text) is None


def test_length_and_depth_are_bounded() -> None:
    assert parse("1" * MAX_CHARACTERS) is not None
    assert parse("1" * (MAX_CHARACTERS + 1)) is None
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) is not None
    assert parse("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    assert parse("(1)" + "+((1))" * 40) is not None, "parentheses side by side are not depth"
    assert parse("-" * (MAX_CHARACTERS - 1) + "1") is not None, "signs are not depth"


def test_large_values_are_exact() -> None:
    expression = parse("9" * 127 + "*" + "9" * 128)
    assert expression is not None
    assert expression.value == (10**127 - 1) * (10**128 - 1)


SPACES = st.sampled_from(["", " ", "  ", "\t", "\n"])
NUMBERS = st.integers(0, 120).map(str)


def compound(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(parts, SPACES, st.sampled_from("+-*/"), SPACES, parts).map("".join)
    signed = st.tuples(st.sampled_from("+-"), SPACES, parts).map("".join)
    grouped = st.tuples(st.just("("), SPACES, parts, SPACES, st.just(")")).map("".join)
    return binary | signed | grouped


GRAMMAR = st.recursive(NUMBERS, compound, max_leaves=20)
NEARLY = st.text(alphabet="0123456789+-*/() \t", max_size=12)


def oracle(text: str) -> tuple[tuple[int, ...], Fraction | None] | None:
    """The numbers and the value of `text` by Python's parser, with everything but the grammar's nodes refused."""
    text = re.sub("[ \t\n]", " ", text).strip()
    try:
        return evaluated(ast.parse(text, mode="eval").body, text)
    except SyntaxError:
        return None


def evaluated(node: ast.expr, text: str) -> tuple[tuple[int, ...], Fraction | None] | None:
    match node:
        case ast.Constant(value=int(number)) if str(number) == ast.get_source_segment(text, node):
            return (number,), Fraction(number)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand) if inner := evaluated(operand, text):
            numbers, value = inner
            return numbers, value if value is None or isinstance(node.op, ast.UAdd) else -value
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            one, other = evaluated(left, text), evaluated(right, text)
            if one and other:
                return one[0] + other[0], combined(node.op, one[1], other[1])
    return None


def combined(operator: ast.operator, a: Fraction | None, b: Fraction | None) -> Fraction | None:
    """None for a division by zero, and for what has one in it."""
    if a is None or b is None or (isinstance(operator, ast.Div) and not b):
        return None
    results = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__}
    return results.get(type(operator), Fraction.__truediv__)(a, b)


@settings(deadline=None)
@given(GRAMMAR.filter(lambda text: len(text) <= MAX_CHARACTERS))
def test_expressions_of_the_grammar_agree_with_pythons_parser(text: str) -> None:
    expression = parse(text, "+-*/")
    assert expression is not None
    assert (expression.numbers, expression.value) == oracle(text)
    assert (parse(text) is None) == ("/" in text)


@settings(deadline=None, max_examples=1000)
@given(NEARLY)
def test_texts_near_the_grammar_agree_with_pythons_parser(text: str) -> None:
    expression = parse(text, "+-*/")
    assert (expression and (expression.numbers, expression.value)) == oracle(text)


@pytest.mark.faults
@settings(deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="0123456789+-*()= \n×·−\\times.", max_size=300))
def test_random_text_only_ever_returns(text: str) -> None:
    for expression in (parse(text), parse_lenient(text)):
        assert expression is None or isinstance(expression.value, int)
    assert (last_expression(text, (3, 5, 2)) or "") in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 * 2 + 3", 13),
        ("5 × 2 + 3", 13),
        ("5 · 2 + 3", 13),
        ("5 \\times 2 + 3", 13),
        ("5\\times2+3", 13),
        ("5 * 3 − 2", 13),
        ("5 * 2 + 3 = 13", 13),
        ("5 × 2 + 3 = 13", 13),
        ("5 * 2 + 3 = 99", None),
        ("5 * 2 + 3 =", None),
        ("5 * 2 + 3 = 10 + 3", None),
        ("5 * 2 + 3 = 10 + 3 = 13", None),
        ("13 = 5 * 2 + 3", None),
        ("5 ÷ 2", None),
        ("5 \\cdot 2", None),
        ("5 * 2 + 3.", None),
        ("×" * (MAX_CHARACTERS + 1), None),
    ],
)
def test_lenient_reading_adds_typographic_operators_and_a_true_result(text: str, value: int | None) -> None:
    expression = parse_lenient(text)
    assert (expression and expression.value) == value


PROSE = [
    # Where the expression stands
    ("5 * 2 + 3", "5 * 2 + 3"),
    ("The answer is 5 * 2 + 3.", "5 * 2 + 3"),
    ("Answer:5*2+3", "5*2+3"),
    ("Use 5 * 2 + 3, which uses 5, 2 and 3.", "5 * 2 + 3"),
    ("First 3 + 5 = 8. Then 5 * 2 + 3!", "5 * 2 + 3"),
    ("5 * 2 + 3 works.\n3 * 5 + 2 does not.", "3 * 5 + 2"),
    ("It is (3 + 2) * 5", "(3 + 2) * 5"),
    ("It is -2 + 5 * 3", "-2 + 5 * 3"),
    ("-2 + 5 * 3", "-2 + 5 * 3"),
    # A chain is read as its first part that uses all numbers
    ("5 * 2 + 3 = 13", "5 * 2 + 3"),
    ("5 * 2 + 3 = 10 + 3 = 13", "5 * 2 + 3"),
    ("13 = 5 * 2 + 3", "5 * 2 + 3"),
    ("10 + 3 = 5 * 2 + 3 = 13", "5 * 2 + 3"),
    ("5 * 2 + 3 = 3 + 2 * 5 = 13", "5 * 2 + 3"),
    ("5 * 2 = 10 and 10 + 3 = 13", "10 + 3"),
    ("5 * 2 + 4 = 10 + 4 = 14", "5 * 2 + 4"),
    ("26 / 2 = 5 * 2 + 3", "5 * 2 + 3"),
    # What surrounds it
    ("**5 * 2 + 3**", "5 * 2 + 3"),
    ("*5 * 2 + 3*", "5 * 2 + 3"),
    ("`5 * 2 + 3`", "5 * 2 + 3"),
    ("$5 * 2 + 3$", "5 * 2 + 3"),
    ("\\(5 * 2 + 3\\)", "5 * 2 + 3"),
    ("\\boxed{5 * 2 + 3}", "5 * 2 + 3"),
    ("<answer>5 * 2 + 3</answer>", "5 * 2 + 3"),
    ("(5 * 2 + 3)", "(5 * 2 + 3)"),
    ("(5 * 2 + 3 = 13)", "5 * 2 + 3"),
    ("((3 + 2) * 5 = 25)", "(3 + 2) * 5"),
    ("(I take 3 * (5 - 2))", "3 * (5 - 2)"),
    ("5 * 2 + 3 -> 13", "5 * 2 + 3"),
    ("5 * 2 + 3 - done", "5 * 2 + 3"),
    ("- 5 * 2 + 3", "5 * 2 + 3"),
    ("* 5 * 2 + 3", "5 * 2 + 3"),
    ("1. 5 * 2 + 3", "5 * 2 + 3"),
    ("1) 5 * 2 + 3", "5 * 2 + 3"),
    ("3 + 5 + 2 = 10\n- 2 = 8", "3 + 5 + 2"),
    # What is not read, in whole or in part
    ("", None),
    ("There is no solution.", None),
    ("I have 3, 5 and 2 and need 13", None),
    ("[3, 5, 2]", None),
    ("-13", None),
    ("5 * 2 +\n3", "5 * 2"),
    ("2.5 + 3 * 5", None),
    ("5 * 2 + 3.5", None),
    ("2**3 + 5", None),
    ("4 / 5 * 2 + 3", None),
    ("4 × 5 * 2 + 3", None),
    ("4 \\times 5 * 2 + 3", None),
    ("1_0 + 3", None),
    ("2x + 3 * 5", None),
    ("x5 * 2 + 3", "2 + 3"),
    ("5 * 2 + 3 / 1", None),
    ("2 5 * 2 + 3", None),
    ("007 + 6", None),
]


@pytest.mark.parametrize(("text", "answer"), PROSE)
def test_the_last_expression_of_prose(text: str, answer: str | None) -> None:
    assert last_expression(text, (3, 5, 2)) == answer


NOISE = ["1", "(", "1+", "1 1 a ", "=", " ", "\n", "1=", "1.1", "- ", "(1+1", "x1", "\\a", "1 1\n", "*"]


@pytest.mark.faults
@pytest.mark.parametrize("piece", NOISE, ids=repr)
def test_no_expression_is_found_in_a_megabyte_of_noise(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    assert last_expression(text, (3, 5, 2)) is None
    assert parse(text) is None
    assert parse_lenient(text) is None


def test_an_expression_is_found_before_a_long_rest() -> None:
    assert last_expression("5 * 2 + 3 = 13\n" + "and so it is. " * 10**5, (3, 5, 2)) == "5 * 2 + 3"
