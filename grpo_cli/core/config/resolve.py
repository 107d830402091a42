"""Resolve the value of every setting and its source. Layers, weakest first:

shipped file, chosen preset as shipped, user's file, user's tables for that preset, environment, flags. The caller
passes environment and flags; `settings` declares which values are valid.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

import tomli
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from grpo_cli.core.config.names import nearest
from grpo_cli.core.config.settings import FIELDS, NEEDS, TABLES, Settings, expected, fixed, in_one_line, values
from grpo_cli.core.errors import CountdownError

_PACKAGE = Path(__file__).parents[2]
SHIPPED = next(path for path in (_PACKAGE / "config.toml", _PACKAGE.parent / "config.toml") if path.exists())
_PREFIX = "COUNTDOWN_"
_LARGEST = 2**20  # bytes of a settings file
_SCHEDULES = "a schedule is one of them, a mixture (`3 = 0.5, 4 = 0.5`), or a fade (`3 -> 4 over 20 steps`)"


@dataclass(frozen=True)
class Resolved:
    """Settings, the source of each (`train.batch_size` -> `flag --batch-size`), and why this preset was chosen."""

    settings: Settings
    sources: Mapping[str, str]
    preset_reason: str


def flag(key: str) -> str:
    """`train.batch_size` -> `--batch-size`."""
    return "--break" if key == "train.broken" else "--" + key.rpartition(".")[2].replace("_", "-")


def as_option(key: str, value: object) -> str:
    """A setting as a word of a command line: `--batch-size=8`, `--no-shard`."""
    if isinstance(value, bool):
        return flag(key) if value else flag(key).replace("--", "--no-", 1)
    if isinstance(value, dict):
        value = in_one_line(value)
    return f"{flag(key)}={value}"


def variable(key: str) -> str:
    """`train.batch_size` -> `COUNTDOWN_TRAIN_BATCH_SIZE`."""
    return f"{_PREFIX}{key.replace('.', '_').upper()}"


def defaults() -> dict[str, object]:
    """Every setting with its value in the shipped `config.toml`, before any preset."""
    shipped = _shipped().settings
    return {key: shipped[key].value for key in FIELDS}


def shipped_presets() -> frozenset[str]:
    """The names of the presets in the shipped `config.toml`."""
    return frozenset(_shipped().presets)


def presets(config_file: Path | None = None) -> frozenset[str]:
    """The names of the shipped presets and of those in the user's file (see `resolve`)."""
    return shipped_presets() | _user(config_file).presets.keys()


def resolve(
    *,
    flags: Mapping[str, object] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
    config_file: Path | None = None,
    has_cuda: Callable[[], bool] = lambda: False,
) -> Resolved:
    """Settings from all layers; the user's files override the shipped one.

    The user's file is `config_file`, or `config.toml` in the working directory if it exists. `flags` is keyed
    `train.batch_size`; text values are converted to the setting's type. `has_cuda` selects the preset for `auto`.
    Raises CountdownError with the place of a wrong value or name in any layer, even if a stronger layer overrides it.
    """
    shipped, user = _shipped(), _user(config_file)
    for preset in (*shipped.presets.values(), *user.presets.values()):
        _validate(shipped.settings | preset)
    _validate(shipped.settings | user.settings)
    outside = (_environment(environ), _flags(flags))
    general = shipped.settings | user.settings | outside[0] | outside[1]
    chosen, reason = _choose(general["preset"], {*shipped.presets, *user.presets}, has_cuda)
    _require_used(user, chosen, shipped.presets)
    layer = shipped.settings | shipped.presets.get(chosen, {}) | user.settings | user.presets.get(chosen, {})
    for stronger in outside:
        _validate(layer := layer | stronger)
    return _resolved(layer | {"preset": replace(general["preset"], value=chosen)}, reason)


