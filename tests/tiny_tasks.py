"""Rows of the benchmarks as their parquet files hold them, and a method as a user writes it."""

import io

import pytest
from PIL import Image

from nanovlm_v2drop.tasks.mme import COGNITION, PERCEPTION
from nanovlm_v2drop.tasks.pope import CATEGORIES

OWN_METHOD = '''
from nanovlm_v2drop import TokenDropper

class Own(TokenDropper):
    name = "own"

    def score(self, state):
        return state.hidden_states.float().norm(dim=-1)

class Half(TokenDropper):
    name = "half"
'''


def picture_bytes(color, size=(4, 3), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def pope_rows(pictures=4):
    """Per category and picture one yes and one no question; the picture's number is its red value."""
    return [
        {
            "id": str(index),
            "question_id": str(question),
            "question": f" Is there a thing {question} in the image? ",
            "answer": "no" if question % 2 else "yes",
            "category": category,
            "image_source": f"COCO_{question // 2}",
            "image": {"bytes": picture_bytes((question // 2, 0, 0)), "path": None},
        }
        for index, (category, question) in enumerate(
            (category, question) for category in reversed(CATEGORIES) for question in range(2 * pictures)
        )
    ]


def mme_rows(pictures=3, categories=PERCEPTION + COGNITION):
    return [
        {
            "question_id": f"{category}/{picture:04}.png",
            "question": f"Is this {answer}? Please answer yes or no.",
            "answer": answer,
            "category": category,
            "image": {"bytes": picture_bytes((picture, 0, 0)), "path": "a.png"},
        }
        for category in categories
        for picture in range(pictures)
        for answer in ("Yes", "No")
    ]


def write_shards(folder, rows, shards=2, split="test", place="data"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / place).mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        file = folder / place / f"{split}-{shard:05}-of-{shards:05}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows[shard * size : (shard + 1) * size]), file)
    return folder
