"""Scores computed by hand, and parquet files with real pictures read from a folder and from a Hub of our own."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from zipfile import ZipFile

import pytest
from benchmark_rows import rows_of, video_of, write_rows
from PIL import Image
from tiny_tasks import mme_rows, picture_bytes, pope_rows, write_shards

from nanovlm_v2drop.tasks import TASKS, DatasetUnavailable, Mme, Pope, Sample, load_task
from nanovlm_v2drop.tasks.base import spread
from nanovlm_v2drop.tasks.mme import COGNITION, PERCEPTION, parse_answer
from nanovlm_v2drop.tasks.parquet import read_rows
from nanovlm_v2drop.tasks.pope import first_sentence_label
from nanovlm_v2drop.tasks.rows import Row

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def pope_folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pope"), pope_rows())


@pytest.fixture(scope="module")
def mme_folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("mme"), mme_rows())


def pope_record(text, answer, kind="random", group="COCO_1"):
    correct = Pope().correct(text, Sample("1", "", (), answer, kind, group))
    return {"sample_id": "1", "kind": kind, "group": group, "answer": answer, "text": text, "correct": correct}


def mme_records(category, picture, first_text, second_text):
    """The two records of a picture whose truths are yes and no."""
    return [
        {"sample_id": f"{picture}#{truth}", "kind": category, "group": picture, "answer": truth, "text": text}
        for truth, text in (("yes", first_text), ("no", second_text))
    ]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes", "yes"),
        ("Yes.", "yes"),
        ("No, there is not", "no"),
        ("no", "no"),
        ("There is not a dog. Yes", "no"),
        ("Yes. There is no dog", "yes"),
        ("", "yes"),
        ("maybe", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("\nNo\n", "no"),
    ],
)
def test_pope_reads_the_first_sentence_as_llava_does(answer, label):
    assert first_sentence_label(answer) == label


def test_pope_scores_odd_answers_as_computed_by_hand():
    # first sentence: yes no yes yes no yes, so 2 hits, 2 false alarms, 1 miss and 1 right no
    records = [
        pope_record("Yes", "yes"),
        pope_record("No, there is not", "no"),
        pope_record("", "no"),
        pope_record("Yes.", "yes"),
        pope_record("no", "yes"),
        pope_record("maybe", "no"),
    ]
    summary = Pope().summary(records)
    assert summary["accuracy"] == pytest.approx(3 / 6)
    assert summary["score"] == pytest.approx(50.0)
    assert summary["precision"] == pytest.approx(2 / 4)
    assert summary["recall"] == pytest.approx(2 / 3)
    assert summary["f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert summary["yes_ratio"] == pytest.approx(4 / 6)
    # equality: only "Yes" and "no" are words it knows; "no" misses, so precision 1 / 1 and recall 1 / 2
    assert summary["exact_accuracy"] == pytest.approx(1 / 6)
    assert summary["exact_f1"] == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_pope_score_is_the_mean_of_correct_in_percent():
    records = [pope_record(text, truth) for text in ("Yes.", "No", "", "not here") for truth in ("yes", "no", "no")]
    mean = 100 * sum(record["correct"] for record in records) / len(records)
    assert Pope().summary(records)["score"] == pytest.approx(mean)


def test_pope_gives_f1_per_category_and_their_unweighted_mean():
    records = [
        pope_record("yes", "yes", "random"),
        pope_record("no", "no", "random"),
        pope_record("yes", "yes", "popular"),
        pope_record("yes", "no", "popular"),
        pope_record("yes", "no", "popular"),
        pope_record("no", "yes", "adversarial"),
    ]
    summary = Pope().summary(records)
    assert (summary["f1_random"], summary["f1_popular"], summary["f1_adversarial"]) == (1.0, 0.5, 0.0)
    assert summary["f1_mean_of_categories"] == pytest.approx(0.5)
    assert summary["f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))


def test_pope_of_an_all_yes_model_is_chance_with_full_recall():
    summary = Pope().summary([pope_record("Yes", truth) for truth in ("yes", "no") * 3])
    assert (summary["score"], summary["recall"], summary["precision"], summary["yes_ratio"]) == (50.0, 1.0, 0.5, 1.0)
    assert summary["f1"] == summary["exact_f1"] == pytest.approx(2 / 3)


def test_pope_of_an_all_no_model_has_zero_precision_not_a_crash():
    summary = Pope().summary([pope_record("No", truth) for truth in ("yes", "no")])
    assert (summary["score"], summary["precision"], summary["f1"], summary["yes_ratio"]) == (50.0, 0.0, 0.0, 0.0)
    assert "f1_popular" not in summary


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes.", "yes"),
        ("No, there is not", "no"),
        ("", "other"),
        ("maybe", "other"),
        ("Y", "yes"),
        ("n.", "no"),
        ("x", "other"),
        (" YES it is", "yes"),
        ("Not sure", "no"),
        ("I know", "other"),
        ("The answer is yes", "other"),
    ],
)
def test_mme_reads_the_word_or_the_first_four_characters(answer, label):
    assert parse_answer(answer) == label


def test_mme_scores_odd_answers_as_computed_by_hand():
    records = [
        *mme_records("color", "color/1.png", "Yes.", "No, there is not"),  # both right
        *mme_records("color", "color/2.png", "", "no"),  # one right
        *mme_records("OCR", "OCR/1.png", "maybe", "yes"),  # none right
        *mme_records("code_reasoning", "code/1.png", "y", "yes"),  # one right
    ]
    summary = Mme().summary(records)
    assert (summary["color"], summary["OCR"], summary["code_reasoning"]) == (75.0 + 50.0, 0.0, 50.0)
    assert (summary["color_accuracy"], summary["color_accuracy_plus"]) == (0.75, 0.5)
    assert (summary["perception"], summary["cognition"], summary["score"]) == (125.0, 50.0, 175.0)
    assert (summary["accuracy"], summary["accuracy_plus"]) == (4 / 8, 1 / 4)
    assert summary["max_score"] == 600.0


def test_mme_of_a_perfect_model_is_2000_and_800():
    records = [
        record
        for category in PERCEPTION + COGNITION
        for picture in range(2)
        for record in mme_records(category, f"{category}/{picture}", "Yes", "No")
    ]
    summary = Mme().summary(records)
    assert (summary["perception"], summary["cognition"]) == (2000.0, 800.0)
    assert summary["score"] == summary["max_score"] == 2800.0


def test_mme_of_an_all_yes_model_is_half_the_questions_and_no_picture():
    summary = Mme().summary([r for picture in "abc" for r in mme_records("count", picture, "Yes", "Yes")])
    assert (summary["score"], summary["accuracy"], summary["accuracy_plus"]) == (50.0, 0.5, 0.0)


def test_mme_pairs_records_in_any_order():
    records = [*mme_records("count", "a", "Yes", "No"), *mme_records("count", "b", "No", "No")]
    assert Mme().summary(records[::-1]) == Mme().summary(records)


def test_mme_summary_names_a_picture_with_one_answer():
    records = mme_records("count", "count/7.png", "Yes", "No")
    with pytest.raises(ValueError, match=r"MME picture count/7\.png has 1 question\(s\), not 2.*keeps pairs whole"):
        Mme().summary(records[:1])


@pytest.mark.parametrize("task", [Pope(), Mme()])
def test_a_summary_of_nothing_is_an_error(task):
    with pytest.raises(ValueError, match="no record to score"):
        task.summary([])


def test_pope_samples_carry_prompt_picture_truth_and_category(pope_folder):
    samples = list(Pope(pope_folder).samples())
    assert len(samples) == len({sample.sample_id for sample in samples}) == 24
    third = samples[3]
    assert third.text == "Is there a thing 3 in the image?" + SHORT_ANSWER
    assert (third.sample_id, third.answer, third.kind, third.group) == ("adversarial-3", "no", "adversarial", "COCO_1")
    assert [image.getpixel((0, 0)) for image in third.images] == [(1, 0, 0)]


def test_mme_samples_carry_the_short_answer_prompt_instead_of_their_own(mme_folder):
    samples = list(Mme(mme_folder).samples())
    assert len(samples) == len({sample.sample_id for sample in samples}) == 84
    assert samples[1].text == "Is this No?" + SHORT_ANSWER
    assert (samples[1].sample_id, samples[1].answer) == ("existence/0000.png#2", "no")
    assert (samples[1].kind, samples[1].group) == ("existence", "existence/0000.png")


@pytest.mark.parametrize("limit", [6, 12, 18])
def test_a_pope_limit_balances_categories_and_truths(pope_folder, limit):
    samples = list(Pope(pope_folder).samples(limit))
    assert set(Counter((sample.kind, sample.answer) for sample in samples).values()) == {limit // 6}
    assert [s.sample_id for s in samples] == [s.sample_id for s in Pope(pope_folder).samples(limit)]


def test_a_pope_limit_of_12_is_spread_over_the_pictures(pope_folder):
    assert {sample.group for sample in Pope(pope_folder).samples(12)} == {"COCO_0", "COCO_2"}


def test_a_limited_sample_is_the_same_sample_as_in_the_full_run(pope_folder):
    full = {sample.sample_id: sample for sample in Pope(pope_folder).samples()}
    for sample in Pope(pope_folder).samples(7):
        twin = full[sample.sample_id]
        assert (sample.text, sample.answer, sample.group) == (twin.text, twin.answer, twin.group)
        assert sample.images[0].tobytes() == twin.images[0].tobytes()


@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (29, 28), (56, 56), (1000, 84)])
def test_an_mme_limit_keeps_pairs_whole_and_rounds_down(mme_folder, limit, expected):
    samples = list(Mme(mme_folder).samples(limit))
    assert len(samples) == expected
    assert set(Counter(sample.group for sample in samples).values()) == {2}


def test_an_mme_limit_of_28_reaches_every_category(mme_folder):
    assert {sample.kind for sample in Mme(mme_folder).samples(28)} == {*PERCEPTION, *COGNITION}


@pytest.mark.parametrize(("task", "limit"), [(Pope, 0), (Pope, -3), (Mme, 1)])
def test_a_limit_that_leaves_nothing_is_an_error_with_the_number(pope_folder, mme_folder, task, limit):
    with pytest.raises(ValueError, match=f"a limit of {limit} "):
        task(mme_folder if task is Mme else pope_folder).samples(limit)


def test_spread_gives_what_a_small_stratum_lacks_to_the_others():
    strata = [("a",)] * 2 + [("b",)] * 10 + [("c",)] * 10
    chosen = spread(strata, 12)
    assert Counter(strata[position] for position in chosen) == {("a",): 2, ("b",): 5, ("c",): 5}
    assert chosen == sorted(set(chosen))
    assert spread(strata, 99) == list(range(22))


def test_an_evaluated_task_scores_its_own_samples_end_to_end(mme_folder):
    task = Mme(mme_folder)
    records = [
        {
            "sample_id": sample.sample_id,
            "kind": sample.kind,
            "group": sample.group,
            "answer": sample.answer,
            "text": "Yes",
            "correct": task.correct("Yes", sample),
        }
        for sample in task.samples(28)
    ]
    assert sum(record["correct"] for record in records) == 14
    assert task.summary(records)["score"] == 14 * 50.0


def test_rows_are_counted_through_all_files_and_batches(tmp_path):
    rows = [{"number": number, "other": 0} for number in range(150)]
    files = sorted((write_shards(tmp_path, rows) / "data").iterdir())
    assert [row.values["number"] for row in read_rows(files, ["number"])] == list(range(150))
    chosen = list(read_rows(files, ["number"], [149, 3, 75]))
    assert [row.values for row in chosen] == [{"number": n} for n in (3, 75, 149)]
    assert [(row.file, row.number) for row in chosen] == [(files[0], 3), (files[1], 0), (files[1], 74)]


def picture_in(cell):
    return Row({"image": cell}, Path("test.parquet"), 7, "random-5").picture("image")


def test_a_picture_is_turned_upright_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    data = picture_bytes("red", size=(8, 2), format="JPEG", exif=exif)
    assert picture_in({"bytes": data, "path": None}).size == (2, 8)


def test_raw_bytes_and_grey_pictures_become_rgb():
    buffer = io.BytesIO()
    Image.new("L", (3, 3), 7).save(buffer, format="PNG")
    image = picture_in(buffer.getvalue())
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (7, 7, 7))


PLACE = r"^test\.parquet, row 7, sample random-5"


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (None, "null"),
        (b"", "a bytes without bytes"),
        ({"bytes": None, "path": "elsewhere.png"}, "a dict without bytes"),
        ({"bytes": "aGVsbG8=", "path": None}, "a dict without bytes"),
        ("aGVsbG8=", "'aGVsbG8='"),
        ("pictures/a.png", "'pictures/a.png'"),
        (5, "5"),
        (True, "True"),
        ([1, 2], r"\[1, 2\]"),
    ],
)
def test_a_cell_that_is_no_picture_is_an_error_with_file_row_and_sample(cell, kind):
    with pytest.raises(ValueError, match=PLACE + f", column image: {kind} is not a picture; use parquet files with embedded"):
        picture_in(cell)


def bomb(side):
    """The head of a picture of side x side pixels, with no pixels behind it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("data", [b"not a picture", picture_bytes("red", size=(64, 64))[:90], bomb(20000)])
