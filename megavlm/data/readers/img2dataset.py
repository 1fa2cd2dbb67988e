"""The WebDataset tars that img2dataset writes (LAION, COYO, LAION-COCO, PMD): a picture and its caption, a document."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.data.readers.base import Bad, Context, Reader, Record
from megavlm.data.readers.tar_files import TAR
from megavlm.data.readers.tar_records import TarRecord, pictures_of, tar_record
from megavlm.data.sample import IMAGE_TAG, Sample

CAPTION_FIELDS = ("caption", "text", "TEXT")


def _pair(record: Record, context: Context) -> Iterator[Sample]:
    yield pair_of(tar_record(record), context)


def pair_of(parts: TarRecord, context: Context) -> Sample:
    """The picture and what is said of it: `<image>caption`, blanks around the caption stripped."""
    caption = parts.text
    if caption is None and isinstance(parts.data, dict):
        caption = next((parts.data[name] for name in CAPTION_FIELDS if isinstance(parts.data.get(name), str)), None)
    if caption is None:
        raise Bad(f"no caption: {parts.found}")
    if len(parts.pictures) != 1:
        raise Bad(f"no pair: {len(parts.pictures)} pictures; {parts.found}")
    if IMAGE_TAG in caption:
        raise Bad(f"tags and pictures disagree: the caption says {IMAGE_TAG}")
    return Sample("", pictures_of(parts, context), text=IMAGE_TAG + caption.strip())


IMG2DATASET = Reader("img2dataset's tars: a picture beside txt, or json with a caption", TAR, _pair)
