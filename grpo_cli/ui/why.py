"""`countdown why`: a replayed step as sentences, a group, a completion; in a terminal, as JSON and as a page.

`explained` makes plain data of a replay, which the terminal and the page show and `--json` prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    from grpo_cli.core.rl.explain import Fork, Terms
    from grpo_cli.core.rl.replay import Completion, Replay, ReplayedGroup

BEFORE_FORK = 6  # tokens shown before a fork
FLAT = 0.0005  # share of the gradient below which neighbouring tokens are shown as one row
TAIL = 4  # characters shown of the end of such a row
SUMMED = ("sampled", "reference", "after", "kl", "loss", "gradient_share")
# At ratio 1, in the first inner update, a token adds -A times its weight.
BY_SEQUENCE = ": at ratio 1 the advantages of a group sum to 0, so the policy loss is 0 whatever is learned"
BY_TOKEN = ": at ratio 1 it is the sum of -advantage * length, so better completions are {longer} here"
MEANINGS = {"grpo": BY_SEQUENCE, "gspo": BY_SEQUENCE, "dapo": BY_TOKEN, "dr_grpo": BY_TOKEN}
VERDICTS = {"correct": "green", "truncated": "yellow"}


def explained(replay: Replay, run: str, *, prompt: int | None = None, sample: int | None = None) -> dict[str, Any]:
    """What `why` says of a step; `prompt` None picks the most instructive group, `sample` None no completion."""
    chosen = replay.instructive if prompt is None else prompt
    updates, group = replay.terms(), replay.groups[chosen]
    first = sum(len(one.completions) for one in replay.groups[:chosen])
    data = {
        "run": run,
        "step": replay.step,
        "start": replay.start,
        "last_step": replay.last_step,
        "difference": replay.gap,
        "logged": replay.logged,
        "replayed": replay.replayed,
        "loss": fmean(update.loss for update in updates),
        "sentences": sentences(replay, updates),
        "prompt": chosen,
        "problem": group.problem,
        "prompt_text": group.prompt,
        "completions": [_row(index, one, updates, first + index) for index, one in enumerate(group.completions)],
        "fork": _fork(group),
        "losses": [{"name": one.name, "cosine": one.cosine, "norm": one.norm} for one in replay.variants],
    }
    if sample is not None:
        data["sample"] = sample
        data["tokens"] = _tokens(group.completions[sample], updates, first + sample)
        data["formula"] = _formula(replay, group.completions[sample], updates, first + sample)
    return data


def sentences(replay: Replay, updates: Sequence[Terms]) -> list[str]:
    """The step in three sentences: what had a gradient, what the loss is, what changed most."""
    return [_gradient_sentence(replay), _loss_sentence(replay, updates), _change_sentence(replay)]


def _gradient_sentence(replay: Replay) -> str:
    mixed, count = sum(any(one.advantage for one in group.completions) for group in replay.groups), len(replay.groups)
    pulls = replay.loss.beta and replay.logged.get("kl") != 0  # the policy of step 1 is the reference
    rest = "there is only the pull of the KL term" if pulls else "nothing is learned"
    text = f"{mixed or 'None'} of {counted(count, 'group')} had unequal rewards"
    text += ", and so a gradient" if mixed else f": {rest}"
    return f"{text}; from the others, {rest}." if 0 < mixed < count else f"{text}."


def _loss_sentence(replay: Replay, updates: Sequence[Terms]) -> str:
    loss, beta = fmean(update.loss for update in updates), replay.loss.beta
    kl = beta * fmean(float((update.kl * update.weight).double().sum()) for update in updates)
    text = f"The loss is {loss:.3g}" + (f", of which the KL term is {kl:.3g}" if beta else "")
    if len(updates) == 1 and any(one.advantage for one in replay.completions):
        text += MEANINGS.get(replay.loss.loss_type, "").format(
            longer="as long as worse ones" if abs(loss - kl) < 1e-6 else "longer" if loss < kl else "shorter"
        )
    norm = replay.replayed.get("grad_norm", 0.0)
    return f"{text}. The gradient's norm is {norm:.3g}" + (": that is what learns." if norm else ".")


def _change_sentence(replay: Replay) -> str:
    group = replay.groups[replay.instructive]
    if (parting := group.fork) is None:
        return f"No group has better and worse completions; the step moved log-probabilities by {group.change:.2g}."
    chances, piece = group.chances(parting), _piece(group, parting, parting.better.samples[0])
    before, after = chances["sampled"][0], chances["after"][0]
    return (
        f"In prompt {replay.instructive}, {group.problem}, better completions continue with {piece} after token"
        f" {parting.position}: its probability went from {before:.3f} to {after:.3f}."
    )


def _row(index: int, one: Completion, updates: Sequence[Terms], row: int) -> dict[str, Any]:
    return {
        "sample": index,
        "reason": one.reason,
        "verdict": one.reason.replace("_", " "),
        "reward": one.reward,
        "parts": one.parts,
        "advantage": one.advantage,
        "length": len(one.tokens),
        "truncated": one.truncated,
        "text": one.text,
        "gradient_share": fmean(float(update.share[row].sum()) for update in updates),
        "loss": fmean(float(update.contribution[row].double().sum()) for update in updates),
        "before": math.fsum(one.updates[0]),
        "after": math.fsum(one.after),
    }


def _fork(group: ReplayedGroup) -> dict[str, Any] | None:
    """Where better and worse completions part, with the probabilities of both branches by stage."""
    if (parting := group.fork) is None:
        return None
    chances = group.chances(parting)
    sides = {"better": (parting.better, 0), "worse": (parting.worse, 1)}
    shown = group.completions[parting.better.samples[0]]
    return {
        "token": parting.position,
        "before": "".join(shown.pieces[max(0, parting.position - BEFORE_FORK) : parting.position]),
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


def _tokens(one: Completion, updates: Sequence[Terms], row: int) -> list[dict[str, Any]]:
    """Every token with its log-probabilities and its part of the loss; the terms are those of the last update."""
    terms = updates[-1]
    return [
        {
            "token": piece,
            "sampled": one.sampled[index],
            "reference": one.reference[index] if one.reference else None,
            "after": one.after[index],
            "ratio": float(terms.ratio[row, index]),
            "clipped": bool(terms.clipped[row, index]),
            "kl": float(terms.kl[row, index]),
            "loss": fmean(float(update.contribution[row, index]) for update in updates),
            "gradient_share": fmean(float(update.share[row, index]) for update in updates),
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
                **{key: sum(token[key] or 0.0 for token in own) for key in SUMMED},
                **({"reference": None} if own[0]["reference"] is None else {}),
            }
        )
    return rows


def _formula(replay: Replay, one: Completion, updates: Sequence[Terms], row: int) -> list[str]:
    """The loss with this completion's numbers, up to the sum that is the step's loss."""
    terms, loss = updates[-1], replay.loss
    ratio, weight, kl = (float(values[row, 0]) for values in (terms.ratio, terms.weight, terms.kl))
    own = fmean(float(update.contribution[row].double().sum()) for update in updates)
    whole = fmean(update.loss for update in updates)
    policy = "-min(ratio * A, clip(ratio) * A)"
    if loss.loss_type == "cispo":
        policy = "-min(ratio, 1 + epsilon_high) * A * logprob"
    term, value = policy, f"ratio {ratio:.4f}, A {one.advantage:.4f}, weight {weight:.3g}"
    if loss.beta:
        term, value = f"({policy} + beta * kl)", f"{value}, beta {loss.beta:g}, kl {kl:.3g}"
    lines = [
        f"a token adds weight * {term}; `{loss.loss_type}` sets the weight",
        f"its first token: {value}: {float(terms.contribution[row, 0]):.6g}",
        f"its {counted(len(one.tokens), 'token')} add {own:.9g}; all completions of the step add {whole:.9g}",
    ]
    if "loss" in replay.logged:
        lines.append(f"logged loss: {replay.logged['loss']:.9g}")
    return lines


# Terminal


def show(data: Mapping[str, Any]) -> None:
    """Print what `explained` returned."""
    out.print(Text(_title(data), style="bold"))
    for number, sentence in enumerate(data["sentences"], 1):
        out.print(Padding(Text(f"{number}. {printable(sentence)}"), (0, 0, 0, 2)))
    out.print()
    out.print(Text(f"prompt {data['prompt']}: {printable(data['problem'])}", style="bold"))
    columns = ("sample", "reward", "advantage", "length", "log-prob", "change", "gradient")
    table = grid(*columns, "verdict", numeric=columns)
    for row in data["completions"]:
        style = VERDICTS.get(row["reason"], "red")
        table.add_row(
            str(row["sample"]),
            f"{row['reward']:.2f}",
            f"{row['advantage']:+.3f}",
            str(row["length"]),
            f"{row['before']:.2f}",
            f"{row['after'] - row['before']:+.3f}",
            percent(row["gradient_share"]),
            Text(printable(row["verdict"]), style=style),
        )
    out.print(table)
    _show_fork(data)
    if "tokens" in data:
        _show_tokens(data)
    if data["losses"]:
        _show_losses(data["losses"])


def _title(data: Mapping[str, Any]) -> str:
    start = f"the checkpoint of step {data['start']}" if data["start"] else "the starting model"
    gap = data["difference"]
    equal = "equal to the log bit for bit" if gap == 0 else f"within {gap:.1e} of the logged metrics"
    return f"step {data['step']} of run {printable(data['run'])}, replayed from {start}: {equal}"


def stages(data: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a fork's probabilities."""
    return {"sampled": "when sampled", "after": "after the step", "last": f"step {data['last_step']}"}