def _require_used(user: "_File", chosen: str, shipped: Collection[str]) -> None:
    """Refuse a user's preset that is not chosen, not shipped, and names no model: a misspelled name."""
    for name, layer in user.presets.items():
        if name != chosen and name not in shipped and "model.model" not in layer:
            close = get_close_matches(name, shipped, n=1)
            place = next(iter(layer.values())).place if layer else f"`preset.{name}`"
            raise CountdownError(
                f"{place} changes nothing: `{name}` is not a shipped preset and names no model",
                f"did you mean `{close[0]}`?" if close else f"choose it with `--preset {name}`",
            )


def restore(saved: Mapping[str, object], path: Path, *, flags: Mapping[str, object] = MappingProxyType({})) -> Resolved:
    """A run's settings, as `Settings.model_dump` wrote them to `path`, overridden by `flags`.

    The preset is saved too, so a flag cannot change it.
    """
    if "preset" in flags:
        raise CountdownError("a resumed run keeps its preset", "start a new run to use another preset")
    layer = _shipped().settings | _sections(saved, str(path)).settings
    _validate(layer)
    if missing := [table for table in ("task", "model", "train") if table not in saved]:
        names = ", ".join(f"`{table}`" for table in missing)
        raise CountdownError(f"`{path}` has no settings of {names}", "restore it, or choose another run")
    return _resolved(layer | _flags(flags), f"saved in {path}")


def resume_settings(saved: Mapping[str, object], path: Path, *, flags: Mapping[str, object]) -> Resolved:
    """The settings of a resumed run; `flags` may change only those that keep its curve comparable.

    Raises CountdownError with the other changes.
    """
    before, resolved = fixed(restore(saved, path).settings), restore(saved, path, flags=flags)
    after = fixed(resolved.settings)
    changed = [f"{key} from {before[key]} to {after[key]}" for key in before if before[key] != after[key]]
    if changed:
        raise CountdownError(
            f"a resumed run cannot change {', '.join(changed)}", "start a new run to train with other settings"
        )
    return resolved


@dataclass(frozen=True)
class _Value:
    value: object
    source: str  # as shown in the table of settings
    place: str  # as shown in error messages


_Layer = dict[str, _Value]


@dataclass(frozen=True)
class _File:
    settings: _Layer
    presets: dict[str, _Layer]


def _shipped() -> _File:
    file = _sections(read_toml(SHIPPED), SHIPPED.name)
    missing = FIELDS.keys() - file.settings.keys()
    if missing:
        raise CountdownError(
            f"`{SHIPPED}` has no `{min(missing)}`", "restore the line: the file must have every default"
        )
    return file


def _user(config_file: Path | None) -> _File:
    path = config_file or Path(SHIPPED.name)
    if config_file is None and (not os.path.lexists(path) or (path.exists() and path.samefile(SHIPPED))):
        return _File({}, {})
    return _sections(read_toml(path), os.path.join(path.parent, path.name))  # "./config.toml" is not the shipped one


