"""Every benchmark asks and scores as lmms-eval does: by stored outputs always, and live where lmms-eval is installed."""

import importlib.util
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZipFile

import pytest
from benchmark_rows import VIDEO_TASKS, answer, picture, rows_of, video_of, write_rows
from lmms_eval_oracle import GOLDENS, Official, is_asked
from tiny_tasks import write_shards

from nanovlm_v2drop.tasks import Sample, Task, load_task
from nanovlm_v2drop.tasks.base import NO_LIMIT

STORED = json.loads(GOLDENS.read_text(encoding="utf-8"))
NAMES = tuple(STORED)
LIVE_ROWS, LIVE_ANSWERS = 40, 2000
# Tasks that tell when the rest of an answer does not count.
SETTLING = ("scienceqa", "ai2d", "mmstar", "seed-image", "mme", "videomme", "mlvu")
TAILS = ("", " ", ".", "\n\n", "a", "A", "no", "yes")


def loaded(name: str, folder: Path, rows: list[dict[str, Any]]) -> tuple[Task, list[Sample]]:
    """A task over rows that lie in the official files, and its samples."""
    task = load_task(name, write_rows(folder, name, rows))
    return task, list(task.samples())


def records(task: Task, samples: list[Sample], texts: list[str]) -> list[dict[str, Any]]:
    pairs = zip(samples, texts, strict=True)
    return [{**vars(sample), "text": text, "correct": task.correct(text, sample)} for sample, text in pairs]


