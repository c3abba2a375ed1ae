"""A run's YAML file, with overrides, to a Config and back; and the one line that says what is wrong with it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from data_pipeline import UserError
from pretrain.config.objectives import OBJECTIVES
from pretrain.config.schema import Config


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a run's YAML file and apply overrides: `section.key=value`, `section={…}`, or `section=@FILE`.

    Raises UserError, in one line, for whatever does not fit the schema.
    """
    path = Path(path)
    values = _read_yaml(path, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of sections ({', '.join(Config.model_fields)})")
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True)


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (3e-4 is a number, off is a word), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes what _Yaml12Loader would not read back as text."""


_BOOL, _INT, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for _class in (_Yaml12Loader, _Yaml12Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _class.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|nan))$"),
        list("-+0123456789."),
    )


def _read_yaml(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot read the config ({error}); give the path of a YAML file") from None
    return _parse_yaml(text, where)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a scalar such as the date 2024-13-45
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`, or a whole `section={key: value, …}`, in place; `section=@FILE` merges a file in."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    whole_section = len(parts) == 1 and text.startswith(("{", "@"))
    if not equals or not all(parts) or (len(parts) < 2 and not whole_section):
        raise UserError(f"override {override!r} is not of the form section.key=value")
    target = values
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {part!r} is not a section")
    where = f"override {override!r}"
    if whole_section and text.startswith("@"):
        included = _read_yaml(Path(text[1:]), where)
        if not isinstance(included, dict) or not isinstance(target.get(key) or {}, dict):
            raise UserError(f"{where}: {key} and the file must be mappings, to be merged")
        target[key] = _merged(target.get(key) or {}, included)
        return
    target[parts[-1]] = _parse_yaml(text, where)


def _merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `other`, which win; mappings in both are merged likewise."""
    both = {k: _merged(base[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | other | both


def _describe(error: ValidationError) -> str:
    """The first problem of a failed validation, in one line; and how many more there are."""
    problems = error.errors()
    # A mistyped key shows up twice, as unknown and as missing: the unknown one explains more.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location = [str(part) for part in problem["loc"]]
    objective = location.pop(1) if len(location) > 2 and location[0] == "objective" else None  # the union's variant
    key = ".".join(location)
    value = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            line = f"unknown key {key}={value!r}{_suggestion(location, objective)}"
        case "missing":
            line = f"missing key {key}; add it"
        case "union_tag_not_found":
            line = f"missing key {key}.name; add it ({' or '.join(OBJECTIVES)})"
        case "union_tag_invalid":
            line = f"{key}.name={value.get('name')!r} must be one of {problem['ctx']['expected_tags']}"
        case "value_error":
            line = str(problem["ctx"]["error"])
        case _:
            line = f"{key}={value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")


def _suggestion(location: list[str], objective: str | None) -> str:
    """`; did you mean …` or the keys that exist, for an unknown key at `location`."""
    section: Any = Config
    where = ""
    for part in location[:-1]:
        if part.isdecimal():  # a place in a list, whose sections are known already
            continue
        section = OBJECTIVES[objective] if objective else _section_of(section.model_fields[part].annotation)
        where = f" for objective.name={objective}" if objective else ""
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"{where}; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"{where}; known: {', '.join(known)}"


def _section_of(annotation: Any) -> Any:
    """The section class that an annotation such as `list[SourceConfig] | None` is about."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    return annotation
