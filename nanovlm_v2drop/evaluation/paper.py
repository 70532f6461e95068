"""The result tables of V2Drop's paper, and the average of a run over the same benchmarks. Nothing here imports torch.

Numbers: arXiv 2509.01552 (CVPR 2026), tables 1 to 4, which give no intervals and no number of seeds. "Average" is the mean over
the benchmarks of a method's score as a percentage of the dense score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .method_names import DENSE

SAME_BUDGET = 0.005  # two shares of the vision tokens that differ by less are one budget

# Column of a table -> our task, the number of its summary, and what that number is multiplied by.
COLUMNS: dict[str, tuple[str, str, float]] = {
    "GQA": ("gqa", "score", 1),
    "SQA": ("scienceqa", "score", 1),
    "TextVQA": ("textvqa-ocr", "score", 1),  # the dense 58.2 is LLaVA-1.5's own number, which is with OCR tokens
    "POPE": ("pope", "f1_mean_of_categories", 100),  # the dense 85.9 is the mean of LLaVA-1.5's three F1 scores
    "MME": ("mme", "score", 1),
    "MMB": ("mmbench", "score", 1),
    "AI2D": ("ai2d", "score", 1),
    "MMStar": ("mmstar", "score", 1),
    "MVBench": ("mvbench", "score", 1),
    "VideoMME": ("videomme", "score", 1),
}
LLAVA_COLUMNS = ("GQA", "SQA", "TextVQA", "POPE", "MME", "MMB")
QWEN_COLUMNS = ("AI2D", "MMStar", "SQA", "POPE", "MME", "MMB")
VIDEO_COLUMNS = ("MVBench", "VideoMME")
PAPER_TASKS = ("paper-image", "paper-video")  # what --tasks takes in place of names of tasks

Numbers = tuple[float | None, ...]  # one a column; None where the source of these tables has lost a cell


@dataclass(frozen=True)
class PaperRow:
    """A method at a budget, which is a share of the vision tokens; `average` is in percent of the dense row.

    `method` is the paper's name. `name` is ours, "" where the method is not in this project.
    """

    budget: str
    retain: float
    method: str
    name: str
    numbers: Numbers
    average: float


@dataclass(frozen=True)
class PaperTable:
    """One table: the model by our name, where it stands, its benchmarks, the dense row and the others.

    `extra` are columns that the table has beside those of the average.
    """

    model: str
    title: str
    columns: tuple[str, ...]
    dense: Numbers
    rows: tuple[PaperRow, ...]
    extra: tuple[str, ...] = ()


def at(budget: str, retain: float, *rows: tuple[str, str, Numbers, float]) -> tuple[PaperRow, ...]:
    return tuple(PaperRow(budget, retain, *row) for row in rows)


TABLES = (
    PaperTable(
        "llava-1.5-7b",
        "table 1, LLaVA-1.5-7B",
        LLAVA_COLUMNS,
        (61.9, 69.5, 58.2, 85.9, 1862, 64.6),
        (
            *at(
                *("192 of 576 tokens", 192 / 576),
                ("ToMe", "tome", (54.3, 65.2, 52.1, 72.4, 1563, 60.5), 88.8),
                ("FastV", "fastv", (52.7, 67.3, 52.5, 64.8, 1612, 61.2), 88.2),
                ("HiRED", "", (58.7, 68.4, 47.4, 82.8, 1737, 62.8), 93.6),
                ("PruMerge", "", (54.3, 67.9, 54.3, 71.3, 1632, 59.6), 90.3),
                ("SparseVLM", "sparsevlm", (57.6, 69.1, 56.1, 83.6, 1721, 62.5), 95.9),
                ("PyramidDrop", "pdrop", (57.1, 68.8, 56.1, 82.3, 1766, 63.2), 96.0),
                ("V2Drop", "v2drop", (58.5, 69.3, 55.6, 85.1, 1826, 63.7), 97.6),
            ),
            *at(
                *("128 of 576 tokens", 128 / 576),
                ("ToMe", "tome", (52.4, 59.6, 49.1, 62.8, 1343, 53.3), 80.4),
                ("FastV", "fastv", (49.6, 60.2, 50.6, 59.6, 1490, 56.1), 81.7),
                ("HiRED", "", (57.2, 68.1, 46.1, 79.8, 1710, 61.5), 91.6),
                ("PruMerge", "", (53.3, 67.1, 54.3, 67.2, 1554, 58.1), 87.9),
                ("SparseVLM", "sparsevlm", (56.0, 67.1, 54.9, 80.5, 1696, 60.0), 93.2),
                ("PyramidDrop", "pdrop", (56.0, 68.3, 54.8, 82.3, 1644, 61.1), 93.6),
                ("V2Drop", "v2drop", (56.3, 68.8, 53.8, 80.9, 1712, 61.8), 94.0),
            ),
            *at(
                *("64 of 576 tokens", 64 / 576),
                ("ToMe", "tome", (48.6, 50.0, 45.3, 52.5, 1138, 43.7), 69.7),
                ("FastV", "fastv", (46.1, 51.1, 47.8, 48.0, 1256, 48.0), 71.3),
                ("PruMerge", "", (51.9, 68.1, 54.0, 65.3, 1549, 55.2), 86.5),
                ("SparseVLM", "sparsevlm", (52.7, 62.2, 51.8, 75.1, 1505, 56.2), 86.5),
                ("PyramidDrop", "pdrop", (41.9, 68.6, 45.9, 55.9, 1092, 33.3), 70.1),
                ("V2Drop", "v2drop", (50.5, 68.9, 51.8, 75.1, 1470, 55.2), 86.9),
            ),
        ),
    ),
    PaperTable(
        "qwen2-vl-7b",
        "table 2, Qwen2-VL-7B",
        QWEN_COLUMNS,
        (None, None, 84.7, 86.1, 2317, 80.5),
        (
            *at(
                *("66.7 % fewer tokens", 1 / 3),
                ("FastV", "fastv", (76.1, 52.8, 80.0, 82.1, 2130, 76.1), 92.9),
                ("DART", "dart", (78.0, 53.4, 81.4, 83.9, 2245, 78.9), 95.5),
                ("V2Drop", "v2drop", (78.0, 53.5, 81.6, 87.2, 2224, 78.7), 96.0),
            ),
            *at(
                *("77.8 % fewer tokens", 2 / 9),
                ("FastV", "fastv", (73.8, 49.3, 78.3, 79.2, 2031, 74.1), 89.5),
                ("DART", "dart", (74.4, 48.5, 79.6, 82.1, 2175, 77.3), 91.8),
                ("V2Drop", "v2drop", (75.6, 48.7, 78.9, 85.1, 2173, 75.8), 92.3),
            ),
        ),
    ),
    PaperTable(
        "qwen2-vl-7b",
        "table 3, Qwen2-VL-7B on video",
        VIDEO_COLUMNS,
        (66.1, 57.7, 70.4, 54.6, 48.0),
        at(
            *("20 % of the tokens", 0.2),
            ("FastV", "fastv", (50.9, 49.4, 58.2, 45.7, 44.4), 81.3),
            ("DART", "dart", (58.9, 53.0, 64.1, 49.4, 45.4), 90.5),
            ("V2Drop", "v2drop", (62.1, 53.5, 63.7, 51.0, 45.9), 93.3),
        ),
        ("short", "medium", "long"),
    ),
    PaperTable(
        "llava-onevision-qwen2-7b-ov",
        "table 4, LLaVA-OneVision-7B on video",
        VIDEO_COLUMNS,
        (56.9, 58.5, 70.0, 56.6, 48.9),
        (
            *at("30 % of the tokens", 0.3, ("DyCoke", "dycoke", (56.6, 56.1, 67.1, 54.6, 46.6), 97.7)),
            *at(
                *("25 % of the tokens", 0.25),
                ("FastV", "fastv", (55.5, 55.3, 65.0, 53.8, 47.0), 96.0),
                ("SparseVLM", "sparsevlm", (56.3, 57.3, 68.4, 55.2, 48.1), 98.4),
                ("PyramidDrop", "pdrop", (55.3, 55.5, 64.7, 53.1, 48.7), 96.0),
                ("DyCoke", "dycoke", (49.5, 51.0, 61.1, 48.6, 43.2), 87.1),
                ("V2Drop", "v2drop", (56.4, 57.4, 68.2, 54.6, 49.6), 98.6),
            ),
            *at(
                *("15 % of the tokens", 0.15),
                ("FastV", "fastv", (51.6, 48.1, 51.4, 49.4, 43.3), 86.5),
                ("SparseVLM", "sparsevlm", (52.9, 53.4, 61.0, 52.1, 47.0), 92.1),
                ("PyramidDrop", "pdrop", (53.2, 50.1, 58.7, 48.7, 45.0), 89.6),
                ("V2Drop", "v2drop", (53.9, 54.4, 64.1, 51.4, 47.7), 93.9),
            ),
        ),
        ("short", "medium", "long"),
    ),
)


def named_numbers(table: PaperTable, row: PaperRow) -> dict[str, float]:
    """The numbers of a row by their columns, and the average."""
    known = zip((*table.columns, *table.extra), row.numbers, strict=True)
    return {**{column: number for column, number in known if number is not None}, "average %": row.average}


def shown(number: float | None) -> str:
    """Points of MME without a digit behind the point, percentages with one, "-" for a number that is not known."""
    return "-" if number is None else f"{number:.0f}" if number >= 1000 else f"{number:.1f}"


def columns_for(name: str, model: str) -> tuple[str, ...]:
    """The benchmarks of one of PAPER_TASKS. Qwen's models take those of table 2 on pictures, all others those of table 1."""
    if name == "paper-video":
        return VIDEO_COLUMNS
    return QWEN_COLUMNS if model.rpartition("/")[2].lower().startswith("qwen") else LLAVA_COLUMNS