def test_bytes_that_are_no_picture_are_an_error_with_file_row_and_sample(data):
    with pytest.raises(ValueError, match=PLACE):
        picture_in(data)


@pytest.mark.parametrize("value", [None, 5, 0.5, True, b"yes", "", "  ", ["yes"], {"yes": 1}])
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_cell_that_is_no_text_is_an_error_with_file_row_and_sample(column, value, tmp_path):
    rows = [{**row, column: value} for row in pope_rows()[1:2]]
    write_shards(tmp_path, rows, shards=1)
    expected = rf"test-00000-of-00001\.parquet, row 0, sample adversarial-1: the {column} is .*, not a text$"
    with pytest.raises(ValueError, match=expected):
        list(Pope(tmp_path).samples())
    with pytest.raises(ValueError, match=expected):
        list(Pope(tmp_path).samples(1))


@pytest.mark.parametrize(("value", "name"), [(7, "adversarial-7"), ("7", "adversarial-7")])
def test_an_id_may_be_a_text_or_a_whole_number(value, name, tmp_path):
    write_shards(tmp_path, [{**pope_rows()[0], "question_id": value}], shards=1)
    assert [sample.sample_id for sample in Pope(tmp_path).samples()] == [name]


@pytest.mark.parametrize("value", [None, 0.5, True, ""])
def test_an_id_of_another_kind_is_an_error_with_file_and_row(value, tmp_path):
    write_shards(tmp_path, [{**pope_rows()[0], "question_id": value}], shards=1)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet, row 0: the question_id is .*, not a text"):
        Pope(tmp_path).samples(1)


