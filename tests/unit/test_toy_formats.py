"""The toy world in the formats of real data sets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megavlm.data.sample import IMAGE_TAG
from megavlm.data.toy_world.formats import obelics_lists, write_img2dataset, write_llava
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import ToyWorld
from megavlm.errors import DataError


def test_llava_json_holds_conversations_and_captions(tmp_path: Path) -> None:
    samples = [
        sample for kind in ("chat", "multi_image", "text", "pairs") for sample in toy_samples(kind, "train", 0, 4)
    ]
    entries = json.loads(write_llava(samples, tmp_path).read_text())
    assert [entry["id"] for entry in entries] == [sample.id for sample in samples]
    for entry, sample in zip(entries, samples, strict=True):
        names = [entry["image"]] if isinstance(entry.get("image"), str) else entry.get("image", [])
        assert [(tmp_path / name).read_bytes() for name in names] == [one.files[0] for one in sample.pictures]
        spoken = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        roles = [{"user": "human", "assistant": "gpt"}[turn.role] for turn in sample.turns]
        turns = list(zip(roles, [turn.text for turn in sample.turns], strict=True))
        assert spoken == (turns or [("human", IMAGE_TAG), ("gpt", sample.text.removeprefix(IMAGE_TAG))])


@pytest.mark.parametrize("picture_format", ["png", "jpeg"])
def test_img2dataset_tars_hold_pairs(tmp_path: Path, picture_format: str) -> None:
    world = ToyWorld.from_dict({"picture_format": picture_format})
    suffix = {"png": "png", "jpeg": "jpg"}[picture_format]
    samples = list(toy_samples("pairs", "train", 0, 5, world))
    tars = write_img2dataset(samples, tmp_path / "one", 2)
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    members: dict[str, bytes] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file
                members[member.name] = file.read()
    keys = ["000000000", "000000001", "000010000", "000010001", "000020000"]
    assert list(members) == [f"{key}.{end}" for key in keys for end in (suffix, "json", "txt")]
    for key, sample in zip(keys, samples, strict=True):
        assert IMAGE_TAG + members[key + ".txt"].decode() == sample.text
        assert json.loads(members[key + ".json"])["key"] == key
        assert Image.open(io.BytesIO(members[f"{key}.{suffix}"])).size == (64, 64)
    again = write_img2dataset(samples, tmp_path / "other", 2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in tars]


def test_obelics_lists_hold_a_picture_or_a_text_at_each_place() -> None:
    for sample in toy_samples("documents", "train", 0, 20):
        images, texts = obelics_lists(sample)
        assert all((image is None) != (text is None) for image, text in zip(images, texts, strict=True))
        assert [image for image in images if image] == [one.files[0] for one in sample.pictures]
        told = " ".join(IMAGE_TAG if text is None else text for text in texts)
        assert told.replace(IMAGE_TAG + " ", IMAGE_TAG) == sample.text


def test_documents_fit_neither_pairs_nor_conversations(tmp_path: Path) -> None:
    sample = next(toy_samples("documents", "train", 0, 1))
    for write in (write_llava, write_img2dataset):
        with pytest.raises(DataError, match=sample.id):
            write([sample], tmp_path)
