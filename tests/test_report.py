"""The report: what it claims, what it escapes, what it does without, and how a real browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import Command
from markupsafe import Markup
from pydantic import TypeAdapter

from grpo_cli.core.config import resolve as config
from grpo_cli.core.config.settings import values
from grpo_cli.core.run.folder import Run
from grpo_cli.core.run.logs import Evaluated
from grpo_cli.ui import report
from grpo_cli.ui.account import Account, Change, change

DEFAULTS = config.defaults()
SETTINGS = values(config.resolve(has_cuda=lambda: False).settings)
OWN, OTHER = "val 3 one-shot", "val 4 natural"
HOSTILE = (
    '</pre></script><script>window.owned = 1</script><img src=x onerror="window.owned = 2">'
    "<style>body{display:none}</style><svg onload='window.owned = 3'>&lt;\u202e52 = 7 * 4\u2066\x1b[2J\ud83d"
    + "\u0301" * 200
    + "W" * 3000
)
SHOWN = '<img src=x onerror="window.owned = 2">'  # as text


def metrics(steps: int, *, every: int = 2) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = [{"step": 0, "val_accuracy": 0.25, "dev_accuracy": 0.0, "time/eval": 1.5}]
    for step in range(1, steps + 1):
        line = {"step": step, "reward": step / 40, "accuracy": step / 50, "kl": step / 1000, "entropy": 1 / step}
        line |= {"time/total": 3.0, "truncated": 0.0, "zero_variance": 0.5}
        lines.append(
            line | ({"val_accuracy": 0.25 + step / 50, "dev_accuracy": step / 50} if step % every == 0 else {})
        )
    return lines


def line(step: int, solved: str, *, cell: str = OWN, completion: str = "<answer>2</answer>") -> dict[str, object]:
    count, right = len(solved), solved.count("1")
    examples = [
        {"numbers": [2, 4, 6], "target": 20, "completion": completion, "reward": 0.1, "reason": "wrong_value"},
        {"numbers": [2, 4, 8], "target": 14, "completion": "yes", "reward": 1.0, "reason": "correct", "answer": "x"},
    ]
    return {
        "step": step, "cell": cell, "count": count, "accuracy": right / count, "interval": [0.0, 1.0],
        "lenient_accuracy": right / count, "format_rate": 0.5, "mean_length": 76.25,
        "reasons": {"correct": right, "no_answer": count - right}, "solved": solved, "examples": examples,
    }  # fmt: skip


def evaluated(*lines: Mapping[str, object]) -> list[Evaluated]:
    return [TypeAdapter(Evaluated).validate_python(one) for one in lines]


def by_cell(*lines: Mapping[str, object]) -> dict[str, dict[int, Evaluated]]:
    found: dict[str, dict[int, Evaluated]] = {}
    for one in evaluated(*lines):
        found.setdefault(one.cell, {})[one.step] = one
    return found


def account(*lines: Mapping[str, object], name: str = "first", steps: int = 4) -> Account:
    """A run with these evaluations, whose accuracy on dev is that on val."""
    own = {one["step"]: float(str(one["accuracy"])) for one in lines if one["cell"] == OWN}
    rows: list[dict[str, float]] = []
    for row in metrics(steps):
        row.pop("dev_accuracy", None)
        rows.append(row | ({"dev_accuracy": own[row["step"]]} if row["step"] in own else {}))
    return Account(name, rows, by_cell(*lines), settings=SETTINGS)


class Page(HTMLParser):
    """The elements of a page, in order, and its text; raises AssertionError where a tag is left open."""

    VOID = frozenset({"meta", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(autouse=True)
def equal_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes most of the time of a page: as many runs have the same figures, but in a browser."""
    if not request.node.get_closest_marker("browser"):
        monkeypatch.setattr(report, "_figures", lambda accounts, _: figures_of(len(accounts)))


@cache
def figures_of(runs: int) -> dict[str, Markup]:
    return DRAWN([account()] * runs, 1)


DRAWN = report._figures


def shown(*accounts: Account) -> Page:
    return Page(report.page(accounts, defaults=DEFAULTS))


# What it claims


@pytest.mark.parametrize(
    ("later", "verdict"),
    [
        (["111111"], "The model improved: 6 of 6 puzzles gained and 0 lost (exact McNemar p = 0.031)."),
        (
            ["111110"],
            "Not significant: 5 of 6 puzzles gained and 0 lost (exact McNemar p = 0.062).",
        ),
        ([], "Nothing has been evaluated after training yet."),
    ],
)
def test_the_verdict_claims_only_what_the_test_carries(later: list[str], verdict: str) -> None:
    told = account(line(0, "000000"), *(line(step, solved) for step, solved in enumerate(later, start=1)))
    assert verdict in shown(told).words


