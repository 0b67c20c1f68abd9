"""YAML and `key=value` overrides in, a checked config out; and the way back, with a digest.

Unknown keys are answered with the nearest known one. Every complaint is one line that names file, key and value.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mim_scale.commit import sha256_values
from mim_scale.config import Section
from mim_scale.errors import ConfigError

Root = TypeVar("Root", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(root: type[Root], path: Path, overrides: Sequence[str] = ()) -> Root:
    """Read a YAML file, apply `a.b=value` overrides, check the whole.

    Raises:
        ConfigError: one line that names the file, the key, the value and the remedy.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; shipped ones are in configs/")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return check_config(root, values, str(path))


def json_override(key: str, path: Path) -> str:
    """The override that puts a JSON file's object at a key.

    Raises:
        ConfigError: the file is missing, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return f"{key}={json.dumps(values)}"


def check_config(root: type[Root], values: dict[str, Any], where: str) -> Root:
    """Turn plain values into a config, or raise ConfigError in one line."""
    _refuse_unknown(root, values, where, ())
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def config_values(config: Section) -> dict[str, Any]:
    """The config as plain YAML values."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values


def dump_config(config: Section) -> str:
    """The config as YAML text; loading it gives the same config."""
    return yaml.safe_dump(config_values(config), sort_keys=False)


def digest_config(config: Section) -> str:
    """SHA-256 of the resolved values, as hex."""
    return sha256_values(config_values(config))


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, for example train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not readable as YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        values = _step_into(values, parent, override)
    if isinstance(values, list):
        values[_list_index(values, last, override)] = value
    else:
        values[last] = value


def _step_into(values: Any, name: str, override: str) -> Any:
    if isinstance(values, list):
        return values[_list_index(values, name, override)]
    child = values.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {name} is a single value, it has nothing inside")
    return child


def _list_index(values: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(values):
        raise ConfigError(
            f"override {override!r}: {name} is no index of a list of {len(values)} (0 to {len(values) - 1})"
        )
    return int(name)


def _refuse_unknown(section: type[BaseModel], values: Any, where: str, path: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        return
    known = section.model_fields
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {'.'.join((*path, str(key)))}; {hint}")
        annotation = known[key].annotation
        sections, is_tuple = _sections_in(annotation), typing.get_origin(annotation) is tuple
        if not sections or (value is None and type(None) in typing.get_args(annotation)):
            continue
        items: Iterable[tuple[int | None, Any]] = [(None, value)]
        if is_tuple:
            items = enumerate(value) if isinstance(value, list) else []
        for index, item in items:
            inside = (*path, key if index is None else f"{key}.{index}")
            if not isinstance(item, dict):
                raise ConfigError(f"{where}: {_no_section('.'.join(inside), item, sections)}")
            inner = _chosen(sections, item)
            if inner is not None:
                _refuse_unknown(inner, item, where, inside)


def _no_section(key: str, value: Any, sections: list[type[BaseModel]]) -> str:
    """What to write where a bare value stands for a section."""
    for chooser in CHOOSERS & sections[0].model_fields.keys() if len(sections) > 1 else ():
        known = [name for one in sections for name in typing.get_args(one.model_fields[chooser].annotation)]
        return (
            f"{key} is {value!r}, but it has settings of its own: write {key}.{chooser}, and beside it what that one "
            f"needs; known: {', '.join(known)}"
        )
    return f"{key} is {value!r}, but it has settings of its own: {', '.join(sections[0].model_fields)}"


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, alone or in a tuple or a union."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]


def _chosen(sections: list[type[BaseModel]], value: dict[str, Any]) -> type[BaseModel] | None:
    """Of several sections the one that the value names; None where it names none of them."""
    if len(sections) == 1:
        return sections[0]
    for section in sections:
        for name in CHOOSERS & section.model_fields.keys():
            if value.get(name) in typing.get_args(section.model_fields[name].annotation):
                return section
    return None


CHOOSERS = {"name", "backbone"}
"""Fields whose value says which of several sections is meant."""


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(_path(first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        chooser, given = first["ctx"]["discriminator"].strip("'"), first["ctx"].get("tag")
        found = f"{given!r}" if given else "missing"
        known = first["ctx"].get("expected_tags", "")
        return f"{where}: {key}.{chooser} is {found}{f'; known: {known}' if known else ''}{more}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing; it changes results, so it has no default{more}"
    if first["type"] == "value_error":
        return f"{where}: {f'{key}: ' if key else ''}{first['ctx']['error']}{more}"
    return f"{where}: {key} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"


def _path(location: tuple[int | str, ...]) -> list[str]:
    """Where in the file: without the chosen section's name, which follows its key, and without names of types."""
    kept = [part for index, part in enumerate(location) if not (index == 1 and location[0] in {"method", "model"})]
    return [str(part) for part in kept if isinstance(part, int) or part.isidentifier()]
