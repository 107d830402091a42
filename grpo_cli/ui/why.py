"""`countdown why`: a replayed step as sentences, a group, a completion; in a terminal, as JSON and as a page.

`explained` makes plain data of a replay, which `--json` prints; `sections` makes tables of it for terminal and page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from grpo_cli.core.files import write
from grpo_cli.ui.pages import render
from grpo_cli.ui.tables import facts, grid
from grpo_cli.ui.text import counted, out, percent, printable, thousandths

if TYPE_CHECKING:
    from grpo_cli.core.config.settings import Loss
    from grpo_cli.core.rl.explain import Fork
    from grpo_cli.core.rl.replay import Completion, Replay, ReplayedGroup

Row = Mapping[str, Any]

BEFORE_FORK = 6  # tokens shown before a fork
FLAT = 0.0005  # share of the gradient below which neighbouring tokens are shown as one row
TAIL = 4  # characters shown of the end of such a row
SUMMED = ("sampled", "reference", "after", "kl", "loss", "gradient_share")
# At ratio 1, in the first inner update, a token adds -A times its weight.
BY_SEQUENCE = ": at ratio 1 the advantages of a group sum to 0, so the policy loss is 0 whatever is learned"
BY_TOKEN = ": at ratio 1 it is the sum of -advantage * length, so better completions are {longer} here"
TEXTS = {"verdict", "branch", "continues", "samples", "token", "setting", "compared"}  # columns of text
STYLES = {"good": "green", "bad": "red", "": ""}
MEANINGS = {"grpo": BY_SEQUENCE, "gspo": BY_SEQUENCE, "dapo": BY_TOKEN, "dr_grpo": BY_TOKEN}


def explained(replay: Replay, run: str, *, prompt: int | None = None, sample: int | None = None) -> dict[str, Any]:
    """What `why` says of a step; `prompt` None picks the most instructive group, `sample` None no completion."""
    chosen = replay.instructive if prompt is None else prompt
    group = replay.groups[chosen]
    data = {
        "run": run,
        "step": replay.step,
        "start": replay.start,
        "last_step": replay.last_step,
        "difference": replay.gap,
        "logged": replay.logged,
        "replayed": replay.replayed,
        "loss": replay.total("loss"),
        "sentences": [_gradient_sentence(replay), _loss_sentence(replay), _change_sentence(replay)],
        "prompt": chosen,
        "problem": group.problem,
        "prompt_text": group.prompt,
        "completions": [_row(index, one, replay) for index, one in enumerate(group.completions)],
        "fork": _fork(group, replay),
        "losses": [{"name": one.name, "cosine": one.cosine, "norm": one.norm} for one in replay.variants],
    }
    if sample is not None:
        tokens = _tokens(group.completions[sample], replay)
        formula = _formula(replay, group.completions[sample], tokens)
        data |= {"sample": sample, "tokens": tokens, "formula": formula}
    return data


def _gradient_sentence(replay: Replay) -> str:
    """How many groups had a gradient."""
    mixed, count = sum(group.learns for group in replay.groups), len(replay.groups)
    has_kl = replay.loss.beta and replay.logged.get("kl") != 0  # the policy of step 1 is the reference
    pulls = ["the pull of the KL term"] * bool(has_kl) + ["the entropy bonus"] * bool(replay.loss.entropy_bonus)
    rest = f"there is only {' and '.join(pulls)}" if pulls else "nothing is learned"
    text = f"{mixed or 'None'} of {counted(count, 'group')} had unequal rewards"
    text += ", and so a gradient" if mixed else f": {rest}"
    text = f"{text}; from the others, {rest}." if 0 < mixed < count else f"{text}."
    if masked := sum(_masked(one, replay.loss) for one in replay.completions):
        text += f" {counted(masked, 'truncated completion')} of {len(replay.completions)} added nothing to the loss."
    return text


def _loss_sentence(replay: Replay) -> str:
    """What the loss is, and why."""
    if "loss" not in replay.replayed:
        return "The update was skipped: its loss or its gradient was not finite."
    loss, bonus, in_loss = replay.total("loss"), replay.total("bonus"), replay.loss.kl_in == "loss"
    kl = replay.loss.beta * replay.total("pull") if in_loss else 0.0
    parts = [f"the KL term is {kl:.3g}"] if replay.loss.beta and in_loss else []
    parts += [f"the entropy bonus is {-bonus:.3g}"] if bonus else []
    text = f"The loss is {loss:.3g}" + (f", of which {' and '.join(parts)}" if parts else "")
    gains = [one for one in replay.completions if one.advantage]
    plain = all(one.updates and {*one.mean("factor")} == {1.0} for one in gains)
    if replay.updates > 1:
        text += f"; it is the mean of {replay.updates} updates"
    elif plain and gains:
        policy = loss - kl + bonus
        text += MEANINGS.get(replay.loss.loss_type, "").format(
            longer="as long as worse ones" if abs(policy) < 1e-6 else "longer" if policy < 0 else "shorter"
        )
    norm = replay.replayed.get("grad_norm", 0.0)
    return f"{text}. The gradient's norm is {norm:.3g}" + (": that is what learns." if norm else ".")


def _change_sentence(replay: Replay) -> str:
    group = replay.groups[replay.instructive]
    if (parting := group.fork) is None:
        moved = any(one.updates for one in replay.completions)
        change = f"the step moved log-probabilities by {group.change:.2g}" if moved else "the weights stay as they were"
        return f"No group has better and worse completions; {change}."
    chances, piece = group.chances(parting), _piece(group, parting, parting.better.samples[0])
    before, after = chances["sampled"][0], chances["after"][0]
    return (
        f"In prompt {replay.instructive}, {group.problem}, better completions continue with {piece} after token"
        f" {parting.position}: its probability went from {before:.3f} to {after:.3f}."
    )


def _row(index: int, one: Completion, replay: Replay) -> dict[str, Any]:
    return {
        "sample": index,
        "reason": one.reason,
        "verdict": one.reason.replace("_", " ") + (", masked" if _masked(one, replay.loss) else ""),
        "reward": one.reward,
        "parts": one.parts,
        "advantage": one.advantage,
        "length": len(one.tokens),
        "truncated": one.truncated,
        "text": one.text,
        "gradient_share": math.fsum(replay.shares(one)),
        "loss": math.fsum(one.mean("loss")),
        "before": math.fsum(one.before),
        "after": math.fsum(one.after),
    }


def _fork(group: ReplayedGroup, replay: Replay) -> dict[str, Any] | None:
    """Where better and worse completions part, with the probabilities of both branches by stage."""
    if (parting := group.fork) is None:
        return None
    chances = group.chances(parting)
    stages = {"sampled": "when sampled", "after": "after the step", "last": f"step {replay.last_step}"}
    sides = {"better": (parting.better, 0), "worse": (parting.worse, 1)}
    shown = group.completions[parting.better.samples[0]]
    return {
        "token": parting.position,
        "before": "".join(shown.pieces[max(0, parting.position - BEFORE_FORK) : parting.position]),
        "stages": {stage: stages[stage] for stage in chances},
        **{
            name: {
                "continues": _piece(group, parting, branch.samples[0]),
                "samples": branch.samples,
                "endings": {str(one): _ending(group.completions[one], parting.position) for one in branch.samples},
                "probability": {stage: pair[side] for stage, pair in chances.items()},
            }
            for name, (branch, side) in sides.items()
        },
    }


def _piece(group: ReplayedGroup, parting: Fork, sample: int) -> str:
    pieces = group.completions[sample].pieces
    return repr(pieces[parting.position]) if parting.position < len(pieces) else "the end"


def _ending(one: Completion, position: int) -> str:
    """The text from a token on, without an end-of-sequence token."""
    pieces = one.pieces[position:]
    return "".join(pieces if pieces and one.text.endswith(pieces[-1]) else pieces[:-1])


def _tokens(one: Completion, replay: Replay) -> list[dict[str, Any]]:
    """Every token with its log-probabilities and its part of the loss; the ratio is that of the last update."""
    factors = one.mean("factor") if one.updates else [1.0] * len(one.tokens)
    kl, losses, shares = one.mean("kl"), one.mean("loss"), replay.shares(one)
    clipped, last = one.mean("clipped"), one.updates[-1] if one.updates else None
    return [
        {
            "token": piece,
            "sampled": one.sampled[index],
            "reference": one.reference[index] if one.reference else None,
            "after": one.after[index],
            "ratio": last.ratio[index] if last else 1.0,
            "clipped": clipped[index] > 0,
            "factor": factors[index],
            "kl": kl[index],
            "loss": losses[index],
            "gradient_share": shares[index],
        }
        for index, piece in enumerate(one.pieces)
    ]


def folded(tokens: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens as rows to show: runs of tokens without a share of the gradient are one row, with their sums."""
    rows = []
    for is_flat, run in groupby(enumerate(tokens), key=lambda pair: pair[1]["gradient_share"] < FLAT):
        numbers, own = zip(*run, strict=True)
        if not is_flat or len(own) == 1:
            rows += [{**token, "place": str(number)} for number, token in zip(numbers, own, strict=True)]
            continue
        text = "".join(token["token"] for token in own)
        rows.append(
            {
                "place": f"{numbers[0]}-{numbers[-1]}",
                "token": text if len(text) <= 2 * TAIL else f"…{text[-TAIL:]}",
                "ratio": math.prod(token["ratio"] for token in own),
                "clipped": any(token["clipped"] for token in own),
                "factor": fmean(token["factor"] for token in own),
                **{key: sum(token[key] or 0.0 for token in own) for key in SUMMED},
                **({"reference": None} if own[0]["reference"] is None else {}),
            }
        )
    return rows