def with_pictures(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored rows have no pictures; those of GQA are a set of their own, and videos are files."""
    if name == "gqa" or name in VIDEO_TASKS:
        return rows
    cells = [[picture(0)] if name == "seed-image" else picture(0) for _ in rows]
    return [{**row, "image": cell} for row, cell in zip(rows, cells, strict=True)]


def our_score(task: Task, sample: Sample, text: str) -> float:
    """One answer as lmms-eval counts it: of POPE's two readings, equality."""
    return (
        task.summary(records(task, [sample], [text]))["exact_accuracy"] if task.name == "pope" else task.correct(text, sample)
    )


def our_summary(task: Task, samples: list[Sample], texts: list[str]) -> float:
    """The number that lmms-eval gives, in its unit: MME's points, else a share; LongVideoBench's with 5 digits."""
    summary = task.summary(records(task, samples, texts))
    match task.name:
        case "mme":
            return summary["score"]
        case "pope":
            return summary["exact_accuracy"]
        case "longvideobench":
            return round(summary["score"] / 100, 5)
        case _:
            return summary["score"] / 100


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_asks_and_scores_as_the_stored_outputs_of_lmms_eval(name: str, tmp_path: Path) -> None:
    stored = STORED[name]
    task, samples = loaded(name, tmp_path, with_pictures(name, stored["rows"]))
    assert [sample.text for sample in samples] == stored["prompts"]
    assert task.max_new_tokens == (stored["max_new_tokens"] or NO_LIMIT)
    assert list(task.until) == stored["until"]
    for sample, answers in zip(samples, stored["answers"], strict=True):
        assert [(text, our_score(task, sample, text)) for text, _ in answers] == [tuple(pair) for pair in answers]
    assert our_summary(task, samples, [own[0][0] for own in stored["answers"]]) == pytest.approx(stored["summary"], abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_answers_are_right_and_wrong(name: str) -> None:
    scores = [score for own in STORED[name]["answers"] for _, score in own]
    assert 0.1 < sum(scores) / len(scores) < 0.9


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (see docs/benchmarks.md)")
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_asks_and_scores_two_thousand_answers_as_lmms_eval_does(name: str, tmp_path: Path) -> None:
    official, rows, rng = Official(name), rows_of(name, LIVE_ROWS, seed=2), Random(f"live {name}")
    task, samples = loaded(name, tmp_path, rows)
    asked = [row for row in rows if is_asked(row)]
    assert [sample.text for sample in samples] == [official.prompt(row) for row in asked]
    for _ in range(LIVE_ANSWERS // len(asked) + 1):
        texts = [answer(rng, row) for row in asked]
        ours = [(text, our_score(task, sample, text)) for sample, text in zip(samples, texts, strict=True)]
        assert ours == [(text, official.score(row, text)) for row, text in zip(asked, texts, strict=True)]
        assert our_summary(task, samples, texts) == pytest.approx(official.summary(asked, texts), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_is_settled_scores_alike_however_it_goes_on(name: str, tmp_path: Path) -> None:
    rows, rng = rows_of(name, 12, seed=3), Random(f"settled {name}")
    task, samples = loaded(name, tmp_path, rows)
    asked, settled = [row for row in rows if is_asked(row)], 0
    for sample, row in list(zip(samples, asked, strict=True)) * 40:
        text = answer(rng, row)[: rng.randint(1, 8)]
        if task.is_settled(text):
            scores = {task.correct(task.cut(text + rng.choice(TAILS) + answer(rng, row)), sample) for _ in range(8)}
            settled += 1
            assert scores == {task.correct(task.cut(text), sample)}, text
    assert settled > 50 or not settled
    assert bool(settled) == (name in SETTLING)


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("gqa", "imageId", "n9", r"testdev_balanced_images holds no picture n9"),
        ("gqa", "question", "", r"the question is '', not a text"),
        ("scienceqa", "choices", ["one"], r"the choices has 1 options; a question has from 2 to 26"),
        ("scienceqa", "choices", "one", r"the choices is 'one', not a list of texts"),
        ("scienceqa", "answer", 7, r"the answer is 7, no number of one of the \d options"),
        ("scienceqa", "hint", 7, r"the hint is 7, not a text"),
        ("scienceqa", "image", None, r"column image: null is not a picture"),
        ("textvqa", "answers", "cat", r"the answers is 'cat', not a list of texts"),
        ("textvqa-ocr", "ocr_tokens", None, r"the ocr_tokens is null, not a list of texts"),
        ("mmbench", "index", "x", r"the index x is no number of its own; is this lmms-lab-encoder/MMBench"),
        ("mmbench", "answer", "F", r"the answer is 'F', none of the letters A, B, C, D"),
        ("ai2d", "answer", "-1", r"the answer is '-1', no number of one of the \d options"),
        ("mmstar", "answer", "AB", r"the answer is 'AB', none of the letters"),
        ("seed-image", "image", [], r"the image is \[\], not a list of pictures"),
        ("mvbench", "answer", "none of them", r"the answer 'none of them' is none of the candidates"),
        ("longvideobench", "correct_choice", 5, r"the correct_choice is 5, no number of one of the \d options"),
        ("mlvu", "task_type", "other", r"the task_type 'other' is none of MLVU's; is this sy1998/MLVU_dev"),
    ],
)
def test_a_cell_of_another_kind_is_an_error_of_one_line_with_its_place(
    name: str, column: str, value: object, message: str, tmp_path: Path
) -> None:
    (row,) = rows_of(name, 1)
    task = load_task(name, write_rows(tmp_path, name, [{**row, column: value}], shards=1))
    with pytest.raises(ValueError, match=message) as caught:
        list(task.samples())
    assert "row 0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("pope", "mme")])
def test_a_missing_column_is_named_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    rows = [{column: value for column, value in row.items() if column != "question"} for row in rows_of(name, 4)]
    task = load_task(name, write_rows(tmp_path, name, rows))
    with pytest.raises(ValueError, match=r"\.(parquet|json, row 0) has no column question; it has: "):
        list(task.samples())


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_takes_samples_of_the_full_run(name: str, tmp_path: Path) -> None:
    task, samples = loaded(name, tmp_path, rows_of(name, 40))
    whole = {sample.sample_id: sample.text for sample in samples}
    for limit in (4, 9, 40, 1000):
        some = list(task.samples(limit))
        assert len(some) == task.num_samples(limit) <= min(limit, len(samples))
        assert {sample.sample_id: sample.text for sample in some}.items() <= whole.items()
    assert task.num_samples() == len(samples)


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, "ai2d", rows_of("ai2d", 4))
    with pytest.raises(FileNotFoundError, match=r"holds no ScienceQA-IMG/test-\*\.parquet"):
        load_task("scienceqa", tmp_path).num_samples()


def test_mmbench_counts_a_question_only_if_all_its_rotations_are_right(tmp_path: Path) -> None:
    task, samples = loaded("mmbench", tmp_path, rows_of("mmbench", 8))
    right = [sample.answer for sample in samples]
    assert task.summary(records(task, samples, right))["score"] == 100
    wrong_rotation = ["E" if index == 3 else text for index, text in enumerate(right)]
    summary = task.summary(records(task, samples, wrong_rotation))
    assert (summary["score"], summary["vanilla"]) == (50, 100)
    assert [sample.sample_id for sample in task.samples(7)] == [sample.sample_id for sample in samples[4:]]
    with pytest.raises(ValueError, match="a limit of 3 is less than one MMBench question, which has up to 4 rotations"):
        task.num_samples(3)


def test_seed_image_leaves_out_the_questions_about_videos(tmp_path: Path) -> None:
    task, samples = loaded("seed-image", tmp_path, rows_of("seed-image", 10))
    assert [sample.sample_id for sample in samples] == ["0", "1", "2", "3", "5", "6", "7", "8"]
    assert {len(sample.images) for sample in samples} == {1}
    (tmp_path / "videos").mkdir()
    task = load_task("seed-image", write_rows(tmp_path / "videos", "seed-image", rows_of("seed-image", 10)[4::5]))
    with pytest.raises(ValueError, match="holds no row whose data_type is image"):
        task.num_samples()


def test_gqa_joins_questions_and_pictures_by_their_ids(tmp_path: Path) -> None:
    _, samples = loaded("gqa", tmp_path, rows_of("gqa", 6))
    assert [sample.group for sample in samples] == ["n0", "n1", "n2"] * 2
    assert [sample.images[0].getpixel((0, 0)) for sample in samples] == [(number, 0, 0) for number in (0, 1, 2)] * 2


def test_an_answer_ends_before_the_strings_that_lmms_eval_names(tmp_path: Path) -> None:
    assert load_task("mme").cut(" Yes\n\nBecause no ") == "Yes"
    assert load_task("textvqa").cut("cat\n\ndog ASSISTANT: x") == "cat\n\ndog"
    assert load_task("demo").cut("a\n\nb") == "a\n\nb"


@pytest.mark.parametrize("name", VIDEO_TASKS)
def test_a_missing_video_is_named_with_the_row_that_asks_for_it(name: str, tmp_path: Path) -> None:
    rows = rows_of(name, 2)
    task, samples = loaded(name, tmp_path, rows)
    assert [sample.video for sample in samples] == [tmp_path / video_of(name, row) for row in rows]
    (tmp_path / video_of(name, rows[0])).unlink()
    with pytest.raises(FileNotFoundError, match=r"row 0.*: .* holds no .*, and no zip file with it; fetch the ") as caught:
        list(task.samples())
    assert video_of(name, rows[0]) in str(caught.value)
    assert "\n" not in str(caught.value)


def zipped(folder: Path, name: str, content: bytes) -> Path:
    archive = folder / "videos_chunked_01.zip"
    with ZipFile(archive, "w") as opened:
        opened.writestr(name, content)
    return archive


def test_a_video_in_a_zip_file_is_extracted_once_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    rows, data = rows_of("videomme", 1), tmp_path / "data"
    write_rows(data, "videomme", rows, shards=1)
    (data / "data" / "clip0.mp4").unlink()
    for content in (b"first", b"other"):
        archive = zipped(data, "data/clip0.mp4", content)
        (sample,) = load_task("videomme", data).samples()
        assert isinstance(sample.video, Path)
        assert tmp_path / "assets" in sample.video.parents
        assert sample.video.read_bytes() == content
        times = sample.video.stat().st_mtime_ns
        assert next(load_task("videomme", data).samples()).video == sample.video
        assert sample.video.stat().st_mtime_ns == times
    archive.write_bytes(archive.read_bytes().replace(b"other", b"Other"))
    shutil.rmtree(tmp_path / "assets")
    with pytest.raises(ValueError, match=r"data/clip0.mp4 cannot be read from .*videos_chunked_01.zip .*; fetch it again"):
        list(load_task("videomme", data).samples())
    archive.write_bytes(b"none")
    with pytest.raises(ValueError, match=r"videos_chunked_01.zip is no complete zip file"):
        list(load_task("videomme", data).samples())


def test_a_folder_of_frames_is_a_video_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows = rows_of("mvbench", 20)
    task, _ = loaded("mvbench", tmp_path, rows)
    folder = tmp_path / video_of("mvbench", rows[8])
    folder.unlink()
    folder.mkdir()
    with pytest.raises(ValueError, match=r"clip\d.mp4 holds no picture, so it is no video"):
        list(task.samples())
    for name in ("00002.jpg", "00010.jpg", "00001.jpg", "subtitles.txt"):
        (folder / name).write_bytes(b"")
    assert list(task.samples())[8].video == [folder / name for name in ("00001.jpg", "00002.jpg", "00010.jpg")]


def test_a_video_outside_the_folder_of_the_data_is_not_opened(tmp_path: Path) -> None:
    write_rows(tmp_path, "mlvu", [{**rows_of("mlvu", 1)[0], "video_name": "inside.mp4"}], shards=1)
    (tmp_path / "inside.mp4").rename(tmp_path.parent / "outside.mp4")
    row = {**rows_of("mlvu", 1)[0], "video_name": "../outside.mp4"}
    write_shards(tmp_path, [row], 1, split="test", place="mlvu")
    with pytest.raises(ValueError, match=r"the video '../outside.mp4' is outside the folder of the data; it is not opened"):
        list(load_task("mlvu", tmp_path).samples())


def test_mvbench_needs_the_file_of_every_kind_and_leaves_empty_answers_out(tmp_path: Path) -> None:
    rows = rows_of("mvbench", 40)
    task, samples = loaded("mvbench", tmp_path, rows)
    right = [sample.answer for sample in samples]
    assert task.summary(records(task, samples, ["", *right[1:]]))["score"] == 100
    assert task.summary(records(task, samples, ["", "", *right[2:]]))["score"] == 95
    assert [sample.sample_id for sample in samples[:3]] == ["action_antonym-0", "action_antonym-1", "action_count-0"]
    (tmp_path / "json" / "state_change.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"json holds no state_change.json; fetch the branch video of OpenGVLab"):
        list(load_task("mvbench", tmp_path).samples())


def test_longvideobench_draws_the_same_option_for_an_answer_without_a_letter_in_every_run(tmp_path: Path) -> None:
    task, samples = loaded("longvideobench", tmp_path, rows_of("longvideobench", 200))
    drawn = [task.correct("no idea", sample) for sample in samples]
    assert drawn == [task.correct("", sample) for sample in samples]
    assert 0.15 < sum(drawn) / len(drawn) < 0.5  # two to five options