def _show_fork(data: Mapping[str, Any]) -> None:
    if not (fork := data["fork"]):
        return
    out.print()
    out.print(Text(f"fork after token {fork['token']}: … {printable(repr(fork['before']))}", style="bold"))
    names = stages(data)
    shown = list(fork["better"]["probability"])
    table = grid("branch", "continues", *[names[stage] for stage in shown], "samples", numeric=names.values())
    for side, style in (("better", "green"), ("worse", "red")):
        branch = fork[side]
        chances = [f"{branch['probability'][stage]:.3f}" for stage in shown]
        samples = ", ".join(map(str, branch["samples"]))
        table.add_row(Text(side, style=style), printable(branch["continues"]), *chances, samples)
    out.print(table)


def _show_tokens(data: Mapping[str, Any]) -> None:
    out.print()
    out.print(Text(f"sample {data['sample']}, token by token", style="bold"))
    rows, chance = folded(data["tokens"]), thousandths
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda token: token["place"],
        "token": lambda token: printable(repr(token["token"])),
        "sampled": lambda token: chance(token["sampled"]),
        "ref": lambda token: chance(token["reference"]),
        "after": lambda token: chance(token["after"]),
        "ratio": lambda token: chance(token["ratio"]),
        "clip": lambda token: "yes" if token["clipped"] else "",
        "kl": lambda token: f"{token['kl']:.4f}",
        "loss": lambda token: f"{token['loss']:.2e}",
        "gradient": lambda token: percent(token["gradient_share"]),
    }
    hidden = {"ref", "kl"} if rows[0]["reference"] is None else set()
    hidden |= set() if any(token["clipped"] for token in rows) else {"clip"}
    columns = [name for name in cells if name not in hidden]
    table = grid(*columns, numeric=[name for name in columns if name != "token"])
    for token in rows:
        table.add_row(*(cells[name](token) for name in columns))
    out.print(table)
    for line in data["formula"]:
        out.print(Padding(Text(printable(line)), (0, 0, 0, 2)))


