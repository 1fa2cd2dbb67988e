"""Tars as Python writes them, damaged ones, and ours in the hands of Python."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import numpy as np
import pytest

from megavlm.data.tar_format import BLOCK, DamagedTar, TarReader, member_header, padding


def read_all(data: bytes) -> list[tuple[str, bytes | None]]:
    """(name, content of files) of an archive's members."""
    reader = TarReader(io.BytesIO(data), len(data))
    found = [(member.name, reader.read(member) if member.is_file else None) for member in reader]
    reader.finish()
    return found


def archive(add: Callable[[tarfile.TarFile], None], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        add(tar)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_python_writes(kind: int) -> None:
    rng = np.random.default_rng(kind)
    files: list[tuple[str, bytes | None]] = []
    lengths = [10, 99, 100, 101, 140] if kind == tarfile.USTAR_FORMAT else [10, 99, 100, 101, 140, 255, 300, 5000]
    for number, length in enumerate(lengths):
        name = f"{number}/" + "x" * (length // 2) + "/" + "y" * (length // 2)
        files.append((name, rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 3000])))))
    files.append(("é.json" if kind != tarfile.USTAR_FORMAT else "e.json", b"{}"))

    def add(tar: tarfile.TarFile) -> None:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content or b""), 1.5 if kind == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content or b""))
        for number, special in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)):
            info = tarfile.TarInfo(f"special-{number}")
            info.type, info.linkname = special, "/etc/" + "passwd" * (40 if kind == tarfile.GNU_FORMAT else 1)
            tar.addfile(info)

    assert read_all(archive(add, kind)) == [
        *files,
        *((f"special-{number}", None) for number in range(3)),
        ("special-3/", None),
    ]


def test_python_reads_what_is_written() -> None:
    contents = {f"{size:06d}.json": bytes(range(256)) * (size // 256 + 1) for size in (1, 255, 511, 1023)}
    data = b"".join(member_header(name, len(c)) + c + padding(len(c)) for name, c in contents.items())
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * BLOCK))) as tar:
        members = tar.getmembers()
        assert {m.name: tar.extractfile(m).read() for m in members} == contents  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}


def test_sizes_from_pax_and_base_256_are_taken() -> None:
    header = bytearray(member_header("a.json", 0))
    for big, encoded in ((3, b"\x80" + (3).to_bytes(11, "big")),):
        header[124:136] = encoded
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        assert read_all(bytes(header) + b"abc" + padding(big) + bytes(1024)) == [("a.json", b"abc")]
    pax = b"10 size=3\n"
    extra = bytearray(member_header("x", len(pax)))
    extra[156:157] = b"x"
    extra[148:156] = b"%06o\0 " % (sum(extra[:148]) + 256 + sum(extra[156:]))
    data = bytes(extra) + pax + padding(len(pax)) + member_header("a.json", 0) + b"abc" + padding(3)
    assert read_all(data + bytes(1024)) == [("a.json", b"abc")]


def changed(header: bytes, place: slice, value: bytes) -> bytes:
    """The header with a field replaced and its checksum made right."""
    new = bytearray(header)
    new[place] = value
    new[148:156] = b"%06o\0 " % (sum(new[:148]) + 256 + sum(new[156:]))
    return bytes(new)


SIZE, TYPE = slice(124, 136), slice(156, 157)
PLAIN = member_header("a.json", 3)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "without an end mark"),
        (b"abc", "without an end mark"),
        (bytes(512), "without an end mark"),
        (PLAIN, "reaches past the end"),
        (changed(PLAIN, SIZE, b"77777777777\0"), "reaches past the end"),
        (changed(PLAIN, SIZE, b"\x80" + b"\xff" * 11), "reaches past the end"),
        (changed(PLAIN, SIZE, b"\xff" * 12), "header is damaged"),
        (changed(PLAIN, SIZE, b"00000000-3\0\0"), "header is damaged"),
        (PLAIN[:10] + b"x" + PLAIN[11:], "header is damaged"),
        (changed(PLAIN, TYPE, b"S") + bytes(2048), "with holes"),
        (changed(member_header("x", 10), TYPE, b"x") + b"99 size=3\n" + bytes(2048), "PAX header"),
        (changed(member_header("x", 11), TYPE, b"x") + b"11 size=-3\n" + bytes(2048), "PAX header"),
        (changed(member_header("x", 2**17), TYPE, b"L") + bytes(2**18), "name is too long"),
        (bytes(512) + PLAIN + bytes(2048), "empty block stands between"),
        (bytes(1024) + PLAIN + bytes(2048), "something follows the end"),
    ],
)
def test_damage_is_told(data: bytes, problem: str) -> None:
    with pytest.raises(DamagedTar, match=problem):
        read_all(data)


def test_a_cut_anywhere_is_told() -> None:
    data = PLAIN + b"abc" + padding(3) + member_header("b.json", 600) + bytes(600) + padding(600) + bytes(1024)
    assert [name for name, _ in read_all(data)] == ["a.json", "b.json"]
    for length in range(len(data)):
        with pytest.raises(DamagedTar):
            read_all(data[:length])