def expanded(names: Sequence[str], model: str) -> list[str]:
    """Names of tasks, in which each of PAPER_TASKS is replaced by its tasks for this model; each task once."""
    lists = {name: [COLUMNS[column][0] for column in columns_for(name, model)] for name in PAPER_TASKS}
    return list(dict.fromkeys(task for name in names for task in lists.get(name, [name])))


@dataclass(frozen=True)
class AverageRow:
    """One line over all benchmarks of a list: ours, with the key of its first plan, or the paper's for the same one."""

    label: str
    asked: str
    numbers: Numbers
    average: float | None
    plan: str = ""


def averages(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, list[AverageRow]]:
    """For each of PAPER_TASKS that the rows of a run cover whole, its lines; below each the paper's, where it has one."""
    tasks = {row["task"] for row in rows}
    lists = {name: columns_for(name, model) for name in PAPER_TASKS}
    whole = {name: columns for name, columns in lists.items() if {COLUMNS[column][0] for column in columns} <= tasks}
    return {name: average_rows(rows, model, columns) for name, columns in whole.items()}


def average_rows(rows: Sequence[Mapping[str, Any]], model: str, columns: tuple[str, ...]) -> list[AverageRow]:
    """The methods and budgets that answered every benchmark, in the order of the first; dense is 100 % where it ran."""
    by_row: dict[tuple[str, Any], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_row.setdefault((row["label"], row["asked_share"] or row["asked_tokens"]), {})[row["task"]] = row
    tasks = [COLUMNS[column][0] for column in columns]
    complete = [own for own in by_row.values() if all(task in own for task in tasks)]
    dense = next((numbers_of(own, columns) for own in complete if own[tasks[0]]["method"] == DENSE), None)
    found = []
    for own in complete:
        first, numbers = own[tasks[0]], numbers_of(own, columns)
        found.append(AverageRow(first["label"], budget_of(first), numbers, relative_average(numbers, dense), first["plans"][0]))
        found += paper_rows(first, model, columns)
    return found


def numbers_of(own: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> tuple[float, ...]:
    places = [COLUMNS[column] for column in columns]
    return tuple(times * own[task]["metrics"][metric] for task, metric, times in places)


def relative_average(numbers: Sequence[float], dense: Sequence[float] | None) -> float | None:
    """The mean of the numbers' percentages of dense's; None without dense, or where dense scored 0."""
    if dense is None or not all(dense):
        return None
    return 100 * fmean(one / whole for one, whole in zip(numbers, dense, strict=True))


def budget_of(row: Mapping[str, Any]) -> str:
    if row["asked_share"] is not None:
        return f"{100 * row['asked_share']:.1f} %"
    return "-" if row["asked_tokens"] is None else f"{row['asked_tokens']:g}"


def paper_rows(row: Mapping[str, Any], model: str, columns: tuple[str, ...]) -> list[AverageRow]:
    """The paper's line for this model, method and budget; none where the paper has none."""
    tables = [table for table in TABLES if table.model == model and table.columns == columns]
    if row["method"] == DENSE:
        return [AverageRow("  paper", "-", table.dense[: len(columns)], 100.0) for table in tables]
    share = row["asked_share"] or (row["asked_tokens"] or 0) / row["vision_tokens"]
    own = [line for table in tables for line in table.rows if line.name == row["label"]]
    same = [line for line in own if abs(line.retain - share) < SAME_BUDGET]
    return [AverageRow("  paper", line.budget, line.numbers[: len(columns)], line.average) for line in same]
