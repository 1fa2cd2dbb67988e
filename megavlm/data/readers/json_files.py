"""Files of JSON as entries: one record a line, or one large array or object, of which only one record is held.

The records of an array are found by their brackets alone and parsed when an entry is loaded, so that a process skips
what others read at little cost, and a damaged or enormous record does not spoil the rest.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megavlm.data.readers.base import MIB, Bad, Container, Entry, ReadOptions, Record, kind_of
from megavlm.errors import DataError

LISTS = ("data", "annotations", "questions", "samples", "records")
"""Names under which an object holds its list of records, as DocVQA's and COCO's files do."""
PICTURE_LIST, PICTURE_ID, PICTURE_NAME = "images", "image_id", "file_name"
"""COCO's second list, of the pictures that its records name by a number; it stands before the records."""
NO_RECORDS = ("info", "license", "licenses", "meta", "metadata")
_BLOCK = MIB
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n"
# Unrolled, so that each piece between two backslashes or quotes is one step.
_INSIDE = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_STRING = re.compile(_INSIDE, re.DOTALL)
# Runs without brackets, strings included, then a bracket; or the quote of a string whose end is not in sight yet.
_NEXT = re.compile(rb'[^"{}\[\]]*+(?:"%b"[^"{}\[\]]*+)*+([{}\[\]"])' % _INSIDE, re.DOTALL)
_PLAIN = re.compile(rb'[^",\]}]*+(?:"%b"[^",\]}]*+)*+([,\]}"])' % _INSIDE, re.DOTALL)


def entries(path: Path, options: ReadOptions) -> Iterator[Entry]:
    """The records of a file, whichever of the three layouts it has."""
    most = options.most_record_mib * MIB
    try:
        with path.open("rb") as file:
            if has_lines(path, file, most):
                yield from _lines(file, most)
            else:
                yield from _items(_Scanner(file, str(path)), most)
    except OSError as error:
        raise DataError("source", str(path), f"cannot be read: {error.strerror}", "check the path") from None


def count(path: Path, options: ReadOptions) -> int:
    """How many entries there are."""
    return sum(1 for _ in entries(path, options))


JSON = Container(entries, count, (".json", ".jsonl", ".ndjson"))


