"""Typed settings: frozen dataclasses that check themselves, and that read and write plain data, YAML and JSON.

A settings class is a dataclass with a docstring under each field:

    @dataclass(frozen=True, kw_only=True)
    class ParallelConfig(Config):
        tensor_model_parallel_size: int = 1
        \"\"\"Ranks that share the weights of each layer.\"\"\"

        def check(self) -> None:
            require(self.tensor_model_parallel_size >= 1, self, "tensor_model_parallel_size", "is below 1", "use 1")

A field is an int, float, str, bool, Literal, another Config (a section), a tuple[T, ...], a dict[str, T] or one of
these `| None`. A setting is named by its path from the root, `parallel.tensor_model_parallel_size`; a field of the
root, which has no section, by the class: `RunConfig.seed`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import yaml

from megavlm.errors import ConfigError, MegavlmError

_SCALARS = {  # what an error says of a type: its name, and what to write
    int: ("an integer", "write a whole number such as 2"),
    float: ("a finite number", "write a number such as 0.1 or 1e-4"),
    str: ("text", "write text, in quotes if it looks like a number"),
    bool: ("true or false", "write true or false"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all settings classes."""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            try:
                value = _typed(hint, getattr(self, name), name)
            except MegavlmError as error:
                raise _moved(error, _where(type(self), error.where)) from None
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Refuse impossible values with `require`; called on construction, when all fields have their type."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings that plain data (as of `to_dict`) holds; fields it leaves out keep their default."""
        if not isinstance(data, Mapping):
            raise ConfigError(cls.__name__, data, "must be a mapping", f"give the keys {', '.join(field_types(cls))}")
        hints = field_types(cls)
        for key in data:
            if key not in hints:
                raise _unknown_key(cls, str(key), data[key])
        for field in dataclasses.fields(cls):
            is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if is_required and field.name not in data:
                kind, remedy = _describe(hints[field.name])
                raise ConfigError(_where(cls, field.name), None, f"is missing and must be {kind}", remedy)
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: sections become dicts and tuples lists."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        return cls._from_text(text, "yaml", "the YAML text")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls._from_text(text, "json", "the JSON text")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The settings in a .yaml, .yml or .json file."""
        syntax = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}.get(Path(path).suffix)
        if syntax is None:
            raise ConfigError("the settings file", str(path), "has no known suffix", "use .yaml, .yml or .json")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise ConfigError("the settings file", str(path), problem, "check the path and its permissions") from None
        except UnicodeDecodeError:
            raise ConfigError("the settings file", str(path), "is not text", "save it as UTF-8") from None
        return cls._from_text(text, syntax, str(path))

    @classmethod
    def _from_text(cls, text: str, syntax: str, source: str) -> Self:
        try:
            data = json.loads(text) if syntax == "json" else _with_floats(cls, yaml.safe_load(text))
        except json.JSONDecodeError as error:
            raise _bad_syntax(source, text, error.lineno, error.msg) from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise _bad_syntax(source, text, line, error.problem or "bad syntax") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise _bad_syntax(source, text, line, error.reason) from None
        except ValueError as error:  # a date or a number that is well written and impossible
            raise ConfigError(source, str(error), "holds an impossible value", "correct it") from None
        if not isinstance(data, Mapping):
            raise ConfigError(source, data, "does not hold settings", "write one `name: value` for each setting")
        return cls.from_dict(data)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields of its own changed."""
        return dataclasses.replace(self, **changes)

    def override(self, *assignments: str) -> Self:
        """A copy with some settings changed, each written `section.field=value`; checked once all are applied."""
        changes = []
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError("the override", assignment, "has no value", "write section.field=value")
            changes.append((path, value_from_text(type_at(type(self), path, text), text)))
        return self.with_changes(changes)

    def with_changes(self, changes: Iterable[tuple[str, Any]]) -> Self:
        """A copy with plain data put at dotted paths, in their order; checked once all are applied."""
        data = self.to_dict()
        for path, value in changes:
            *sections, name = path.split(".")
            place: Any = data
            for section in sections:
                place = _inside(place, section, path, value)
            if isinstance(place, list):
                _inside(place, name, path, value)
                place[int(name)] = value
            else:
                place[name] = value
        return self.from_dict(data)


def option(default: Any = dataclasses.MISSING, *, name: str, **keywords: Any) -> Any:
    """`dataclasses.field` with the long option's name, where that is not the field's own with dashes."""
    assert name.startswith("--"), name
    return dataclasses.field(default=default, metadata={"option": name}, **keywords)


def require(
    condition: bool, config: Config, field: str, problem: str, remedy: str, error: type[MegavlmError] = ConfigError
) -> None:
    """Raise the error, which names the (dotted) field of the config and its value, unless the condition holds."""
    if not condition:
        value = functools.reduce(getattr, field.split("."), config)
        raise error(_where(type(config), field), value, problem, remedy)


def field_docs(cls: type[Config]) -> dict[str, str]:
    """The docstring under each field, by the field's name."""
    docs = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(Config)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = inspect.cleandoc(doc)
    return docs