def _show_losses(losses: Sequence[Mapping[str, Any]]) -> None:
    out.print()
    out.print(Text("the gradient of this batch under other losses", style="bold"))
    table = grid("setting", "cosine", "norm", "", numeric=("cosine", "norm"))
    own = losses[0]
    for row in losses:
        same = math.isclose(row["norm"], own["norm"], rel_tol=1e-4) and row["cosine"] > 0.9999
        scaled = row["cosine"] > 0.9999
        said = "" if row is own else "no difference" if same else "only its length differs" if scaled else ""
        table.add_row(row["name"], f"{row['cosine']:.4f}", f"{row['norm']:.3g}", said)
    out.print(table)


def diagnosis(findings: Sequence[Mapping[str, str]], run: str) -> None:
    """Print what the metrics of a run say, each finding with its page."""
    out.print(Text(f"run {printable(run)}", style="bold"))
    out.print(facts([(printable(one["name"]), f"{printable(one['text'])} ({one['page']})") for one in findings]))


# Page


def write_page(data: Mapping[str, Any], path: Path) -> None:
    """Write one self-contained page."""
    tokens = folded(data["tokens"]) if "tokens" in data else []
    html = render("why.html.j2", data=data, title=_title(data), stages=stages(data), tokens=tokens)
    write(path, html.encode("utf-8"))