def has_lines(path: Path, file: BinaryIO, most: int) -> bool:
    """Whether each line is a record; leaves the file at its start. The suffix decides, or else the first lines."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    try:
        first = file.readline(most).removeprefix(_BOM).strip() or file.readline(most).strip()
        second = file.readline(_BLOCK).strip()
        value = _object(first)
    except Bad:
        return False
    finally:
        file.seek(0)
    holds_records = any(isinstance(value.get(name), list) for name in LISTS)
    names_records = bool(value) and all(isinstance(item, dict) for item in value.values())
    return second.startswith(b"{") or not (second or holds_records or names_records)


def _lines(file: BinaryIO, most: int) -> Iterator[Entry]:
    is_first = True
    while line := file.readline(most + 1):
        if len(line) > most and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield functools.partial(_too_large, most)
        else:
            line = line.removeprefix(_BOM) if is_first else line
            if line.strip():
                yield functools.partial(_object, line)
        is_first = False


def _items(scanner: _Scanner, most: int) -> Iterator[Entry]:
    """The entries of the array, or of the object, that a file is."""
    scanner.skip_bom()
    opening = scanner.take()
    if opening == b"[":
        yield from _array(scanner, most)
    elif opening == b"{":
        yield from _members(scanner, most)
    else:
        scanner.fail(f"starts with {opening!r}, not with [ or {{" if opening else "is empty")
    if rest := scanner.take():
        scanner.fail(f"goes on with {rest!r} behind its last bracket")


def _array(scanner: _Scanner, most: int) -> Iterator[Entry]:
    if scanner.peek() == b"]":
        scanner.take()
        return
    while True:
        text = scanner.value(most)
        yield functools.partial(_too_large, most) if text is None else functools.partial(_object, text)
        following = scanner.take()
        if following == b"]":
            return
        if following != b",":
            scanner.fail(f"has {following!r} where , or ] was expected" if following else "breaks off")


def _members(scanner: _Scanner, most: int) -> Iterator[Entry]:
    """The records of an object: of the list that it holds, or its own members, named by their keys."""
    if scanner.peek() == b"}":
        scanner.take()
        return
    names: dict[int | str, str] = {}
    while True:
        key = scanner.key()
        opening = scanner.peek()
        if opening == b"[" and key == PICTURE_LIST:
            scanner.take()
            names = _picture_names(scanner, most)
        elif opening == b"[" and key in LISTS:
            scanner.take()
            for entry in _array(scanner, most):
                yield functools.partial(_with_picture, names, entry) if names else entry
        else:
            is_record = opening == b"{" and key not in NO_RECORDS
            text = scanner.value(most if is_record else 0)
            if is_record:
                yield functools.partial(_too_large, most) if text is None else functools.partial(_object, text, key)
        following = scanner.take()
        if following == b"}":
            return
        if following != b",":
            scanner.fail(f"has {following!r} where , or }} was expected" if following else "breaks off")


def _picture_names(scanner: _Scanner, most: int) -> dict[int | str, str]:
    """Id -> name of the file, of each picture that has both."""
    found: dict[int | str, str] = {}
    for entry in _array(scanner, most):
        try:
            record = entry()
        except Bad:
            continue  # what needs it will say that its picture is missing
        number, name = record.get("id"), record.get(PICTURE_NAME)
        if isinstance(number, int | str) and isinstance(name, str):
            found[number] = name
    return found


def _with_picture(names: dict[int | str, str], entry: Entry) -> Record:
    """The record, with the name of its picture where it has a number alone."""
    record = entry()
    number = record.get(PICTURE_ID)
    if isinstance(number, int | str) and number in names and PICTURE_NAME not in record:
        return {**record, PICTURE_NAME: names[number]}
    return record


class _Scanner:
    """A file of JSON, passed over once, value by value, with little of it in memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._text, self._at, self._passed = b"", 0, 0

    def fail(self, problem: str) -> NoReturn:
        """Say that the file is no JSON, and where."""
        place = f"{self._name} at byte {self._passed + self._at}"
        raise DataError("source", place, f"is no valid JSON: it {problem}", "mend the file, or download it again")

    def skip_bom(self) -> None:
        self._more()
        self._at = len(_BOM) if self._text.startswith(_BOM) else 0

    def peek(self) -> bytes:
        """The next byte that is not blank, without passing it; nothing at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at : self._at + 1]
                self._at += 1
            if not self._more():
                return b""

    def take(self) -> bytes:
        """The next byte that is not blank; the scanner passes it."""
        found = self.peek()
        self._at += len(found)
        return found

    def key(self) -> str:
        """The name of the next member, and the colon behind it."""
        if self.peek() != b'"':
            self.fail("has no name where one was expected")
        self._at += 1
        text = b""
        while True:
            match = _STRING.match(self._text, self._at)
            assert match is not None
            if match.end() < len(self._text) and self._text[match.end()] == 0x22:
                text, self._at = self._text[self._at : match.end()], match.end() + 1
                break
            if len(self._text) - self._at > MIB or not self._more():
                self.fail("has a name without an end")
        if self.take() != b":":
            self.fail("has no colon behind a name")
        try:
            return str(json.loads(b'"' + text + b'"'))
        except ValueError:
            return text.decode(errors="replace")

    def value(self, most: int) -> bytes | None:
        """The text of the next value; None, with the value passed over, where it is longer than that."""
        if self.peek() not in (b"{", b"["):
            return self._plain(most)
        depth, look = 0, 0  # brackets that are open, and bytes behind `_at` that are looked through
        is_kept = True
        while True:
            match = _NEXT.match(self._text, self._at + look)
            if match is not None and match[1] != b'"':
                depth += 1 if match[1] in b"{[" else -1
                look = match.end() - self._at
                if depth == 0:
                    text = self._text[self._at : match.end()]
                    self._at = match.end()
                    return text if is_kept and len(text) <= most else None
                continue
            look = (match.start(1) if match else len(self._text)) - self._at
            is_kept = is_kept and len(self._text) - self._at <= most
            if not is_kept:
                self._at, look = self._at + look, 0
            if not is_kept and match is not None and len(self._text) - self._at > MIB:
                self._pass_string()
            elif not self._more():
                self.fail("breaks off within a record")

    def _plain(self, most: int) -> bytes | None:
        """A value without brackets: a number, a word, a string."""
        is_kept = True
        while True:
            match = _PLAIN.match(self._text, self._at)
            if match is not None and match[1] != b'"':
                text = self._text[self._at : match.start(1)]
                self._at = match.start(1)
                return text if is_kept and len(text) <= most else None
            if len(self._text) - self._at > MIB:
                is_kept = False
                self._at = match.start(1) if match else len(self._text)
            if not is_kept and match is not None:
                self._pass_string()
            elif not self._more():
                self.fail("breaks off within a value")

    def _pass_string(self) -> None:
        """Pass over a string, however long, from its opening quote."""
        self._at += 1
        while True:
            match = _STRING.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) and self._text[self._at] == 0x22:
                self._at += 1
                return
            if not self._more():
                self.fail("breaks off within a string")

    def _more(self) -> bool:
        """Read on, as much again as there is, so that a long value is looked at few times; drop what is passed."""
        kept = self._text[self._at :]
        block = self._file.read(max(_BLOCK, len(kept)))
        self._passed += self._at
        self._text, self._at = kept + block, 0
        return bool(block)


def _object(text: bytes, key: str | None = None) -> Record:
    """The record that a piece of JSON is; the key that it stood under becomes its id, where it has none."""
    try:
        value: Any = json.loads(text.decode())
    except UnicodeDecodeError:
        raise Bad("not UTF-8: the record does not decode") from None
    except (ValueError, RecursionError) as error:
        raise Bad(f"no JSON: {getattr(error, 'msg', None) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise Bad(f"wrong type: the record is {kind_of(value)}, not an object")
    return value if key is None else {"id": key, **value}


def _too_large(most: int) -> Record:
    raise Bad(f"record too large: more than {most // MIB} MiB")