def test_a_model_that_lost_puzzles_got_worse() -> None:
    assert "The model got worse" not in shown(account(line(0, "1111110"), line(2, "0000001"))).text  # p = 0.125
    told = account(line(0, "11111111"), line(2, "00000000"))
    assert "The model got worse: 0 of 8 puzzles gained and 8 lost (exact McNemar p = 0.008)." in shown(told).words


def test_changes_are_counted_puzzle_by_puzzle() -> None:
    first, second = evaluated(line(0, "0011"), line(1, "0101"))
    assert change(first, second) == Change(gained=1, lost=1)
    assert Change(8, 2).p_value == 0.109375


def test_other_puzzles_are_not_compared() -> None:
    one = line(0, "0011")
    others = [line(1, "00111"), line(1, "0011", cell=OTHER), {**one, "puzzles": "another hash"}]
    assert [change(*evaluated(one, other)) for other in others] == [None] * 3


def test_the_best_step_is_the_one_that_was_kept() -> None:
    lines = [line(0, "0001"), line(2, "0111"), line(4, "0011")]
    assert account(*lines).best == 2
    assert account(*lines).milestones == [("start", 0), ("best", 2), ("last", 4)]
    assert account(*lines[:2]).milestones == [("start", 0), ("best and last", 2)]
    assert account(lines[0]).milestones == [("start", 0)]


def test_two_runs_are_compared_on_each_cell_that_both_know() -> None:
    first = [line(0, "0" * 8), line(2, "0" * 8), line(2, "0" * 8, cell=OTHER)]
    second = [line(0, "0" * 8), line(2, "1" * 8), line(2, "11000000", cell=OTHER)]
    page = shown(account(*first), account(*second, name="second"))
    assert "first → second" in page.words
    assert page.words.count("second is better") == page.words.count("not significant") == 1
    assert {"p = 0.016", "p = 0.500", "8 puzzles"} <= set(page.words)  # Holm: 2 / 256 times 2


def test_runs_on_other_puzzles_are_not_compared() -> None:
    page = shown(account(line(2, "0011")), account(line(2, "00111"), name="second"))
    assert "The runs have no common cell with the same puzzles." in page.words


def test_the_puzzles_that_chose_the_best_step_do_not_test_it() -> None:
    lines = [
        line(step, text, cell=cell)
        for cell in (OWN, "dev 3 one-shot")
        for step, text in ((0, "0000000"), (2, "1111111"))
    ]
    assert shown(account(*lines)).words.count("+7 −0") == 1
    assert "second is better" not in shown(account(*lines[2:]), account(*lines[2:], name="second")).words


# What it shows


def test_every_section_has_its_place() -> None:
    told = account(line(0, "0011"), line(2, "0111"), line(0, "0001", cell=OTHER), line(2, "0001", cell=OTHER))
    text = report.page([told], defaults=DEFAULTS)
    sections = ["Curves", "Accuracy, cell by cell", "Samples, before and after", "Failures by kind", "Health"]
    assert re.findall("<h2>(.*?)</h2>", text) == [*sections, "Configuration"]
    page = Page(text)
    assert {"50.0%", "75.0%", "no_answer", "76.2", OWN, OTHER, "+1 −0"} <= set(page.words)
    steps = SETTINGS["train.num_iterations"]
    assert f"builtin, trained on one-shot puzzles of 3 numbers: 4 of {steps} steps" in page.text
    assert "in 14 s." in page.text


def test_settings_that_differ_from_the_defaults_come_first() -> None:
    text = report.page([account()], defaults=DEFAULTS)
    first, rest = text.partition("<h2>Configuration</h2>")[2].split("<details>")
    first, rest = first.replace("<wbr>", ""), rest.replace("<wbr>", "")
    assert "train.learning_rate" in first and f"<code>{SETTINGS['train.learning_rate']}</code>" in first
    assert "loss.epsilon_high" not in first
    assert all(f"<code>{key}</code>" in rest for key in DEFAULTS)


def test_the_environment_is_told_from_each_step_on() -> None:
    told = Account(
        "first", settings=SETTINGS, environment={"from step 0": {"torch": "2.13"}, "from step 7": {"threads": 2}}
    )
    words = shown(told).words
    assert words[words.index("from step 0") :][:6] == ["from step 0", "from step 7", "torch", "2.13", "-", "threads"]


