"""Pairs and conversations in tars: img2dataset's and Infinity-MM's, whole and broken."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from foreign_data import END_OF_TAR, llava_record, picture, read_all, write_tar

from megavlm.data.sample import Picture, Turn
from megavlm.errors import DataError


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz"])
def test_img2dataset_gives_documents(tmp_path: Path, name: str) -> None:
    members = [
        ("000000000.jpg", picture(0, "JPEG")),
        ("000000000.txt", " A Ünit \n".encode()),
        ("000000000.json", as_json({"caption": "not this one", "key": "000000000"})),
        ("000000001.json", as_json({"caption": "From json.", "url": "http://a"})),
        ("000000001.webp", picture(1, "WEBP")),
        ("notes", b"no suffix, no member of a record"),
        ("._000000001.jpg", b"what another system leaves"),
        ("000000002.json", as_json({"caption": "no picture"})),
        ("000000003.png", picture(3)),
        ("000000004.png", picture(4)),
        ("000000004.txt", b"\xff"),
        ("000000005.png", b""),
        ("000000005.txt", b"empty picture"),
        ("000000006.png", picture(6)),
        ("000000006.txt", b"a <image> of a tag"),
        ("000000007.png", picture(7)),
        ("000000007.txt", b" \n"),
    ]
    samples, refusals = read_all(write_tar(tmp_path / name, members), "img2dataset")
    assert [sample.text for sample in samples] == ["<image>A Ünit", "<image>From json."]
    assert [sample.pictures for sample in samples] == [
        (Picture((picture(0, "JPEG"),)),),
        (Picture((picture(1, "WEBP"),)),),
    ]
    assert samples[0].id == f"000000000@{name}:0"
    assert [refusal.reason.partition(":")[0] for refusal in refusals] == [
        "no pair",
        "no caption",
        "not UTF-8",
        "picture empty",
        "tags and pictures disagree",
        "no text",
    ]
    assert "members json; json with caption" in refusals[0].reason


def test_infinity_mm_takes_the_pictures_of_a_record_whatever_it_calls_them(tmp_path: Path) -> None:
    members = [
        ("stage/a.json", as_json(llava_record("x", "/data/1.jpg"))),
        ("stage/a.jpg", picture(0, "JPEG")),
        ("stage/b.0.png", picture(1)),
        ("stage/b.1.png", picture(2)),
        ("stage/b.json", as_json(llava_record("y", ["1", "2"]))),
        ("stage/c.json", as_json(llava_record("z"))),
        ("stage/d.json", as_json([llava_record("l0"), llava_record("l1")])),
        ("stage/e.jpg", picture(3, "JPEG")),
        ("stage/e.txt", b"A pair."),
        ("stage/f.json", as_json(llava_record("no picture", "1.jpg"))),
        ("stage/g.json", as_json(llava_record("two tags", ["1", "2"]))),
        ("stage/g.jpg", picture(4)),
        ("stage/h.cbor", b"?"),
        ("stage/i.json", as_json({"question": "?"})),
        ("stage/j.json", b"{"),
        ("stage/k.json", as_json([1])),
    ]
    samples, refusals = read_all(write_tar(tmp_path / "0.tar", members), "infinity-mm")
    assert [sample.id for sample in samples] == [
        "stage/a@0.tar:0",
        "stage/b@0.tar:1",
        "stage/c@0.tar:2",
        "stage/d@0.tar:3/0",
        "stage/d@0.tar:3/1",
        "stage/e@0.tar:4",
    ]
    assert samples[1].pictures == (Picture((picture(1),)), Picture((picture(2),)))
    assert samples[2].turns == (Turn("user", "What?"), Turn("assistant", "A thing."))
    assert samples[5].text == "<image>A pair."
    assert [refusal.reason for refusal in refusals] == [
        "picture missing: the json has image, and members json; json with id, conversations, image",
        "tags and pictures disagree: 2 <image>, 1 pictures given",
        "layout unknown: members cbor",
        "layout unknown: members json; json with question",
        "no JSON: Expecting property name enclosed in double quotes",
        "wrong type: a record is a number, not an object; members json",
    ]


def test_links_and_strange_names_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.png"
            tar.addfile(info)
        for name, content in (
            ("../x.png", picture(0)),
            ("../x.txt", b"up"),
            ("/y.png", picture(1)),
            ("/y.txt", b"root"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples, refusals = read_all(path, "img2dataset")
    assert [sample.text for sample in samples] == ["<image>up", "<image>root"]  # labels, read in memory
    assert refusals == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["0.tar", "secret.png"]


def test_a_tar_cut_anywhere_gives_what_it_holds_and_says_so(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "whole.tar", [m for k in range(3) for m in ((f"{k}.png", picture(k)), (f"{k}.txt", b"x"))]
    )
    data = whole.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % tarfile.BLOCKSIZE)
    expected = read_all(whole, "img2dataset")[0]
    assert len(expected) == 3
    cut = tmp_path / "whole_cut.tar"
    for size in range(tarfile.BLOCKSIZE, len(data) + 1, tarfile.BLOCKSIZE):
        cut.write_bytes(data[:size])
        samples, refusals = read_all(cut, "img2dataset")
        assert [sample.text for sample in samples] == [sample.text for sample in expected[: len(samples)]], size
        assert refusals, size
        assert refusals[-1].reason.startswith("tar damaged"), size
    assert len(samples) == 3  # the last cut took the end mark alone
    cut.write_bytes(data + bytes(END_OF_TAR))
    assert read_all(cut, "img2dataset")[1] == []


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"{k}.txt", b"x") for k in range(3)])
    data = bytearray(path.read_bytes())
    data[2 * 2 * tarfile.BLOCKSIZE + 5] ^= 1
    path.write_bytes(data)
    refusals = read_all(path, "img2dataset")[1]
    assert [refusal.reason.partition(":")[0] for refusal in refusals] == ["no caption"] * 0 + ["no pair"] * 2 + [
        "tar damaged"
    ]


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    for content in (b"", b"no tar" * 500):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no tar"):
            read_all(path, "img2dataset")


def test_an_enormous_record_is_refused_unread(tmp_path: Path) -> None:
    members = [("a.txt", bytes(2 << 20)), ("a.png", picture(0)), ("b.png", picture(1)), ("b.txt", b"b")]
    for name in ("0.tar", "0.tgz"):
        samples, refusals = read_all(write_tar(tmp_path / name, members), "img2dataset", most_record_mib=1)
        assert [sample.text for sample in samples] == ["<image>b"]
        assert refusals[0].reason == "record too large: a has more than 1 MiB"
