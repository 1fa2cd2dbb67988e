"""Hugging Face parquet in the manner of FineVision and The Cauldron: pictures as bytes in a column, turns in another.

Their texts carry no tags: all pictures stand in front of the first question, in the column's order.
"""

from megavlm.data.readers.base import Reader
from megavlm.data.readers.conversation import tagged
from megavlm.data.readers.parquet_files import PARQUET

HF_PARQUET = Reader("parquet with image bytes, and texts (user, assistant), conversations or messages", PARQUET, tagged)
