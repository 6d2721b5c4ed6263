"""From YAML, overrides or a dict to a `Config`; every mistake with its place, all of them in one go.

Examples of what a user sees:

    experiment.yaml:11:3: quantum.n_qubit: unknown key; did you mean 'n_qubits'?
    override 'train.steps=x': train.steps: expected a whole number, found 'x'
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from experiments import yaml_loader
from experiments.config import BRANCHES, Config, complaints
from experiments.errors import ConfigError
from experiments.yaml_loader import Document, Mark, describe, dotted

MAX_RUNS = 1000

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where settings come from, for messages about them.

    Attributes:
        name: the file as the user named it, or `config` for a dict.
        document: places of the file's keys and values.
        base: folder beside which the file names in it are looked for.
        origins: path -> place of what replaced the file's value: an override or an entry of a sweep.
    """

    name: str
    document: Document
    base: Path
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """`file:line:column` of a setting or the nearest section around it, or the override that set it."""
        return self._find(path)[1]

    def error(self, path: KeyPath, text: str, **fields: str) -> ConfigError:
        """The error that says `text` about the setting at `path`."""
        return ConfigError(f"{self.place(path)}: {dotted(path)}: {text}", **fields)

    def folder(self, path: KeyPath) -> Path:
        """Beside which a file named at `path` is looked for: the working directory where an override named it."""
        return Path.cwd() if self.place(path).startswith("override '") else self.base

    def _find(self, path: KeyPath, *, key: bool = False) -> tuple[Mark, str]:
        parts = [path[:length] for length in range(len(path), -1, -1)]
        for part in parts:
            if part in self.origins:
                return (1 << 30, list(self.origins).index(part)), self.origins[part]
        for part in parts:
            marks = self.document.keys if key or len(part) < len(path) else self.document.values
            mark = marks.get(part) or self.document.keys.get(part) or self.document.values.get(part)
            if mark:
                return mark, f"{self.name}:{mark[0]}:{mark[1]}"
            made = [i for i, origin in enumerate(self.origins) if origin[: len(part)] == part]
            if made:  # a section that only an override has
                return (1 << 30, made[0]), list(self.origins.values())[made[0]]
        return (0, 0), self.name


@dataclass(frozen=True)
class Loaded:
    """A configuration with its source.

    Attributes:
        config: the validated tree.
        source: for messages about a setting.
        data: what was validated, as plain data; `expand` varies it.
    """

    config: Config
    source: Source
    data: dict[str, Any]


def load(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """The configuration in a YAML file or a dict, with `a.b=c` overrides applied.

    Raises:
        ConfigError: one line for each mistake.
    """
    if isinstance(config, Mapping):
        document = Document(copy.deepcopy(dict(config)), {}, {})
        return _parse(Source("config", document, Path.cwd()), overrides)
    path = Path(config)
    document = yaml_loader.load_text(_read(path), str(config))
    return _parse(Source(str(config), document, path.parent), overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration in a YAML text; `name` is what messages call it."""
    return _parse(Source(name, yaml_loader.load_text(text, name), Path.cwd()), overrides)


def expand(loaded: Loaded) -> list[tuple[dict[str, Any], Loaded]]:
    """Every combination of the sweep's values, each validated as if the file had said so.

    Returns:
        (dotted key -> value, configuration without a sweep); the configuration itself when there is no sweep.
    """
    sweep = loaded.config.sweep
    count = 1
    for values in sweep.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise loaded.source.error(("sweep",), f"{count} combinations; at most {MAX_RUNS} are run")
    runs, problems = [], []
    for choice in itertools.product(*(range(len(values)) for values in sweep.values())):
        try:
            runs.append(_combination(loaded, choice))
        except ConfigError as error:
            problems += error.message.split("\n")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return runs


def resolved_yaml(config: Config) -> str:
    """The configuration with all defaults filled in; reading it back gives the same configuration."""
    return yaml_loader.dump(config.model_dump(mode="json"))


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(
                f"{path}: a folder", expected="a YAML file", remedy="heteroq run --resume DIR resumes a run"
            )
        with path.open("rb") as file:
            content = file.read(yaml_loader.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", expected="a YAML file") from None
    if len(content) > yaml_loader.MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte {error.start})") from None


def _parse(source: Source, overrides: Sequence[str]) -> Loaded:
    data = source.document.data
    origins = dict(source.origins)
    problems: list[tuple[Mark, str]] = [
        (mark, f"{source.name}:{mark[0]}:{mark[1]}: {text}") for mark, text in source.document.problems
    ]
    for override in overrides:
        try:
            origins[_override(data, override)] = f"override '{override}'"
        except ConfigError as error:
            problems.append(((1 << 30, -1), error.message))
    loaded = _validate(replace(source, origins=origins), data, problems)
    expand(loaded)
    return loaded


def _override(data: dict[str, Any], override: str) -> KeyPath:
    """Apply one `a.b=c` and return the path that it set."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override '{override}': expected KEY=VALUE, for example train.steps=100")
    parts = _path(key.strip())
    _set(data, parts, yaml_loader.load_value(text, f"override '{override}'"), f"override '{override}'")
    return parts


def _path(key: str) -> tuple[str, ...]:
    """A dotted key as a path; the keys inside `sweep` and `plan.pins` are dotted themselves."""
    parts = tuple(key.split("."))
    for section in (("sweep",), ("plan", "pins")):
        n = len(section)
        if parts[:n] == section and len(parts) > n:
            return (*section, ".".join(parts[n:]))
    return parts


def _set(data: dict[str, Any], parts: tuple[str, ...], value: Any, place: str) -> None:
    section = data
    for i, part in enumerate(parts[:-1]):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{place}: {dotted(parts[: i + 1])}: not a section, it has no keys")
    section[parts[-1]] = value


def _combination(loaded: Loaded, choice: tuple[int, ...]) -> tuple[dict[str, Any], Loaded]:
    data = copy.deepcopy({key: value for key, value in loaded.data.items() if key != "sweep"})
    origins = dict(loaded.source.origins)
    settings = {}
    for (key, values), i in zip(loaded.config.sweep.items(), choice, strict=True):
        parts = _path(key)
        place = loaded.source.place(("sweep", key, i))
        if parts[0] in ("sweep", "name"):
            raise ConfigError(f"{place}: sweep.{key}: can't be varied")
        _set(data, parts, copy.deepcopy(values[i]), place)
        origins[parts] = place
        settings[key] = values[i]
    return settings, _validate(replace(loaded.source, origins=origins), data, [])


def _validate(source: Source, data: dict[str, Any], problems: list[tuple[Mark, str]]) -> Loaded:
    """All problems at once: of single settings, and between those that are each right by themselves."""
    config, wrong = _try(data)
    blamed = {path for path, _ in wrong}
    for path, text in wrong:
        key = text.startswith(("unknown key", "required key"))
        mark, place = source._find(path, key=key)
        problems.append((mark, f"{place}: {dotted(path)}: {text}"))
    if config is None:
        config = _rest(data, blamed)
    for paths, text in complaints(config) if config else ():
        if not any(path[: len(bad)] == bad for path in paths for bad in blamed):
            mark, place = source._find(paths[0])
            problems.append((mark, f"{place}: {dotted(paths[0])}: {text}"))
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(text for _, text in sorted(problems, key=lambda item: item[0]))))
    return Loaded(_absolute_paths(config, source), source, data)


