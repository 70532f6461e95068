"""Made-up rows of every benchmark in the official shape, and answers of every kind to them: plain, odd and adversarial."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tiny_tasks import mme_rows, picture_bytes, pope_rows, write_shards

from nanovlm_v2drop.tasks.mvbench import FOLDERS

Row = dict[str, Any]
WORDS = (
    *(
        "a",
        "A",
        "an",
        "the",
        "The",
        "I",
        "cat",
        "Cat",
        "dog",
        "NBC",
        "two",
        "Two",
        "2",
        "none",
        "ten",
        "10",
        "1,000",
        "1.5",
        "yes",
    ),
    *(
        "Yes",
        "NO",
        "no",
        "No",
        "not",
        "y",
        "n",
        "banana",
        "nan",
        "dont",
        "don't",
        "cant",
        "oclock",
        "it's",
        "man's",
        "red/blue",
    ),
    *(
        "t-shirt",
        "half-open",
        "Because",
        "Cabbage",
        "Dog",
        "ABBA",
        "DEC",
        "answer",
        "is",
        "x",
        "é",
        "ß",
        "日本",
        "答案是",
        "정답은",
    ),
)
PHRASES = (
    *("The answer is", "the best answer is", "Answer is:", "The correct option is", "I choose", "My choice is", "choice is"),
    *("The best answer is", "Best option:", "The answer", "answer is not"),
)
FORMS = (
    "{}",
    "{}.",
    "({})",
    "{})",
    "{}:",
    "{},",
    "({}).",
    ":{}",
    "**{}**",
    "'{}'",
    '"{}"',
    "Option {}",
    "{}. cat",
    "{} cat",
    "{}!",
)
SIGNS = (" ", " ", " ", "", ". ", ", ", "? ", "! ", "\n", "\t", "; ", " - ", "/", ".", ",", "'", '"', "\n\n")
MMSTAR_KINDS = tuple(f"kind {number}" for number in range(18))
MMBENCH_KINDS = ("ocr", "object_localization", "social_relation")
VIDEO_KINDS = ("short", "medium", "long")
VIDEO_TASKS = ("mvbench", "videomme", "longvideobench", "mlvu")


def words(rng: Random, most: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(SIGNS) for _ in range(rng.randint(1, most)))


def answer(rng: Random, row: Row) -> str:
    """An answer to a row, without white space at its ends, as an evaluation gets it."""
    truth = truth_of(rng, row)
    letter = truth if rng.random() < 0.6 else rng.choice("ABCDEABCDEabcdeFGHZ")
    texts = [text for text in [*texts_in(row), *[truth] * 3] if text]
    made: list[Callable[[], str]] = [
        lambda: rng.choice(FORMS).format(letter),
        lambda: truth,
        lambda: rng.choice((truth.lower(), truth.upper(), f"{truth}.", f" {truth} ", f"the {truth}")),
        lambda: f"{rng.choice(FORMS).format(letter)} {words(rng, 6)}",
        lambda: f"{words(rng, 6)} {rng.choice(FORMS).format(letter)}",
        lambda: f"{words(rng, 3)} {rng.choice(PHRASES)} {rng.choice(FORMS).format(letter)}{words(rng, 3)}",
        lambda: words(rng, 4),
        lambda: words(rng, 12),
        lambda: rng.choice(texts),
        lambda: f"{rng.choice(FORMS).format(letter)} {rng.choice(texts)}",
        lambda: f"{words(rng, 2)}{rng.choice(texts)}{rng.choice(SIGNS)}",
        lambda: rng.choice(texts).upper(),
        lambda: rng.choice(("yes", "Yes.", "No", "no, it is", "NO", "yEs", "", "y", "N", "not sure", "I know", "yes and no")),
        lambda: "".join(rng.choice("ABCDabcd.,:;()?!'\" \n-/1é") for _ in range(rng.randint(0, 9))),
        lambda: "." * rng.randint(1, 40) + words(rng, 2),
    ]
    return rng.choice(made)().strip()


def truth_of(rng: Random, row: Row) -> str:
    """A right answer: a letter where the row has options."""
    if "answers" in row:
        return str(rng.choice(row["answers"]))
    if "candidates" in row:
        return "ABCDEFGH"[row["candidates"].index(row["answer"])]
    found = row.get("correct_choice", row.get("answer"))
    return chr(ord("A") + int(found)) if str(found).isdecimal() else str(found)


def texts_in(row: Row) -> list[str]:
    found = []
    for value in row.values():
        found += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    return found


def picture(number: int) -> Row:
    return {"bytes": picture_bytes((number % 256, 0, 0)), "path": "a.png"}


def options(rng: Random, least: int = 2, most: int = 5) -> list[str]:
    return [f"{words(rng, 2).strip() or 'x'} {number}" for number in range(rng.randint(least, most))]


def gqa(rng: Random, number: int) -> Row:
    truth = rng.choice(("cat", "yes", "t-shirt", "two dogs", "Left", "a"))
    return {"id": str(number), "question": f"{words(rng, 5)}?", "answer": truth, "imageId": f"n{number % 3}"}


def scienceqa(rng: Random, number: int) -> Row:
    choices = options(rng)
    hint = rng.choice(("", "", words(rng, 8)))
    found = {"question": words(rng, 5), "choices": choices, "answer": rng.randrange(len(choices)), "hint": hint}
    return {**found, "image": picture(number)}


def people(rng: Random) -> list[str]:
    pool = [words(rng, 2).strip() or "cat" for _ in range(rng.randint(1, 6))]
    return [rng.choice(pool) for _ in range(10)]


def textvqa(rng: Random, number: int) -> Row:
    read = [rng.choice(WORDS) for _ in range(rng.randint(0, 5))]
    found = {"question": f"what does {words(rng, 4)}?", "answers": people(rng), "ocr_tokens": read, "question_id": number}
    return {**found, "image": picture(number)}


def vizwiz(rng: Random, number: int) -> Row:
    return {key: value for key, value in textvqa(rng, number).items() if key != "ocr_tokens"}


def mmbench(rng: Random, number: int) -> Row:
    """Questions of four rows, whose indices tell the rotation."""
    question, rotation = divmod(number, 4)
    given = dict(zip("ABCD", options(rng, 2, 4), strict=False))
    missing = rng.choice((None, "nan"))
    return {
        "index": question + 1_000_000 * rotation, "question": words(rng, 5),
        "hint": rng.choice((None, "nan", "", words(rng, 5))), **{letter: given.get(letter, missing) for letter in "ABCD"},
        "answer": rng.choice(list(given)),
        "category": MMBENCH_KINDS[question % 3], "L2-category": "perception", "source": "made", "split": "dev",
        "image": picture(question),
    }  # fmt: skip


def ai2d(rng: Random, number: int) -> Row:
    found = options(rng)
    return {"question": words(rng, 5), "options": found, "answer": str(rng.randrange(len(found))), "image": picture(number)}


def mmstar(rng: Random, number: int) -> Row:
    asks = rng.choice(("", " Please answer yes or no."))
    question = f" {words(rng, 4)}?{asks}\nOptions: A: {words(rng, 1)}, B: {words(rng, 1)} "
    found = {"index": number, "question": question, "answer": rng.choice("ABCD")}
    return {**found, "category": "math", "l2_category": MMSTAR_KINDS[number % 18], "image": picture(number)}


def seed_image(rng: Random, number: int) -> Row:
    choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), options(rng, 4, 4), strict=True))
    found = {"question": words(rng, 5), **choices, "answer": rng.choice("ABCD"), "question_id": str(number)}
    kind = "video" if number % 5 == 4 else "image"
    return {**found, "data_type": kind, "image": [picture(number)] * (2 if kind == "video" else 1)}


def mvbench(rng: Random, number: int) -> Row:
    """A row with its kind, which in the data is the name of the file."""
    candidates = options(rng, 2, 5)
    found = {"video": f"clip{number % 7}.mp4", "question": words(rng, 5), "candidates": candidates}
    return {**found, "answer": rng.choice(candidates), "kind": tuple(FOLDERS)[number % 20], "start": 1.0, "end": 2.5}


def videomme(rng: Random, number: int) -> Row:
    lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", options(rng, 4, 4), strict=True)]
    found = {"videoID": f"clip{number // 3}", "question": words(rng, 5), "options": lettered, "answer": rng.choice("ABCD")}
    kind = {"duration": VIDEO_KINDS[number % 3], "domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"}
    return {**found, **kind, "question_id": f"{number:03}-1"}


def longvideobench(rng: Random, number: int) -> Row:
    given = options(rng, 2, 5)
    found = {"id": f"clip{number // 2}_{number % 2}", "video_path": f"clip{number // 2}.mp4", "question": words(rng, 5)}
    texts = {f"option{place}": given[place] if place < len(given) else "N/A" for place in range(5)}
    groups = {"duration_group": (15, 60, 600, 3600)[number % 4], "question_category": f"category {number % 17}"}
    return {**found, **texts, "correct_choice": rng.randrange(len(given)), **groups}


def mlvu(rng: Random, number: int) -> Row:
    question = f"{words(rng, 4)}?\n" + "\n".join(f"({letter}) {words(rng, 2)}" for letter in "ABCD")
    kind = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA")[number % 6]  # the seventh is missing: it counts as 0
    return {"video_name": f"{kind}/clip{number}.mp4", "question": question, "answer": rng.choice("ABCD"), "task_type": kind}


MAKERS: dict[str, Callable[[Random, int], Row]] = {
    "gqa": gqa, "scienceqa": scienceqa, "textvqa": textvqa, "textvqa-ocr": textvqa, "vizwiz": vizwiz, "mmbench": mmbench,
    "ai2d": ai2d, "mmstar": mmstar, "seed-image": seed_image,
    "mvbench": mvbench, "videomme": videomme, "longvideobench": longvideobench, "mlvu": mlvu,
}  # fmt: skip
PLACES = {  # folder below the data set's own, and split
    "gqa": ("testdev_balanced_instructions", "testdev"), "scienceqa": ("ScienceQA-IMG", "test"),
    "textvqa": ("data", "validation"), "textvqa-ocr": ("data", "validation"),
    "vizwiz": ("data", "val"), "mmbench": ("en", "dev"), "ai2d": ("data", "test"),
    "mmstar": ("data", "val"), "seed-image": ("data", "test"), "pope": ("data", "test"), "mme": ("data", "test"),
    "mvbench": ("json", ""), "videomme": ("videomme", "test"), "longvideobench": ("data", "validation"),
    "mlvu": ("mlvu", "test"),
}  # fmt: skip


def rows_of(task: str, number: int, seed: int = 0) -> list[Row]:
    """Rows of a benchmark; of POPE and MME, whose rows have no room for chance, as many as come."""
    if task in ("pope", "mme"):
        return (pope_rows(8) if task == "pope" else mme_rows(3))[:number]
    rng = Random(f"{task} {seed}")
    rows = [MAKERS[task](rng, index) for index in range(number)]
    return sorted(rows, key=lambda row: str(row["kind"])) if task == "mvbench" else rows


def video_of(task: str, row: Row) -> str:
    """Where lmms-eval looks for the video of a row, below the folder of the data."""
    match task:
        case "mvbench":
            return f"{FOLDERS[row['kind']]}/{row['video']}"
        case "videomme":
            return f"data/{row['videoID']}.mp4"
        case "longvideobench":
            return f"videos/{row['video_path']}"
        case _:
            return str(row["video_name"])


def write_rows(folder: Path, task: str, rows: list[Row], shards: int = 2, clip: bytes = b"") -> Path:
    """Write rows as the official files of a benchmark, those of videos with `clip` for every video; returns the folder."""
    place, split = PLACES[task]
    if task in VIDEO_TASKS:
        for file in (folder / video_of(task, row) for row in rows):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(clip)
    if task == "mvbench":
        (folder / place).mkdir(parents=True, exist_ok=True)
        for kind in FOLDERS:
            own = [{name: value for name, value in row.items() if name != "kind"} for row in rows if row["kind"] == kind]
            (folder / place / f"{kind}.json").write_text(json.dumps(own), encoding="utf-8")
        return folder
    write_shards(folder, rows, shards, split=split, place=place)
    if task == "gqa":
        pictures = [{"id": f"n{number}", "image": picture(number)} for number in range(3)]
        write_shards(folder, pictures, split=split, place="testdev_balanced_images")
    return folder
