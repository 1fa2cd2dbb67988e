"""Long options in Megatron's style, as spellings of the fields of a settings tree.

A field `tensor_model_parallel_size`, in whatever section, is the option `--tensor-model-parallel-size`, unless
`option(..., name=...)` says otherwise. Dotted overrides (`parallel.tensor_model_parallel_size=2`) stand beside them.
"""

from __future__ import annotations

import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from megavlm.config import (
    Config,
    Leaf,
    field_docs,
    field_types,
    leaves,
    nearest,
    type_at,
    value_from_text,
    without_none,
)
from megavlm.errors import ConfigError, MegavlmError

C = TypeVar("C", bound=Config)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_HELP_WIDTH = 100


def parse_options(config: C, argv: Sequence[str], prog: str = "megavlm train") -> C:
    """The config with the changes that a command line asks for, all applied before anything is checked.

    `--option value`, `--option=value`, `--flag` and `--no-flag`, `--option 1 2 3` for a tuple, `none` for null, and
    `section.field=value`; the last one wins. `--help` prints all options and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(config, prog))
        raise SystemExit(0)
    known = option_table(type(config))
    changes: list[tuple[str, Any]] = []
    typed: dict[str, str] = {}  # how the user spelled each path that changes
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if word.startswith("-"):
            if name not in known:
                if not equals:
                    text = " ".join(_take_values(words))
                raise _unknown_option(name, text, known)
            path, value = _read_option(name, known[name], text if equals else None, words)
            typed[path] = name
        elif _OVERRIDE.match(word):
            path, value = name, value_from_text(type_at(type(config), name, text), text)
            typed[path] = path
        else:
            raise ConfigError(
                "the command line", word, "is no option", "options start with --, overrides are section.field=value"
            )
        changes.append((path, value))
    try:
        return config.with_changes(changes)
    except MegavlmError as error:
        _raise_as_typed(error, type(config), typed)


def option_table(cls: type[Config]) -> dict[str, Leaf]:
    """Each option's name, `--no-` forms included, and the field that it sets.

    Fields of the root and of its sections have one. What lies deeper (the shapes of a model's parts) repeats names,
    and is set by its path: `infimm.tower.norm_epsilon=1e-6`. So is what two sections share that may both be none (the
    families of models): `aquila_vl.image_token_id=7`.
    """
    table: dict[str, Leaf] = {}
    shared: set[str] = set()
    for leaf in (leaf for leaf in leaves(cls) if leaf.path.count(".") <= 1):
        for name in _spellings(leaf):
            if name in table:
                both = f"{name} would set both {table[name].path} and {leaf.path}"
                assert _may_be_none(cls, leaf) and _may_be_none(cls, table[name]), both
                shared.add(name)
            table[name] = leaf
    return {name: leaf for name, leaf in table.items() if name not in shared}


def _may_be_none(cls: type[Config], leaf: Leaf) -> bool:
    """Whether the leaf's section is an optional one."""
    section, dot, _ = leaf.path.partition(".")
    return bool(dot) and without_none(field_types(cls)[section])[1]


def _spellings(leaf: Leaf) -> list[str]:
    name = leaf.field.metadata.get("option", "--" + leaf.field.name.replace("_", "-"))
    is_flag = without_none(leaf.hint)[0] is bool
    return [name, "--no-" + name.removeprefix("--")] if is_flag else [name]


def _read_option(name: str, leaf: Leaf, text: str | None, words: list[str]) -> tuple[str, Any]:
    """The path and the value that an option sets; takes its values, unless given by `=`, from the words after it."""
    inner, optional = without_none(leaf.hint)
    if inner is bool:
        if text is not None:
            raise ConfigError(name, text, "takes no value", f"use {' or '.join(_spellings(leaf))}")
        return leaf.path, name == _spellings(leaf)[0]
    if typing.get_origin(inner) is tuple:
        texts = _take_values(words) if text is None else [text]
        if optional and texts in (["none"], ["null"]):
            return leaf.path, None
        return leaf.path, [value_from_text(typing.get_args(inner)[0], item) for item in texts]
    if text is None:
        if not words or words[0].startswith("--"):
            raise ConfigError(name, "", "needs a value", f"write {name}{_metavar(leaf.hint)}")
        text = words.pop(0)
    return leaf.path, value_from_text(leaf.hint, text)


def _take_values(words: list[str]) -> list[str]:
    """Remove and return the words up to the next option or override."""
    values = []
    while words and not words[0].startswith("--") and not _OVERRIDE.match(words[0]):
        values.append(words.pop(0))
    return values


def _unknown_option(name: str, text: str, known: Iterable[str]) -> ConfigError:
    close = nearest(name, known)
    question = f"did you mean {close}? " if close else ""
    return ConfigError(name, text, "unknown option", f"{question}`--help` lists all")


def _raise_as_typed(error: MegavlmError, cls: type[Config], typed: dict[str, str]) -> NoReturn:
    """Raise the error, under the spelling that the user typed where it is about something typed."""
    where = error.where.removeprefix(cls.__name__ + ".")
    for path, spelling in typed.items():
        if where == path or where.startswith((path + ".", path + "[")):
            raise type(error)(spelling + where[len(path) :], error.value, error.problem, error.remedy) from None
    raise error


def _help(config: Config, prog: str) -> str:
    lines = [
        f"usage: {prog} [--option VALUE ...] [section.field=value ...]",
        "",
        "Each option also has a dotted name, section.field=value. The last of several wins.",
    ]
    sections: dict[str, list[Leaf]] = {}
    known = option_table(type(config))
    for leaf in leaves(type(config)):
        sections.setdefault(leaf.path.rpartition(".")[0], []).append(leaf)
    for path in sorted(sections, key=bool):  # first the root's own, which have no section
        cls = sections[path][0].section
        docs = field_docs(cls)
        lines += ["", f"{path or cls.__name__}: {(cls.__doc__ or '').splitlines()[0]}"]
        for leaf in sections[path]:
            names = [name for name in _spellings(leaf) if known.get(name) == leaf]
            shown = f"{', '.join(names)}{_metavar(leaf.hint)}"
            if not names:
                shown = f"{leaf.path}={_metavar(leaf.hint).strip() or 'true|false'}"
            lines.append(f"  {shown} (default: {_current(config, leaf.path)})")
            doc = docs.get(leaf.field.name, "")
            lines += textwrap.wrap(doc, _HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _current(config: Config, path: str) -> str:
    value: Any = config
    for name in path.split("."):
        if value is None:
            return "none, as its section"
        value = getattr(value, name)
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_shown(item) for item in value) or "no values"
    return "none" if value is None else str(value)


def _metavar(hint: Any) -> str:
    """The words that show an option's value in the help, after a space; none for a flag."""
    inner, optional = without_none(hint)
    arguments = typing.get_args(inner)
    if inner is bool:
        return ""
    if typing.get_origin(inner) is Literal:
        shown = " {" + ",".join(str(choice) for choice in arguments) + "}"
    elif typing.get_origin(inner) is tuple:
        shown = f"{_metavar(arguments[0])} ..."
    else:
        shown = {int: " INT", float: " FLOAT", str: " TEXT"}.get(inner, " YAML")
    return f"{shown}|none" if optional else shown


def take_options(
    argv: Sequence[str], required: Sequence[str], optional: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """A command's own options and their values (a flag's is "true"), and the words left for `parse_options`."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if name in flags:
            found[name] = "true"
        elif name in (*required, *optional):
            if not equals and not words:
                raise ConfigError(name, None, "has no value", "write one behind it")
            found[name] = text if equals else words.pop(0)
        else:
            rest.append(word)
    for name in required:
        if name not in found:
            raise ConfigError(name, None, "is missing", f"this command needs {', '.join(required)}")
    return found, rest