def _formula(replay: Replay, one: Completion, tokens: Sequence[Row]) -> list[str]:
    """The loss with the numbers of this completion's token of most gradient, up to the sum that is the step's loss."""
    loss, weighted = replay.loss, any(token["factor"] != 1 for token in tokens)
    ratio = f"min(ratio, {loss.dual_clip:g})" if loss.dual_clip else "ratio"
    is_cispo, has_kl = loss.loss_type == "cispo", bool(loss.beta) and loss.kl_in == "loss"
    policy = "-min(ratio, 1 + epsilon_high) * A * logprob" if is_cispo else f"-min({ratio} * A, clip(ratio) * A)"
    term = f"factor * {policy}" if weighted else policy
    term = f"({term} + {loss.beta:g} * kl)" if has_kl else term
    lines = [f"a token adds weight * {term}{' - bonus' * bool(loss.entropy_bonus)}; `{loss.loss_type}` sets the weight"]
    if weighted:
        corrected = (
            f"the trainer's probability over the sampler's, cap {loss.sampler_cap:g} (`{loss.sampler_correction}`)"
        )
        chosen = f"0 but for the {loss.entropy_share:.0%} of the step's tokens with most entropy"
        reasons = [corrected] * (loss.sampler_correction != "none") + [chosen] * (loss.entropy_share < 1)
        lines.append(f"factor: {', times '.join(reasons)}")
    if loss.entropy_bonus:
        lines.append(f"bonus: {loss.entropy_bonus:g} * entropy / number of tokens that learn")
    largest = max(range(len(tokens)), key=lambda index: float(tokens[index]["gradient_share"]))
    shown = {"ratio": 1, "policy": 1, "factor": weighted, "kl": has_kl, "weight": 1, "bonus": loss.entropy_bonus}
    for number, update in enumerate(one.updates, start=1):
        place = f"token {largest}" + (f" in inner update {number}" if len(one.updates) > 1 else "")
        values = ", ".join(f"{name} {getattr(update, name)[largest] + 0.0:.5g}" for name in shown if shown[name])
        lines.append(f"{place}: A {one.advantage:.5g}, {values}: {update.loss[largest]:.6g}")
    means = f" on average over {len(one.updates)} inner updates" if len(one.updates) > 1 else ""
    why = "" if one.updates else ": truncated completions are masked" if _masked(one, loss) else ": its advantage is 0"
    own = f"its {counted(len(one.tokens), 'token')} add {math.fsum(one.mean('loss')):.9g}{means}{why}"
    lines.append(f"{own}; all completions of the step add {replay.total('loss'):.9g}")
    return [*lines, f"logged loss: {replay.logged['loss']:.9g}"] if "loss" in replay.logged else lines