def _try(data: dict[str, Any]) -> tuple[Config | None, list[tuple[KeyPath, str]]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        found = []
        for item in error.errors(include_url=False):
            path = tuple(part for part in item["loc"] if part not in BRANCHES and part != "[key]")
            found.append((path, _explain(dict(item), path)))
        return None, found


def _rest(data: dict[str, Any], blamed: set[KeyPath]) -> Config | None:
    """The configuration with defaults for everything blamed, so that rules between the other settings can be checked.

    A section that can't do without what is taken from it goes as a whole, and is added to the blamed.
    """
    rest: dict[str, Any] = copy.deepcopy(data)
    todo = set(blamed)
    while todo:
        for path in todo:
            _remove(rest, path)
        rest.setdefault("name", "unnamed")
        config, wrong = _try(rest)
        todo = {path[:-1] for path, _ in wrong} - blamed
        blamed |= todo
    return config


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    keys = list(itertools.takewhile(lambda part: isinstance(part, str), path))
    section: Any = data
    for part in keys[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict) and keys:
        section.pop(keys[-1], None)


def _explain(error: dict[str, Any], path: KeyPath) -> str:
    """A pydantic error in our words."""
    kind, found, limits = error["type"], describe(error.get("input")), error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + _suggestion(path)
    if kind == "missing":
        return "required key is missing" if isinstance(path[-1], str) else f"expected {path[-1] + 1} entries or more"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", limits["expected"])
        return f"expected one of {', '.join(choices)}; found {found}" + _near(str(error["input"]), choices)
    if kind == "string_pattern_mismatch":
        return f"{found} is not a name: letters, digits, '.', '_' and '-' are (and ':' in a device's), at most 64"
    for name, words in _LIMITS.items():
        if kind == name:
            return words.format(**limits) + f", found {found}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {found}"


_LIMITS = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected a section of 'key: value'",
    "model_type": "expected a section of 'key: value'",
    "finite_number": "expected a finite number",
    "greater_than": "has to be above {gt}",
    "greater_than_equal": "has to be at least {ge}",
    "less_than": "has to be below {lt}",
    "less_than_equal": "has to be at most {le}",
    "too_short": "has to have at least {min_length} entries",
    "too_long": "has to have at most {max_length} entries",
}


def _near(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _suggestion(path: KeyPath) -> str:
    """What an unknown key may have meant: a near name here, the same name elsewhere, or all names there are."""
    section, key = _section(path[:-1]), str(path[-1])
    names = list(section.model_fields) if section else []
    elsewhere = [dotted(other) for other in _all_keys(Config, ()) if other[-1] == key]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return _near(key, names) or f"; there are {', '.join(names)}"


def _section(path: KeyPath) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for part in path:
        info = section.model_fields.get(str(part)) if section else None
        section = _inner(info.annotation) if info else None
    return section


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `Section`, `Section | None` or a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((inner for part in typing.get_args(annotation) if (inner := _inner(part))), None)
    return None


def _all_keys(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, info in section.model_fields.items():
        yield (*path, name)
        if inner := _inner(info.annotation):
            yield from _all_keys(inner, (*path, name))


def _absolute_paths(config: Config, source: Source) -> Config:
    """File names made absolute: those in a file are looked for beside it first, overrides in the working directory."""
    updates: dict[str, Any] = {}
    for section, key in (("data", "path"), ("plan", "topology")):
        name = getattr(getattr(config, section), key)
        if name is not None:
            path = _find_file(Path(name).expanduser(), source.folder((section, key)))
            updates[section] = getattr(config, section).model_copy(update={key: str(path)})
    return config.model_copy(update=updates)


def _find_file(path: Path, base: Path) -> Path:
    beside = (base / path).absolute()
    return beside if beside.exists() or not path.absolute().exists() else path.absolute()