def read_toml(path: Path) -> dict[str, object]:
    """The content of a settings file; raises CountdownError naming it."""
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # reading would block until a writer opens it
            raise CountdownError(f"`{path}` is not a regular file", "name a settings file")
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise CountdownError(f"`{path}` is too large for a settings file")
        return tomli.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise CountdownError(f"cannot read `{path}`: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CountdownError(f"`{path}` is not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except RecursionError:
        raise CountdownError(f"`{path}` is nested too deeply") from None
    except ValueError as error:
        raise CountdownError(f"`{path}` is not valid TOML: {error}") from None


def read_settings(tables: Mapping[str, object], label: str, prefix: str = "") -> dict[str, object]:
    """The settings in the tables of the file `label`, by key (`train.batch_size`); raises CountdownError for others."""
    file = _sections(tables, label, prefix)
    others = [item.place for key, item in file.settings.items() if key not in FIELDS]
    others += [f"`{prefix}preset.{name}` in `{label}`" for name in file.presets]
    if others:
        raise CountdownError(f"{others[0]} cannot be set here", "define suites and presets in `config.toml`")
    return {key: item.value for key, item in file.settings.items()}


def _sections(document: Mapping[str, object], label: str, prefix: str = "") -> _File:
    """Split a file into its general settings and its presets.

    TOML cannot hold `preset = "x"` beside `[preset.x]`, so a file with presets writes the choice as `preset.name`.
    """
    preset = document.get("preset", {})
    if isinstance(preset, str):
        preset = {"name": preset}
    if not isinstance(preset, dict):
        raise CountdownError(f"`preset` in `{label}` must be a table or the name of a preset")
    settings = _layer({name: value for name, value in document.items() if name != "preset"}, label, label, prefix)
    presets = {}
    for name, content in preset.items():
        if name == "name":
            settings["preset"] = _Value(content, label, f"`{prefix}preset.name` in `{label}`")
        elif isinstance(content, dict):
            source = f"preset {name}" if label == SHIPPED.name else f"preset {name} in {label}"
            presets[name] = _layer(content, label, source, f"{prefix}preset.{name}.")
        else:
            raise _unknown(f"`preset.{name}` in `{label}`", f"preset.{name}", ["preset.name"])
    return _File(settings, presets)


def _layer(tables: Mapping[str, object], label: str, source: str, prefix: str = "") -> _Layer:
    values: dict[str, object] = {}
    for name, content in tables.items():
        if name not in TABLES and name != "suite":
            values[name] = content
        elif isinstance(content, dict):
            values |= {f"{name}.{key}": value for key, value in content.items()}
        else:
            raise CountdownError(f"`{prefix}{name}` in `{label}` must be a table")
    for key in values:
        if key == "preset" or (key not in FIELDS and not key.startswith("suite.")):
            raise _unknown(f"`{prefix}{key}` in `{label}`", key, [*FIELDS, *([] if "." in key else TABLES)])
    return {key: _Value(value, source, f"`{prefix}{key}` in `{label}`") for key, value in values.items()}


def _environment(environ: Mapping[str, str]) -> _Layer:
    keys = {variable(key): key for key in FIELDS}
    given = {name: text for name, text in environ.items() if name.startswith(_PREFIX)}
    for name in given:
        if name not in keys:
            bare = name.removeprefix(_PREFIX).lower()
            tables = [table for table in TABLES if bare.startswith(f"{table}_")]
            key = f"{tables[0]}.{bare.removeprefix(f'{tables[0]}_')}" if tables else bare
            raise _unknown(f"`{name}` in the environment", key, keys.values(), shown=variable)
    return {keys[name]: _Value(typed(keys[name], text), name, f"`{name}`") for name, text in given.items()}


def _flags(flags: Mapping[str, object]) -> _Layer:
    return {key: _Value(typed(key, value), f"flag {flag(key)}", f"`{flag(key)}`") for key, value in flags.items()}


def typed(key: str, value: object) -> object:
    """Text converted to the setting's type; text that cannot be converted is left for validation to refuse."""
    kind = FIELDS[key].annotation
    if not isinstance(value, str):
        return value
    try:
        if kind is int:
            return int(value)
        if kind is float:
            return float(value)
    except ValueError:
        return value
    return {"true": True, "false": False}.get(value.lower(), value) if kind is bool else value


def _choose(asked: _Value, presets: Collection[str], has_cuda: Callable[[], bool]) -> tuple[str, str]:
    if asked.value == "auto":
        return ("qwen2.5-1.5b", "a CUDA device was found") if has_cuda() else ("builtin", "no CUDA device was found")
    if asked.value not in presets:
        known = ", ".join(f"`{name}`" for name in ("auto", *sorted(presets)))
        raise CountdownError(f"{asked.place} is not a preset: {_shown(asked.value)}", f"presets are {known}")
    return str(asked.value), f"chosen by {asked.source}"


def _validate(layer: _Layer) -> Settings:
    top = {key: item.value for key, item in layer.items() if "." not in key}
    tables = {name: {key: layer[f"{name}.{key}"].value for key in TABLES[name].model_fields} for name in TABLES}
    suites = {key.partition(".")[2]: item.value for key, item in layer.items() if key.startswith("suite.")}
    try:
        settings = Settings.model_validate(top | tables | {"suite": suites})
    except ValidationError as error:
        raise _refused(layer, error.errors()[0]) from None
    suite = layer["train.eval_suite"]
    if suite.value != "none":
        require_suite(settings, str(suite.value), suite.place)
    return settings


def require_suite(settings: Settings, name: str, place: str) -> None:
    """Raise CountdownError unless `settings` have the suite that `place` names."""
    if name not in settings.suite:
        close = [f"did you mean `{suite}`?" for suite in get_close_matches(name, settings.suite, n=1)]
        known = ", ".join(f"`{suite}`" for suite in settings.suite)
        hint = " ".join([*close, f"suites are {known}; add one as [suite.NAME]"])
        raise CountdownError(f"{place} is not a suite: {_shown(name)}", hint)


def _refused(layer: _Layer, problem: ErrorDetails) -> CountdownError:
    """The error for an invalid value, with its place."""
    words = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else None
    table, *rest = (str(part) for part in problem["loc"] or [""])
    key = ".".join([table, *rest[:1]])
    if words and key not in layer:  # two settings that conflict
        named = [name if name in layer else f"{table}.{name}" for name in re.findall(r"`([\w.]+)`", words)]
        items = [layer[name] for name in named if name in layer]
        places = " and ".join(f"{item.place} = {_shown(item.value)}" for item in items)
        return CountdownError(": ".join(filter(None, [words, places])))
    item = layer[key]
    if table == "suite":
        error = words or (
            f"the weight of `{rest[1]}` must be a number of at least 0" if rest[1:] else "it must be a table"
        )
        return CountdownError(f"{item.place}: {error}", 'a cell and its weight are written `"val 3 one-shot" = 1.0`')
    if words:
        return CountdownError(f"{item.place}: {words}", _SCHEDULES if key.startswith("train.prompt_") else None)
    quoted = isinstance(item.value, str) and not isinstance(typed(key, item.value), str)
    shown = f'`"{item.value}"`' if quoted else _shown(item.value)
    hint = f"remove the quotes: `{item.value}`" if quoted else None
    return CountdownError(f"{item.place} must be {expected(key)}, not {shown}", hint)


def _resolved(layer: _Layer, reason: str) -> Resolved:
    sources = {key: item.source for key, item in layer.items() if key in FIELDS or key.startswith("suite.")}
    settings = _validate(layer)
    _require_effect(settings, sources)
    return Resolved(settings, sources, reason)


def _require_effect(settings: Settings, sources: Mapping[str, str]) -> None:
    """Refuse a flag that has no effect beside the other settings; in a file, a setting may wait for its use."""
    chosen, usual = values(settings), defaults()
    for needed, works, keys in NEEDS:
        idle = [key for key in keys if sources[key].startswith("flag ") and chosen[key] != usual[key]]
        if idle and not works(value := chosen[needed]):
            beside = f"without `{flag(needed)}`" if value in (False, "none") else f"with `{flag(needed)} {value}`"
            given = flag(idle[0]) if chosen[idle[0]] is not False else flag(idle[0]).replace("--", "--no-")
            raise CountdownError(
                f"`{given}` has no effect {beside}", f"leave out `{given}`, or change `{flag(needed)}`"
            )


def _shown(value: object) -> str:
    match value:
        case bool():
            return f"`{str(value).lower()}`"
        case dict():
            return "a table"
        case list():
            return "an array"
        case int() if value.bit_length() > 64:
            return "a number of more than 64 bits"
        case _:
            text = str(value)
            return f"`{text if len(text) <= 60 else text[:57] + '...'}`"


def _unknown(place: str, key: str, known: Iterable[str], shown: Callable[[str], str] = str) -> CountdownError:
    meant = nearest(key, known)
    return CountdownError(f"unknown setting {place}", f"did you mean `{shown(meant)}`?" if meant else None)