def test_ids_that_the_data_give_twice_are_told_apart_by_file_and_row(tmp_path):
    rows = pope_rows()[:4]
    write_shards(tmp_path, [*rows, *({**row, "image_source": f"other-{n}"} for n, row in enumerate(rows[:3]))], shards=2)
    ids = [sample.sample_id for sample in Pope(tmp_path).samples()]
    assert ids == [
        *(f"adversarial-{n}@test-00000-of-00002.parquet:{n}" for n in range(3)),
        "adversarial-3",
        *(f"adversarial-{n}@test-00001-of-00002.parquet:{n}" for n in range(3)),
    ]
    assert {sample.sample_id for sample in Pope(tmp_path).samples(3)} <= set(ids)


def test_two_categories_of_mme_may_name_a_picture_alike(tmp_path):
    rows = [{**row, "question_id": "0001.png"} for row in mme_rows(pictures=1, categories=("count", "color"))]
    samples = list(Mme(write_shards(tmp_path, rows)).samples())
    assert [sample.sample_id for sample in samples] == [f"{c}/0001.png#{n}" for c in ("count", "color") for n in (1, 2)]
    assert Mme(tmp_path).summary([{**vars(sample), "text": sample.answer} for sample in samples])["score"] == 400
    assert [sample.sample_id for sample in Mme(tmp_path).samples(2)] == ["color/0001.png#1", "color/0001.png#2"]