def field_types(cls: type[Config]) -> dict[str, Any]:
    """The resolved annotation of each field, by the field's name."""
    hints = typing.get_type_hints(cls)
    found = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name, hint in found.items():
        assert not hasattr(Config, name), f"{cls.__name__}.{name} hides a method of Config"
        assert _is_supported(hint), f"{cls.__name__}.{name}: settings cannot be {hint}"
    return found


class Leaf(NamedTuple):
    """A field that is no section, somewhere in a tree of settings."""

    path: str
    section: type[Config]
    field: dataclasses.Field[Any]
    hint: Any


def leaves(cls: type[Config], prefix: str = "") -> Iterator[Leaf]:
    """All fields below a class that are no sections, in the order of their definition."""
    hints = field_types(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner, _ = without_none(hint)
        if is_section(inner):
            yield from leaves(inner, f"{prefix}{field.name}.")
        else:
            yield Leaf(prefix + field.name, cls, field, hint)


def type_at(cls: type[Config], path: str, value: Any) -> Any:
    """The annotation of the setting at a dotted path, in which a number is a place in a list: `data.streams.0.name`.

    An error names the path and value if there is none.
    """
    hint: Any = cls
    parts = path.split(".")
    for depth, name in enumerate(parts):
        section, _ = without_none(hint)
        if typing.get_origin(section) is tuple and name.isdecimal():
            hint = typing.get_args(section)[0]
            continue
        if typing.get_origin(section) is tuple:
            before = ".".join(parts[:depth])
            raise ConfigError(path, value, f"{before} is a list", f"write a number behind {before}, 0 for its first")
        if not is_section(section):
            raise ConfigError(path, value, f"{'.'.join(parts[:depth])} has no settings inside", "shorten the path")
        if name not in field_types(section):
            error = _unknown_key(section, name, value, "".join(part + "." for part in parts[:depth]))
            raise _moved(error, _where(cls, path))
        hint = field_types(section)[name]
    return hint


def value_from_text(hint: Any, text: str) -> Any:
    """Plain data from a word of a command line; what does not parse stays text, for the type check to refuse."""
    inner, optional = without_none(hint)
    if optional and text in ("none", "null"):
        return None
    if inner is str:
        return text
    if inner in (int, float):
        return _or_text(inner, text)
    if typing.get_origin(inner) is Literal:
        return next((choice for choice in typing.get_args(inner) if str(choice) == text), text)
    return _with_floats(inner, _or_text(yaml.safe_load, text))


def without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other annotation X as (X, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(typing.get_args(hint)) == 2:
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        if len(members) == 1:
            return members[0], True
    return hint, False


def is_section(hint: Any) -> bool:
    """Whether the annotation is a settings class."""
    return isinstance(hint, type) and issubclass(hint, Config)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely stands for, if any is like it."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _inside(place: Any, name: str, path: str, value: Any) -> Any:
    """What plain data have under a name, or at a place in a list."""
    if isinstance(place, list):
        if int(name) >= len(place):
            raise ConfigError(path, value, f"there is no {name}", f"the list has 0 to {len(place) - 1}")
        return place[int(name)]
    if not isinstance(place.get(name), (dict, list)):  # an optional section that was left out
        place[name] = {}
    return place[name]


def _is_supported(hint: Any) -> bool:
    inner, _ = without_none(hint)
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is tuple:
        return len(arguments) == 2 and arguments[1] is Ellipsis and _is_supported(arguments[0])
    if typing.get_origin(inner) is dict:
        return arguments[0] is str and _is_supported(arguments[1])
    return inner in _SCALARS or typing.get_origin(inner) is Literal or is_section(inner)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """The value as its annotation says; a list stands for a tuple, an int for a float, a mapping for a section."""
    inner, optional = without_none(hint)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if value is None and optional:
        return None
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {_typed(str, key, path): _typed(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal and any(type(choice) is type(value) and choice == value for choice in arguments):
        return value
    if is_section(inner) and isinstance(value, Mapping):
        return _section(inner, value, path)
    if inner is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # false for NaN too
        return float(value)
    # Exactly the type: True is no int, and a subclass (a NumPy scalar, an enum, a derived section) would not come
    # back from plain data as what it was.
    if inner is not float and type(value) is inner:
        return value
    kind, remedy = _describe(hint)
    raise ConfigError(path, value, f"must be {kind}", remedy)


def _section(cls: type[Config], data: Mapping[str, Any], path: str) -> Config:
    try:
        return cls.from_dict(data)
    except MegavlmError as error:
        raise _moved(error, f"{path}.{error.where.removeprefix(cls.__name__ + '.')}") from None


def _describe(hint: Any) -> tuple[str, str]:
    """What a value of this type is called, and how to write one."""
    inner, optional = without_none(hint)
    if optional:
        kind, remedy = _describe(inner)
        return f"{kind} or null", f"{remedy}, or null"
    if inner in _SCALARS:
        return _SCALARS[inner]
    arguments = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return f"one of {choices}", f"use one of {choices}"
    if typing.get_origin(inner) is tuple:
        return f"a list, each item {_describe(arguments[0])[0]}", "write [item, item, ...]"
    if typing.get_origin(inner) is dict:
        return f"a mapping, each value {_describe(arguments[1])[0]}", "write {name: value, ...}"
    return f"the settings of {inner.__name__}", f"give the keys {', '.join(field_types(inner))}"


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _with_floats(hint: Any, data: Any) -> Any:
    """Data read from YAML, where `1e-4` is text for want of a dot, with such text made numbers in float fields."""
    inner, _ = without_none(hint)
    arguments = typing.get_args(inner)
    if inner is float and isinstance(data, str):
        return _or_text(float, data)
    if typing.get_origin(inner) is tuple and isinstance(data, list):
        return [_with_floats(arguments[0], item) for item in data]
    if typing.get_origin(inner) is dict and isinstance(data, dict):
        return {key: _with_floats(arguments[1], item) for key, item in data.items()}
    if is_section(inner) and isinstance(data, dict):
        hints = field_types(inner)
        return {key: _with_floats(hints.get(key), item) for key, item in data.items()}
    return data


def _or_text(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError):
        return text


def _where(cls: type[Config], path: str) -> str:
    return path if "." in path else f"{cls.__name__}.{path}"


def _moved(error: MegavlmError, where: str) -> MegavlmError:
    return type(error)(where, error.value, error.problem, error.remedy)


def _bad_syntax(source: str, text: str, line: int, problem: str) -> ConfigError:
    written = "".join(text.split("\n")[line - 1 : line])
    return ConfigError(f"{source}, line {line}", written, problem, "correct the syntax of this line")


def _unknown_key(cls: type[Config], key: str, value: Any, prefix: str = "") -> ConfigError:
    """The error for a key that `cls` has not; it knows too when the key belongs into one of its sections."""
    paths: dict[str, list[str]] = {}
    for path in [*field_types(cls), *(leaf.path for leaf in leaves(cls) if "." in leaf.path)]:
        paths.setdefault(path.rpartition(".")[2], []).append(prefix + path)
    name = nearest(key, paths)
    remedy = f"did you mean {' or '.join(paths[name])}?" if name else f"the keys here are {', '.join(field_types(cls))}"
    return ConfigError(_where(cls, prefix + key), value, "unknown key", remedy)