def examples(*pairs: tuple[str, str], cell: str = OWN) -> Account:
    """A run whose puzzles had these reasons at the start and at the best step."""
    lines = []
    for step in (0, 2):
        shown = [
            {
                "numbers": [2, 4, 6],
                "target": place,
                "completion": f"{place}@{step}",
                "reward": 0.1,
                "reason": pair[step // 2],
            }
            for place, pair in enumerate(pairs)
        ]
        lines.append(line(step, "0111" if step else "0011", cell=cell) | {"examples": shown})
    return account(*lines)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            [("correct", "correct"), ("no_answer", "correct"), ("correct", "no_answer"), ("no_answer", "no_answer")],
            "12",
        ),
        ([("correct", "correct"), ("no_answer", "wrong_value")], "1"),
        ([("correct", "correct")], ""),
    ],
)
def test_samples_are_of_puzzles_that_changed_not_of_those_solved_both_times(
    pairs: list[tuple[str, str]], expected: str
) -> None:
    words = shown(examples(*pairs)).words
    assert [word for word in words if re.fullmatch(r"\d@\d", word)] == [
        f"{place}@{step}" for place in expected for step in (0, 2)
    ]
    assert ("Samples, before and after" in words) is bool(expected)


def test_health_repeats_what_the_last_steps_warn_of() -> None:
    rows = [{"step": step, "truncated": 0.5, "cheat/numbers": step / 40} for step in range(1, 21)]
    words = shown(Account("first", rows, settings=SETTINGS)).words
    assert "completions that reach the target with numbers reused or left out" in words and "2.5%" in words
    assert any(word.startswith("50% of the completions reach the token limit") for word in words)


@pytest.mark.parametrize("rows", [[], metrics(0), metrics(1)], ids=["nothing", "start", "one step"])
def test_a_run_that_has_hardly_begun_has_a_page(rows: list[dict[str, float]]) -> None:
    page = shown(Account("first", rows, settings=SETTINGS))
    assert "Nothing has been evaluated after training yet." in page.words


# What it lets in


