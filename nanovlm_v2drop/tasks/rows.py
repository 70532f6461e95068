"""One row of a data set, and what its cells hold; a cell of another kind is an error that names its place."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.images import open_image


@dataclass(frozen=True)
class Row:
    """One row: its values by column, its file and its number in that file (from 0), and the id of its sample once known.

    The methods read one cell each. They raise ValueError with the file, the row and the sample for a cell of another kind.
    """

    values: dict[str, Any]
    file: Path
    number: int
    sample_id: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}" + (f", sample {self.sample_id}" if self.sample_id else "")

    def named(self, sample_id: str) -> "Row":
        return replace(self, sample_id=sample_id)

    def text(self, column: str) -> str:
        value = self.values[column]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.place}: the {column} is {shown(value)}, not a text")
        return value

    def key(self, column: str) -> str:
        """A text, or a whole number as a text: data sets write their ids in either way."""
        value = self.values[column]
        return str(value) if type(value) is int else self.text(column)

    def text_or_none(self, column: str) -> str | None:
        """A text, which may be empty, or None for null."""
        value = self.values[column]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.place}: the {column} is {shown(value)}, not a text")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.values[column]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{self.place}: the {column} is {shown(value)}, not a list of texts")
        return tuple(value)

    def options(self, column: str) -> tuple[str, ...]:
        """The options of a multiple-choice question: a list of 2 to 26 texts, which get the letters from A on."""
        found = self.texts(column)
        if not 2 <= len(found) <= 26:
            raise ValueError(f"{self.place}: the {column} has {len(found)} options; a question has from 2 to 26")
        return found

    def one_of(self, column: str, allowed: str) -> str:
        """The letter of the right option, one of `allowed`, without white space and in capitals."""
        letter = self.text(column).strip().upper()
        if len(letter) != 1 or letter not in allowed:
            value = shown(self.values[column])
            raise ValueError(f"{self.place}: the {column} is {value}, none of the letters {', '.join(allowed)}")
        return letter

    def letter(self, column: str, num_options: int) -> str:
        """The letter of an option whose number (from 0, an integer or its digits) a cell holds."""
        number = self.key(column)
        if not number.isdecimal() or int(number) >= num_options:
            value = shown(self.values[column])
            raise ValueError(f"{self.place}: the {column} is {value}, no number of one of the {num_options} options")
        return chr(ord("A") + int(number))

    def yes_or_no(self, column: str, dataset: str) -> str:
        """A ground truth as "yes" or "no", whatever its case."""
        label = self.text(column).strip().lower().removesuffix(".")
        if label not in ("yes", "no"):
            value = shown(self.values[column])
            raise ValueError(f"{self.place}: the ground truth is {value}, not yes or no; is this {dataset}?")
        return label

    def picture(self, column: str) -> Image.Image:
        """The picture in a cell; see `decode_picture`."""
        return decode_picture(self.values[column], f"{self.place}, column {column}")

    def pictures(self, column: str) -> tuple[Image.Image, ...]:
        """The pictures in a cell that holds a list of one or more."""
        cells = self.values[column]
        if not isinstance(cells, list) or not cells:
            raise ValueError(f"{self.place}: the {column} is {shown(cells)}, not a list of pictures")
        return tuple(decode_picture(cell, f"{self.place}, column {column}") for cell in cells)


def json_rows(file: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a JSON file that holds a list of objects, with these columns; others are left out.

    Raises ValueError with the file, and the row, for anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({str(error).partition(chr(10))[0]}); fetch it again") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{file} is no list of objects; fetch it again")
    for number, one in enumerate(found):
        if missing := [column for column in columns if column not in one]:
            raise ValueError(f"{file}, row {number} has no column {', '.join(missing)}; it has: {', '.join(one)}")
    return [Row({column: one[column] for column in columns}, file, number) for number, one in enumerate(found)]


def decode_picture(cell: object, place: str) -> Image.Image:
    """A picture as data sets store it: {"bytes", "path"}, as the datasets library does, or the bytes alone; see open_image.

    Raises ValueError with the `place` of the cell for anything else and for damaged bytes.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes) or not data:
        kind = f"a {type(cell).__name__} without bytes" if isinstance(cell, dict | bytes) else shown(cell)
        raise ValueError(f"{place}: {kind} is not a picture; use parquet files with embedded pictures")
    try:
        return open_image(data)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def shown(value: object) -> str:
    """A value for a message, on one line and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
