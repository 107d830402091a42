"""Promises of the project as a whole."""

import ast
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import grpo_cli

PACKAGE = Path(grpo_cli.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text("utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}
HEAVY = {"torch", "transformers", "bitsandbytes", "matplotlib", "numpy"}
LIGHT = "cli.app cli.gen_data cli.plot cli.options ui.tables ui.figures ui.account ui.report core.config.resolve"
LIGHT += " core.config.settings core.evals.statistics core.run.folder core.task.puzzle core.task.scoring"
PURE = "errors task.expression task.puzzle task.prompts task.scoring task.solver task.data"


def loaded_by(code: str) -> set[str]:
    """Top-level names of all modules that a fresh Python has loaded after `code`."""
    report = "import atexit, json, sys; atexit.register(lambda: print('\\n' + json.dumps([*sys.modules])))"
    command = [sys.executable, "-c", f"{report}\n{code}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in json.loads(output.splitlines()[-1])}


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def test_help_loads_neither_a_model_nor_the_settings() -> None:
    code = "import sys; sys.argv = ['countdown', '--help']\nfrom grpo_cli.cli.app import main\nmain()"
    assert loaded_by(code) & {*HEAVY, "pydantic"} == set()


def test_what_needs_no_model_loads_none() -> None:
    assert loaded_by("\n".join(f"import grpo_cli.{module}" for module in LIGHT.split())) & HEAVY == set()


def test_puzzles_and_scores_need_the_standard_library_alone() -> None:
    code = "\n".join(f"import grpo_cli.core.{module}" for module in PURE.split())
    assert loaded_by(code) - loaded_by("") - sys.stdlib_module_names == {"grpo_cli"}


def test_the_core_neither_prints_nor_exits_nor_reads_the_environment() -> None:
    """Except to restore what a user's code changed."""
    calls = {"print", "input", "exit", "sys.exit", "os.getenv"}
    found = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        if module.startswith("grpo_cli.core") and module != "grpo_cli.core.task.guest"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in calls)
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "sys.stdout", "sys.stderr"})
    ]
    assert found == []


def test_the_core_knows_nothing_above_it() -> None:
    above = ("typer", "rich", "grpo_cli.cli", "grpo_cli.ui")
    found = [
        (name, other)
        for name, tree in MODULES.items()
        if name.startswith("grpo_cli.core")
        for other in imports(tree)
        if other.startswith(above)
    ]
    assert found == []


def test_subpackages_of_the_core_import_one_another_in_one_direction() -> None:
    """Imports for types alone do not count."""
    graph: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        if name.startswith("grpo_cli.core."):
            body = [
                node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            ]
            others = {part_of(other) for other in imports(ast.Module(body, [])) if other.startswith("grpo_cli.core.")}
            graph.setdefault(part_of(name), set()).update(others - {part_of(name)})
    TopologicalSorter(graph).prepare()


def test_only_the_task_and_the_built_in_model_know_countdown() -> None:
    """Training, sampling, evaluation and the report reach puzzles through the Task and Problem interfaces alone."""
    general = r"(rl(?!\.warm_start)|evals|sampling|run|dist|perf|model)\b.*|ui\.(account|figures|report)"
    found = [
        (name, other)
        for name, tree in MODULES.items()
        if re.fullmatch(rf"grpo_cli\.(core\.)?({general})", name)
        for other in imports(tree)
        if re.match(r"grpo_cli\.core\.task\.(puzzle|solver|scoring|expression|data)", other)
    ]
    assert found == []


def part_of(module: str) -> str:
    """`model` for grpo_cli.core.model.policy."""
    return module.split(".")[2]


def test_imports_make_no_circle() -> None:
    graph = {name: {other for other in imports(tree) if other in MODULES} - {name} for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_every_module_says_what_it_does() -> None:
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_group

    from grpo_cli.cli.app import app

    readme = (PACKAGE.parent / "README.md").read_text("utf-8")
    assert [name for name in get_group(app).commands if f"countdown {name}" not in readme] == []


@pytest.mark.slow
def test_help_takes_less_than_four_tenths_of_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "grpo_cli", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.4
