"""Documentation that can be checked: links, commands, the file tree, the size."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_cli.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMING = [ROOT / name for name in ("config.toml", "Makefile", "pyproject.toml", ".ci/run", "CONTRIBUTING.md")]
NAMING += [path for name in ("grpo_cli", "tests", "examples", "benchmarks") for path in (ROOT / name).rglob("*.py")]


def leads_to_a_heading(page: Path, link: str) -> bool:
    """Whether a relative link of this page names a file, and a heading of it if it has an anchor."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or not anchor:
        return target.exists()
    text = re.sub(r"^```.*?^```", "", target.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_local_link_leads_to_a_file_and_a_heading() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text("utf-8"))]
    assert len(links) > 50
    assert [one for one in links if "://" not in one[1] and not leads_to_a_heading(*one)] == []


def test_every_page_that_code_and_settings_name_exists() -> None:
    """Hints and findings point to pages."""
    named = [(path, link) for path in NAMING for link in re.findall(r"\bdocs/[\w-]+\.md(?:#[\w-]+)?", path.read_text())]
    assert len(named) > 20
    assert [one for one in named if not leads_to_a_heading(ROOT / "README.md", one[1])] == []


def test_every_page_is_in_the_menu_and_there_are_few() -> None:
    menu = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8").partition("nav:")[2])
    pages = {page.name for page in PAGES} - {"README.md"}
    assert sorted(menu) == sorted(pages | {"index.md"}) and len(pages) <= 12
    words = [word for page in PAGES for word in page.read_text("utf-8").split() if re.search(r"\w", word)]
    assert len(words) <= 16_000


def test_the_file_tree_names_every_module() -> None:
    tree = (ROOT / "docs" / "development.md").read_text("utf-8")
    modules = {
        path.name for path in (ROOT / "grpo_cli").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    }
    named = set(re.findall(r"\w+\.py", tree.partition("## Layout")[2].partition("tests/")[0]))
    assert modules == named


def test_a_puzzle_reaches_its_plot_in_fourteen_hops_that_exist() -> None:
    page = (ROOT / "docs" / "one-step.md").read_text("utf-8")
    hops = re.findall(r"\| \[.+?\]\(\.\./(.+?\.py)\) \| `(\w+)` \|", page)
    missing = [hop for hop in hops if f"def {hop[1]}(" not in (ROOT / hop[0]).read_text("utf-8")]
    assert len(hops) == 14 and missing == []


def test_every_test_of_the_fault_matrix_exists() -> None:
    page = (ROOT / "tests" / "faults.md").read_text("utf-8")
    missing, file = [], ""
    for name, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page):
        file = name or file
        text = (ROOT / "tests" / file).read_text("utf-8") if (ROOT / "tests" / file).exists() else ""
        if not text or (test and f"def {test}(" not in text):
            missing.append(f"{file}::{test}")
    assert missing == []


COMMAND = re.compile(r"\bcountdown ((?:train|eval|solve|plot|why|runs|compare|study|export|gen-data)\b[^`\n]*)")


def test_every_option_of_a_documented_command_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--help` at the end of a line is reached only if all before it can be parsed."""
    monkeypatch.setattr("typer.rich_utils.rich_format_help", lambda **_: None)  # most of the time
    commands = [command for page in PAGES for command in COMMAND.findall(page.read_text("utf-8"))]
    lines = {re.split(r"\s#|&&|;|\.\.\.| \| ", command)[0] for command in commands}
    failed = [line for line in lines if CliRunner().invoke(app, [*shlex.split(line), "--help"]).exit_code]
    assert len(lines) > 50 and failed == []


def test_every_script_target_and_extra_in_the_pages_exists() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    scripts = set(re.findall(r"\bpython ((?:benchmarks|examples|tests)/\w+\.py)", text))
    assert len(scripts) > 8 and [script for script in scripts if not (ROOT / script).exists()] == []
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    assert len(targets) > 8 and [target for target in targets if f"\n{target}:" not in makefile] == []
    extras = set(re.findall(r"countdown-grpo\[(\w+)\]", text))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert len(extras) > 4 and extras <= known.keys()


def test_every_public_name_can_be_imported() -> None:
    rows = re.findall(
        r"^\| `(grpo_cli[\w.]+)` \| (.+?) \|$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE
    )
    named = [(module, name) for module, cell in rows for name in re.findall(r"`(\w+)`", cell.partition(":")[0])]
    assert len(named) > 30
    assert [pair for pair in named if not hasattr(import_module(pair[0]), pair[1])] == []


def test_the_examples_of_the_api_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace('"train.num_iterations": 3', '"train.num_iterations": 1, "train.max_new_tokens": 20'), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1: reward ") and "saved in runs/from-python/model" in lines[1]
    assert (tmp_path / "runs" / "from-python" / "model" / "model.safetensors").is_file()


def test_the_readme_opens_with_the_picture_and_is_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120 and any("docs/fork.png" in line for line in lines[:8])
    assert "make train" in "\n".join(lines[:40])