@pytest.mark.parametrize("task", [Pope, Mme])
def test_the_number_of_samples_is_known_without_reading_one(task, pope_folder, mme_folder, monkeypatch):
    folder = pope_folder if task is Pope else mme_folder
    sizes = {limit: len(list(task(folder).samples(limit))) for limit in (None, 7, 12, 1000)}
    monkeypatch.setattr("nanovlm_v2drop.tasks.parquet.batches", None)
    assert {limit: task(folder).num_samples(limit) for limit in sizes} == sizes
    assert (load_task("demo").num_samples(), load_task("demo").num_samples(7)) == (360, 7)


@pytest.mark.parametrize(("task", "rows"), [(Pope, pope_rows()), (Mme, mme_rows(pictures=1))])
def test_files_without_rows_are_refused(task, rows, tmp_path):
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows).slice(0, 0)
    (tmp_path / "data").mkdir()
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    for ask in (task(tmp_path).num_samples, task(tmp_path).samples, task(tmp_path).first_sample):
        with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet holds no rows"):
            ask()


def test_a_damaged_file_is_named(pope_folder, tmp_path):
    source = sorted((pope_folder / "data").iterdir())[0].read_bytes()
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.write_bytes(source[:50] + bytes(len(source) - 250) + source[-200:])
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet"):
        list(Pope(tmp_path).samples())