def _masked(one: Completion, loss: Loss) -> bool:
    return one.truncated and loss.mask_truncated


# Tables of the terminal and the page


@dataclass(frozen=True)
class Section:
    """A table, whose rows have a style (`good`, `bad` or none) and their cells; and lines below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    lines: Sequence[str] = ()


def sections(data: Row) -> list[Section]:
    """The tables of what `explained` returned."""
    shown = [_samples(data)]
    shown += [_branches(data["fork"])] if data["fork"] else []
    shown += [_token_table(data)] if "tokens" in data else []
    return shown + ([_loss_table(data["losses"])] if data["losses"] else [])


def _samples(data: Row) -> Section:
    columns = ("sample", "reward", "advantage", "length", "log-prob", "change", "gradient", "verdict")
    rows = []
    for row in data["completions"]:
        rewards = [f"{row['reward']:.2f}", f"{row['advantage']:+.3f}", str(row["length"])]
        logprobs = [f"{row['before']:.2f}", f"{row['after'] - row['before']:+.3f}", percent(row["gradient_share"])]
        style = "good" if row["reason"] == "correct" else "bad"
        rows.append((style, [str(row["sample"]), *rewards, *logprobs, row["verdict"]]))
    return Section(f"prompt {data['prompt']}: {data['problem']}", columns, rows)


def _branches(fork: Row) -> Section:
    rows = []
    for side, style in (("better", "good"), ("worse", "bad")):
        branch = fork[side]
        chances = [f"{branch['probability'][stage]:.3f}" for stage in fork["stages"]]
        rows.append((style, [side, branch["continues"], *chances, ", ".join(map(str, branch["samples"]))]))
    columns = ("branch", "continues", *fork["stages"].values(), "samples")
    return Section(f"fork after token {fork['token']}: … {fork['before']!r}", columns, rows)


def _token_table(data: Row) -> Section:
    tokens = folded(data["tokens"])
    has_reference = tokens[0]["reference"] is not None
    has_factor = any(token["factor"] != 1 for token in tokens)
    rows = []
    for token in tokens:
        cells = {"": token["place"], "token": repr(token["token"]), "sampled": thousandths(token["sampled"])}
        cells |= {"ref": thousandths(token["reference"])} if has_reference else {}
        cells |= {"after": thousandths(token["after"]), "ratio": thousandths(token["ratio"]) + "*" * token["clipped"]}
        cells |= {"factor": thousandths(token["factor"])} if has_factor else {}
        cells |= {"kl": f"{round(token['kl'], 4) + 0.0:.4f}"} if has_reference else {}
        cells |= {"loss": f"{token['loss']:.2e}", "gradient": percent(token["gradient_share"])}
        rows.append(("", [*cells.values()]))
    clipped = ["*: clipped"] if any(token["clipped"] for token in tokens) else []
    title = f"sample {data['sample']}, token by token"
    return Section(title, [*cells], rows, [*clipped, *data["formula"]])


def _loss_table(losses: Sequence[Row]) -> Section:
    def compared(row: Row) -> str:
        if row is losses[0] or row["cosine"] <= 0.9999:
            return ""
        equal = math.isclose(row["norm"], losses[0]["norm"], rel_tol=1e-4)
        return "no difference" if equal else "only its length differs"

    rows = [("", [row["name"], f"{row['cosine']:.4f}", f"{row['norm']:.3g}", compared(row)]) for row in losses]
    title = "the gradient of this batch under other losses"
    return Section(title, ("setting", "cosine", "norm", "compared"), rows)


def show(data: Row) -> None:
    """Print what `explained` returned."""
    out.print(Text(_title(data), style="bold"))
    for number, sentence in enumerate(data["sentences"], 1):
        out.print(Padding(Text(f"{number}. {printable(sentence)}"), (0, 0, 0, 2)))
    for section in sections(data):
        out.print()
        out.print(Text(printable(section.title), style="bold"))
        rows = [[Text(printable(cell), STYLES[style]) for cell in cells] for style, cells in section.rows]
        out.print(grid(*section.columns, numeric=set(section.columns) - TEXTS, rows=rows))
        for line in section.lines:
            out.print(Padding(Text(printable(line)), (0, 0, 0, 2)))


def write_page(data: Row, path: Path) -> None:
    """Write one self-contained page."""
    html = render("why.html.j2", data=data, title=_title(data), sections=sections(data), texts=TEXTS)
    write(path, html.encode("utf-8"))


def _title(data: Row) -> str:
    start = f"the checkpoint of step {data['start']}" if data["start"] else "the starting model"
    gap = data["difference"]
    equal = "equal to the log bit for bit" if gap == 0 else f"within {gap:.1e} of the logged metrics"
    return f"step {data['step']} of run {printable(data['run'])}, replayed from {start}: {equal}"


def diagnosis(findings: Sequence[Mapping[str, str]], run: str) -> None:
    """Print what the metrics of a run say, each finding with its page."""
    out.print(Text(f"run {printable(run)}", style="bold"))
    out.print(facts((one["name"], f"{one['text']} ({one['page']})") for one in findings))
