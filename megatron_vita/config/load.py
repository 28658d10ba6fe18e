"""Load a YAML recipe and command-line flags into a RunConfig; an unknown key is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.config.model import ModelConfig
from megatron_vita.config.run import RunConfig, StageConfig
from megatron_vita.errors import ConfigError

_SECTIONS = ("model", "data", "parallel", "optimizer", "train", "checkpoint", "logging")


def load_run(path: str | Path, overrides: Sequence[str] = (), *, expand: bool = True) -> RunConfig:
    """Load a recipe, with command-line flags overriding it.

    Args:
        path: YAML with the sections model, data, parallel, optimizer, train, checkpoint, logging, and `stages`: a
            list of mappings {name, section: {key: value}} that override these common sections. Without `stages` there
            is one stage, `train`, with the common sections.
        overrides: `--flag value` pairs with Megatron's names (`--seq-length 2048`, `--vision-num-layers 3`). A boolean
            takes `true` or `false`; without a value it is true. They apply to every stage.
        expand: environment variables must be set. False: the name of one that is not stays in the path, for programs
            that need the sizes alone.

    Returns:
        The RunConfig, each section validated; call `.check(world_size)` for the rules between sections.

    Raises:
        ConfigError: unreadable file, unknown key or flag, or a value of the wrong type or out of range.
    """
    recipe = _expand(_parsed(Path(path)), str(path), required=expand)
    stages = recipe.pop("stages", None)
    check_keys(recipe, _SECTIONS, str(path))
    if stages is None:
        stages = [{"name": "train"}]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{path}: `stages` must be a list of mappings, one for each stage.")
    flags = _parse_flags(overrides)
    merged = []
    for number, overlay in enumerate(stages, 1):
        where = f"{path}, stage {number}"
        check_keys(overlay, ("name", *_SECTIONS), where)
        settings = _merge(_merge(recipe, overlay), flags)
        settings.setdefault("name", f"stage{number}")
        merged.append(_build(StageConfig, settings, where, ""))
    return RunConfig(stages=tuple(merged))


def load_model(path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Load the `model` section of a recipe's first stage only; environment variables of other sections may be unset.

    Args:
        path: YAML as for load_run.
        overrides: flags as for load_run.

    Raises:
        ConfigError: as load_run, for the model section and the flags.
    """
    recipe = _parsed(Path(path))
    stages = recipe.get("stages")
    first = stages[0] if isinstance(stages, list) and stages and isinstance(stages[0], dict) else {}
    sections = [{key: one[key] for key in ("model",) if key in one} for one in (recipe, first)]
    settings = _merge(_expand(_merge(*sections), str(path)), _parse_flags(overrides))
    return stage_from_dict({"model": settings.get("model", {})}, str(path)).model


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to nested dictionaries, for YAML or JSON."""
    return dataclasses.asdict(config)


def stage_from_dict(settings: Mapping[str, Any], where: str) -> StageConfig:
    """The inverse of `to_dict` for a StageConfig, validated like a recipe; `where` names the source in messages.

    Raises:
        ConfigError: as load_run.
    """
    stage: StageConfig = _build(StageConfig, settings, where, "")
    return stage


def flag_names() -> dict[str, str]:
    """All command-line flags and their settings, e.g. {`--seq-length`: `data.seq_length`}."""
    return {flag: ".".join(path) for flag, path, _ in _flags()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping and replace `${NAME}` and `${NAME:-default}` in its strings from the environment.

    Example: `data_path: ${SHARDS}/stage1`.

    Raises:
        ConfigError: the file is missing, not YAML or not a mapping, or a variable without default is not set.
    """
    expanded: dict[str, Any] = _expand(_parsed(path), str(path))
    return expanded


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give an existing YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections.")
    return content


def _expand(node: Any, where: str, *, required: bool = True) -> Any:
    """Replace environment variables in every string below `node`; those that are not set stay unless `required`."""
    if isinstance(node, dict):
        return {key: _expand(value, where, required=required) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value, where, required=required) for value in node]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = os.environ.get(name, default)
        if value is None and not required:
            return match.group(0)
        if value is None:
            raise ConfigError(f"{where}: {node!r} needs the environment variable {name}. Set it (export {name}=...).")
        return value

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value_of, node)


def check_keys(given: Iterable[Any], known: Collection[str], where: str) -> None:
    """Check that all keys are known.

    Args:
        given: keys of a mapping.
        known: allowed keys.
        where: start of the error message.

    Raises:
        ConfigError: an unknown key; suggests the most similar known key.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key `{key}`. {hint}")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _section_type(hint: Any) -> type | None:
    """The dataclass in a field's type (`X` or `X | None`); None for a scalar field."""
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _build(kind: type, settings: Any, where: str, prefix: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: `{prefix.rstrip('.')}` must be a mapping, got {settings!r}.")
    hints = _hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    check_keys(settings, names, f"{where}: {prefix.rstrip('.')}" if prefix else where)
    values = {}
    for name, value in settings.items():
        section = _section_type(hints[name])
        if section is not None and value is not None:
            values[name] = _build(section, value, where, f"{prefix}{name}.")
        else:
            values[name] = _coerce(value, hints[name], f"{where}: {prefix}{name}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML or command-line value to a field's type; numbers may be strings, as YAML reads 1e-3."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (value == "none" and type(None) in options):
        if type(None) in options:
            return None
        raise ConfigError(f"{where}: needs a value of type {hint.__name__}, got nothing.")
    wanted = next(option for option in options if option is not type(None))
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif wanted is str:
        if isinstance(value, str):
            return value
    elif wanted in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if wanted is float and math.isfinite(number):
            return number
        if wanted is int and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
    raise ConfigError(f"{where}: needs a value of type {wanted.__name__}, got {value!r}.")


def _flags() -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """(flag, path, type) of every setting; flags of nested sections have their name as prefix: --vision-num-layers."""
    for section, hint in _hints(StageConfig).items():
        if section == "name":
            continue
        for name, inner in _hints(hint).items():
            nested = _section_type(inner)
            if nested is None:
                yield "--" + name.replace("_", "-"), (section, name), inner
                continue
            for leaf, leaf_hint in _hints(nested).items():
                yield f"--{name}-{leaf}".replace("_", "-"), (section, name, leaf), leaf_hint


def _parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    table = {flag: path for flag, path, _ in _flags()}
    out: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in table:
            close = difflib.get_close_matches(flag, table, n=1, cutoff=0.5)
            raise ConfigError(f"unknown flag {flag}." + (f" Did you mean {close[0]}?" if close else ""))
        given: Any = value if equals else (rest.pop(0) if rest and not rest[0].startswith("--") else True)
        node = out
        *parents, leaf = table[flag]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = given
    return out