def test_text_that_is_no_utf_8_is_named_with_its_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pope_rows()[:3]
    table = pyarrow.Table.from_pylist(rows)
    damaged = pyarrow.array([b"fine", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    table = table.set_column(table.schema.get_field_index("question"), "question", damaged)
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet, row 1 cannot be read: .*utf-8"):
        list(Pope(tmp_path).samples())


def test_a_missing_column_is_an_error_naming_the_file_and_the_columns(tmp_path):
    write_shards(tmp_path, [{"question": "?", "answer": "yes"}], shards=1)
    expected = r"test-00000-of-00001\.parquet has no column category, question_id; it has: question, answer"
    with pytest.raises(ValueError, match=expected):
        list(Pope(tmp_path).samples())


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"\(43 bytes\) is no parquet file; a Git LFS pointer\?"):
        list(Pope(tmp_path).samples())


def test_one_folder_may_hold_several_datasets(tmp_path):
    write_shards(tmp_path / "pope", pope_rows())
    write_shards(tmp_path / "MME", mme_rows())
    assert len(list(Pope(tmp_path).samples())) == 24
    assert len(list(Mme(tmp_path).samples())) == 84


def test_files_named_by_the_split_are_found_anywhere_below(tmp_path, pope_folder):
    nested = tmp_path / "a" / "b"
    nested.mkdir(parents=True)
    for file in (pope_folder / "data").iterdir():
        (nested / f"pope_{file.name}").write_bytes(file.read_bytes())
    assert len(list(Pope(tmp_path).samples())) == 24


def test_a_missing_shard_is_an_error_not_a_smaller_benchmark(tmp_path):
    write_shards(tmp_path, pope_rows(), shards=3)
    (tmp_path / "data" / "test-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="holds 2 of 3 parquet shards"):
        Pope(tmp_path).samples()


def test_a_folder_without_the_data_says_what_it_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no data/test-\*\.parquet .* of lmms-lab-encoder/POPE; fetch it"):
        Pope(tmp_path).samples()
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder; give the one .* of lmms-lab-encoder/MME"):
        Mme(tmp_path / "nowhere").samples()


def test_data_of_another_benchmark_is_refused(pope_folder, tmp_path):
    with pytest.raises(ValueError, match="MME has no category 'adversarial'; is this lmms-lab-encoder/MME"):
        Mme(pope_folder).samples()
    rows = [{**row, "image_source": "x"} for row in mme_rows(pictures=1)]
    with pytest.raises(ValueError, match="category 'existence' is none of POPE's"):
        list(Pope(write_shards(tmp_path, rows)).samples())


def test_a_ground_truth_that_is_neither_yes_nor_no_is_refused(tmp_path):
    rows = pope_rows()
    rows[0]["answer"] = "maybe"
    with pytest.raises(ValueError, match="row 0, sample adversarial-0: the ground truth is 'maybe'"):
        list(Pope(write_shards(tmp_path, rows)).samples())


def test_mme_data_with_half_a_pair_is_refused_before_anything_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match=r"MME picture code_reasoning/0002\.png has 1 question"):
        Mme(write_shards(tmp_path, mme_rows()[:-1])).samples()


def test_missing_pyarrow_says_what_to_install(pope_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pyarrow is needed for this data: pip install pyarrow"):
        list(Pope(pope_folder).samples())


class FakeHub(BaseHTTPRequestHandler):
    """The three endpoints that a snapshot download calls; the server has `folder` to serve and `requests` to record."""

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        files = {str(f.relative_to(self.server.folder)): f.read_bytes() for f in self.server.folder.rglob("*") if f.is_file()}
        if "/revision/" in path:
            return self.reply(json.dumps({"id": "any/name", "sha": COMMIT, "siblings": []}).encode())
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": f"oid-{n}"} for n, d in files.items()]
            return self.reply(json.dumps(tree).encode())
        name = unquote(path.partition("/resolve/")[2].partition("/")[2])
        return self.reply(files[name]) if name in files else self.send_missing()

    def send_missing(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.folder, server.requests = tmp_path / "served", []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sample_ids_from(endpoint, cache, task="pope", limit=None):
    """Load a task in a fresh process: huggingface_hub reads its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    script = f"from nanovlm_v2drop.tasks import load_task; print(*(s.sample_id for s in load_task('{task}').samples({limit})))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=cache, capture_output=True, text=True, timeout=60
    )


def test_samples_come_from_the_hub_that_hf_endpoint_names_and_later_from_its_cache(hub, tmp_path):
    write_shards(hub.folder, pope_rows())
    write_shards(hub.folder, pope_rows(), split="train")
    expected = [sample.sample_id for sample in Pope(hub.folder).samples()]

    fetched = sample_ids_from(hub.endpoint, tmp_path)
    assert fetched.stdout.split() == expected, fetched.stderr
    paths = [path for _, path in hub.requests]
    assert f"/datasets/lmms-lab-encoder/POPE/resolve/{COMMIT}/data/test-00001-of-00002.parquet" in paths
    assert not [path for path in paths if "train" in path]

    hub.shutdown()
    hub.server_close()
    assert sample_ids_from(hub.endpoint, tmp_path).stdout.split() == expected


def test_of_a_repository_with_several_sets_of_data_only_those_of_the_task_are_fetched(hub, tmp_path):
    write_rows(hub.folder, "gqa", rows_of("gqa", 5))
    write_shards(hub.folder, mme_rows(1), split="testdev", place="train_balanced_images")
    fetched = sample_ids_from(hub.endpoint, tmp_path, "gqa")
    assert fetched.stdout.split() == ["0", "1", "2", "3", "4"], fetched.stderr
    folders = {path.split("/")[-2] for _, path in hub.requests if path.endswith(".parquet")}
    assert folders == {"testdev_balanced_instructions", "testdev_balanced_images"}


def test_mmstar_is_one_file_on_the_hub(hub, tmp_path):
    write_rows(tmp_path / "made", "mmstar", rows_of("mmstar", 5), shards=1)
    hub.folder.mkdir()
    (tmp_path / "made" / "data" / "val-00000-of-00001.parquet").rename(hub.folder / "mmstar.parquet")
    assert sample_ids_from(hub.endpoint, tmp_path, "mmstar").stdout.split() == ["0", "1", "2", "3", "4"]


def test_of_mvbench_only_the_videos_of_the_questions_asked_are_fetched(hub, tmp_path):
    rows = rows_of("mvbench", 20)
    write_rows(hub.folder, "mvbench", rows)
    (hub.folder / "data0613").mkdir()
    moved = video_of("mvbench", rows[5])
    (hub.folder / "data0613" / moved).parent.mkdir(parents=True)
    (hub.folder / moved).rename(hub.folder / "data0613" / moved)
    fetched = sample_ids_from(hub.endpoint, tmp_path, "mvbench", limit=7)
    assert len(fetched.stdout.split()) == 7, fetched.stderr
    videos = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if path.endswith(".mp4")}
    assert videos == {video_of("mvbench", row) for row in rows[:7]} | {f"data0613/{moved}"}
    before = len(hub.requests)
    assert sample_ids_from(hub.endpoint, tmp_path, "mvbench", limit=7).stdout == fetched.stdout
    assert len(hub.requests) == before


def test_of_videomme_the_zip_files_are_fetched_where_a_video_is_missing(hub, tmp_path):
    write_rows(hub.folder, "videomme", rows_of("videomme", 3), shards=1)
    with ZipFile(hub.folder / "videos_chunked_01.zip", "w") as archive:
        archive.write(hub.folder / "data" / "clip0.mp4", "data/clip0.mp4")
    (hub.folder / "data" / "clip0.mp4").unlink()
    assert sample_ids_from(hub.endpoint, tmp_path, "videomme").stdout.split() == ["0", "1", "2"]
    hub.shutdown()
    hub.server_close()
    assert sample_ids_from(hub.endpoint, tmp_path, "videomme").stdout.split() == ["0", "1", "2"]


def test_of_longvideobench_the_videos_are_to_be_unpacked_by_hand(hub, tmp_path):
    write_rows(hub.folder, "longvideobench", rows_of("longvideobench", 2), shards=1)
    refused = sample_ids_from(hub.endpoint, tmp_path, "longvideobench").stderr.splitlines()[-1]
    assert "cat videos.tar.part.* | tar -x, then pass --data DIR" in refused


def test_an_unreachable_hub_says_in_one_line_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DatasetUnavailable) as caught:
        Pope().samples(6)
    (line,) = str(caught.value).splitlines()
    tried, _, remedy = line.rpartition("; fetch it")
    assert tried.startswith("dataset lmms-lab-encoder/POPE is not available from http://127.0.0.1:9: ")
    assert [hint for hint in ("--local-dir DIR", "--data DIR", "HF_ENDPOINT") if hint not in remedy] == []


def test_every_task_has_the_name_it_is_found_by_and_a_token_budget():
    for name in ("pope", "mme"):
        task = load_task(name)
        assert type(task) is TASKS[name]
        assert task.name == name
        assert task.max_new_tokens > 0
        assert task.default_samples is None


def test_load_task_hands_the_folder_on(pope_folder):
    assert len(list(load_task("pope", pope_folder).samples())) == 24


def test_an_unknown_task_is_an_error_listing_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown task 'vqa'; choose one of: .*mme, mmstar, .*pope"):
        load_task("vqa")