def test_the_page_asks_for_nothing_and_its_ids_are_its_own() -> None:
    page = shown(account(line(0, "0011"), line(2, "0111")), account(line(2, "0111"), name="second"))
    attributes = [(name, value or "") for _, given in page.elements for name, value in given.items()]
    links = [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action", "srcset")]
    assert links and all(link.startswith("#") for link in links)
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    (policy,) = [given["content"] for _, given in page.elements if given.get("http-equiv")]
    assert policy and policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def hostile() -> Account:
    lines = [
        line(step, solved, cell=cell, completion=HOSTILE)
        for cell in (OWN, HOSTILE)
        for step, solved in ((0, "0011"), (2, "0111"))
    ]
    for one in lines:
        one["reasons"] = {"correct": 2, HOSTILE: 2}
    rows = metrics(2)
    settings = {**SETTINGS, "model.model": HOSTILE}
    environment = {HOSTILE: {HOSTILE: HOSTILE}}
    return Account(HOSTILE, rows, by_cell(*lines), settings, environment)


def test_hostile_text_is_shown_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_figures", DRAWN)
    page = shown(hostile(), hostile())
    assert SHOWN in page.text
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert {name for _, given in page.elements for name in given if name.startswith("on")} == set()
    text = report.page([hostile()], defaults=DEFAULTS)
    assert {character for character in text if not character.isprintable()} == {"\n"}
    assert "\\u202e52" in text and "\\ud83d" in text and "\\x1b[2J" in text


# From a run's folder


def saved(root: Path, name: str, *, steps: int = 4) -> Run:
    run = Run.create(root, name)
    run.write_config(config.resolve(has_cuda=lambda: False).settings.model_dump())
    run.write_environment({"device": "cpu", "torch": "2.13"}, step=0)
    for row in metrics(steps):
        run.log(row)
    return run


def keep(run: Run, *lines: Mapping[str, object]) -> Path:
    path = run.path / "evaluations.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return path


def test_the_report_stands_beside_the_images(countdown: Command, tmp_path: Path) -> None:
    keep(saved(tmp_path / "runs", "first"), line(0, "00000000"), line(4, "11111111"))
    found = countdown("plot", "first", "--report")
    assert found.code == 0, found.err
    assert found.out.splitlines()[:3] == [
        "runs/first/training_curve.png",
        "runs/first/kl_divergence.png",
        "runs/first/report.html",
    ]
    page = Page((tmp_path / "runs/first/report.html").read_text())
    assert "The model improved" in page.text and "2.13" in page.words


def test_several_runs_share_a_page_and_files_have_none(countdown: Command, tmp_path: Path) -> None:
    for name in ("first", "second"):
        saved(tmp_path / "runs", name)
    found = countdown("plot", "first", "second", "--report", "--out", ".")
    assert found.code == 0, found.err
    assert {"first, second", "first", "second"} <= set(Page((tmp_path / "report.html").read_text()).words)
    refused = countdown("plot", "first", "runs/second/metrics.jsonl", "--report")
    assert refused.code == 2 and "leave out `--report`" in refused.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 1.5}, "{} has a wrong `accuracy`: Input should be less than or equal to 1"),
        ({"count": 3}, "{} has a `solved` without a character for each of `count` puzzles"),
        ({"solved": "01x1"}, "{} has a wrong `solved`: String should match pattern"),
        ({"examples": [{"numbers": "x"}]}, "{} has a wrong `examples.0.completion`: Field required"),
        ({"step": -1}, "{} is not an object with a `step`"),
    ],
)
def test_a_damaged_evaluation_is_one_sentence(
    countdown: Command, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = keep(saved(tmp_path / "runs", "first"), line(0, "0011"), {**line(4, "0111"), **change})
    found = countdown("plot", "first", "--report")
    assert found.code == 2
    assert found.err.startswith("error: " + message.format(f"line 2 of `{path.relative_to(tmp_path)}`"))
    assert not (tmp_path / "runs/first/report.html").exists()


@pytest.mark.parametrize("name", ["evaluations.jsonl", "environment.json"])
def test_a_file_that_is_not_json_is_one_sentence(countdown: Command, tmp_path: Path, name: str) -> None:
    run = saved(tmp_path / "runs", "first")
    (run.path / name).write_text("{\n{\n")
    found = countdown("plot", "first", "--report")
    assert found.code == 2
    assert re.match(r"error: .*`runs/first/" + re.escape(name) + "` is not valid JSON", found.err)


# In a real browser

WIDTHS = (320, 390, 768, 1280, 1920)
# Opens the report in a frame of each width, and writes what it finds in each as JSON into its own page.
HARNESS = """<!doctype html><pre id=result></pre><script>
const probe = async frame => {
  const [page, view] = [frame.contentDocument, frame.contentWindow];
  const script = page.createElement('script');
  script.textContent = 'window.owned = 4';
  const owned = view.owned ?? null;
  page.body.append(script);
  const load = source => new Promise(done => {
    const image = new view.Image();
    [image.onload, image.onerror] = [() => done(true), () => done(false)];
    image.src = source;
  });
  const style = view.getComputedStyle(page.body);
  return {
    width: view.innerWidth, scrolled: page.documentElement.scrollWidth,
    figures: page.querySelectorAll('figure svg').length,
    background: style.backgroundColor, display: style.display, images: page.images.length, owned,
    forced: view.owned ?? null,
    text: [...page.querySelectorAll('pre')].map(pre => pre.innerText).join(),
    remote: await load('/image.gif'), inline: await load('PIXEL'),
  };
};
const frames = WIDTHS.map(width => new Promise(done => {
  const frame = document.createElement('iframe');
  frame.style = `border: 0; height: 900px; width: ${width}px`;
  frame.onload = () => done(probe(frame));
  frame.src = 'report.html';
  document.body.append(frame);
}));
Promise.all(frames).then(all => { document.getElementById('result').textContent = JSON.stringify(all); });
</script>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
HARNESS = HARNESS.replace("PIXEL", PIXEL).replace("WIDTHS", str(list(WIDTHS)))


def chromium(*arguments: str) -> str:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "Chromium is not installed"
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of a local server of `tmp_path`, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path)

        def log_message(self, format: str, *args: object) -> None: ...

    (tmp_path / "harness.html").write_text(HARNESS)
    with ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=str(tmp_path))) as serving:
        Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://localhost:{serving.server_port}", asked
        serving.shutdown()


def suite(name: str) -> Account:
    """A run with six cells."""
    cells = [f"val {numbers} {style}" for numbers in (3, 4) for style in ("one-shot", "zero-shot", "natural")]
    solved = [(0, "0" * 300), (2, "01" * 150), (4, "001" * 100)]
    return account(*(line(step, marks, cell=cell) for step, marks in solved for cell in cells), name=name)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("scheme", "paper"), [(1, "rgb(255, 255, 255)"), (0, "rgb(21, 23, 26)")], ids=["light", "dark"]
)
def test_the_page_fits_any_window_and_a_hostile_run_does_nothing(
    server: tuple[str, list[str]], tmp_path: Path, scheme: int, paper: str
) -> None:
    """A page on two runs: one has as long a name as a run may have, the other is hostile."""
    page = report.page([suite("a-run-" + 58 * "x"), hostile()], defaults=DEFAULTS)
    (tmp_path / "report.html").write_text(page)
    address, asked = server
    dom = chromium(
        f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"{address}/harness.html",
    )
    result = re.search('<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert result and result[1], dom[:2000]
    frames = json.loads(html.unescape(result[1]))
    assert [frame["width"] for frame in frames] == list(WIDTHS)
    for frame in frames:
        assert frame["scrolled"] <= frame["width"]  # nothing scrolls sideways
        assert (frame["figures"], frame["images"]) == (2, 0)
        assert (frame["background"], frame["display"]) == (paper, "block")
        assert SHOWN in frame["text"]
        assert frame["owned"] is frame["forced"] is None  # neither its own scripts run nor those put into it
        assert (frame["remote"], frame["inline"]) == (False, True)
    assert set(asked) <= {"/harness.html", "/report.html", "/favicon.ico"}
