"""The report page: what it says, that it is one file, and that a browser draws it."""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.evaluation.plans import DENSE
from nanovlm_v2drop.report import figures, page

HOSTILE = """It's </script><script>document.title = "broken"</script><img src=x onerror='document.title="broken"'> "&" there?"""
BUDGETS = (48.0, 32.0, 16.0)
SCORES = {"v2drop": (94.0, 90.0, 70.0), "fastv": (93.0, 80.0, 66.0), "random": (75.0, 55.0, 25.0)}
GRID = 4
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def make_row(task: str, method: str, asked: float | None, score: float, **changes: Any) -> dict[str, Any]:
    tokens = 144.0 if method == "dense" else asked or 77.0
    return {
        "method": method, "label": method, "task": task, "schedule": {"1": 0.5} if method != "dense" else {},
        "asked_tokens": asked, "vision_tokens": 144.0, "mean_vision_tokens": tokens, "final_vision_tokens": tokens / 3,
        "note": "", "score": score, "score_interval": [score - 2.5, score + 1.5], "relative_score": score + 1.25,
        "relative_interval": [score - 1.25, score + 2.75], "acts": "in the decoder", "difference": score - 90,
        "difference_interval": [score - 95, score - 85], "metrics": {"score": score, "digit": score - 3.21},
        "samples": 361, "timed": 8, "seeds": [0, 1, 2] if method == "random" else [0], "vision_ms": 7.0,
        "prefill_ms": tokens / 7, "decode_ms": 4.0,
        "decode_ms_per_token": None if method == "fastv" else 2.34, "total_ms": 11.0 + tokens / 7,
        "items_per_s": 43.21, "prefill_tflops": tokens / 1e5, "kv_cache_mb": tokens / 50, "peak_memory_mb": None, "paper": {},
        **changes,
    }  # fmt: skip


def make_bias(task: str, method: str, asked: float | None, map_: np.ndarray) -> dict[str, Any]:
    return {
        "task": task, "method": method, "label": method, "asked_tokens": asked, "layer": 1,
        "kept_share": float(map_.mean()), "bins": [0.1 + 0.05 * tenth for tenth in range(9)] + [None],
        "rows": map_.mean(1).tolist(), "columns": map_.mean(0).tolist(), "map": map_.tolist(),
        "kl_bits": 0.1234, "chi_square": 56.7, "degrees_of_freedom": 9,
    }  # fmt: skip


def make_gallery(task: str, sample: str, question: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "PNG")
    first = {"layer": 1, "tokens": 7, "kept": [0, 1, 5, 6, 15], "merged": 2}
    stages = [first, {"layer": 6, "tokens": 1, "kept": [5], "merged": 0}]
    rows = [{"method": "dense", "label": "dense", "asked_tokens": None, "answer": "yes", "correct": 1.0, "stages": []}]
    for budget, method in itertools.product(BUDGETS, SCORES):
        answer = {"answer": f"{method} says </b>", "correct": {"fastv": 0.0, "random": 0.3}.get(method, 1.0), "stages": stages}
        rows.append({"method": method, "label": method, "asked_tokens": budget, **answer})
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {
        "task": task, "sample_id": sample, "question": question, "answer": "yes", "picture": picture, "grid": [GRID, GRID],
        "rows": rows,
    }  # fmt: skip


def make_run(tasks: Sequence[str] = ("demo", "pope")) -> dict[str, Any]:
    rows = []
    for task in tasks:
        rows.append(make_row(task, "dense", None, 97.2))
        for method, scores in SCORES.items():
            rows += [make_row(task, method, asked, score) for asked, score in zip(BUDGETS, scores, strict=True)]
        rows.append(make_row(task, "fastv", None, 95.5, label="fastv K=2 R=50%"))
    note = {"note": "16 is <out> of reach", "mean_vision_tokens": 25.6}
    rows = [{**row, **note} if (row["method"], row["asked_tokens"]) == ("fastv", 16.0) else row for row in rows]
    place = np.random.default_rng(0).random((GRID, GRID))
    place[0, 0] = 0.0
    return {
        "model": "tiny & small", "device": "cpu", "dtype": "float32", "attention": "sdpa", "decode_attention": "sdpa",
        "torch": "2.13", "command": "python train_free_eval.py --tasks 'demo,pope'", "output": "results/run",
        "accounting": "equal", "versions": {"python": "3.11", "torch": "2.13"}, "machine": "a small one",
        "date": "2026-11-24T10:11:12+00:00", "results": rows,
        "position_bias": [make_bias(t, m, b, place) for t in tasks for b in BUDGETS for m in SCORES],
    }  # fmt: skip


def make_galleries() -> list[dict[str, Any]]:
    return [make_gallery("demo", "one", HOSTILE), make_gallery("demo", "two", "Plain?"), make_gallery("pope", "three", "Else?")]


def write_run(folder: Path, run: dict[str, Any], galleries: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(run))
    (folder / "galleries.json").write_text(json.dumps(galleries))
    return page.write_page(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), make_run(), make_galleries())


class Parsed(HTMLParser):
    """The tags of a page with their attributes, its words, and the cells of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words, self.raw, self.inside = "", "", ""
        self.table_rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag
        if tag == "tr":
            self.table_rows.append([])
        if tag in ("td", "th"):
            self.table_rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.raw += data
            return
        self.words += data
        if self.table_rows and self.table_rows[-1]:
            self.table_rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(attributes["data-figure"]) for _, attributes in self.tags if "data-figure" in attributes]


@pytest.fixture(scope="module")
def parsed(report: Path) -> Parsed:
    return Parsed(report)


def task_report(run: dict[str, Any], task: str = "demo") -> dict[str, Any]:
    styles = figures.method_styles([row["method"] for row in run["results"]])
    return page.task_report(task, 1, run, make_galleries(), styles)


def traces(figure: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in figure["data"] if "name" in trace}


def comparison_of(scores: dict[str, tuple[float, Sequence[float]]], **changes: Any) -> tuple[dict[str, Any], str]:
    """What the page says of methods at 32 tokens: relative scores and intervals by method."""
    rows = [
        make_row("demo", name, 32.0, 1.0, relative_score=score, relative_interval=bounds, **changes.get(name, {}))
        for name, (score, bounds) in scores.items()
    ]
    comparison = page.compare(rows, "32")
    return comparison, page.headline([comparison])


# -- what the page says


def test_the_page_lies_beside_its_data_and_is_written_again_on_the_command_line(report, capsys):
    report.unlink()
    page.main([str(report.parent)])
    assert capsys.readouterr().out.strip() == str(report.parent / "report.html") == str(report)
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_nothing_is_fetched_from_elsewhere(parsed):
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "url(" not in attributes.get("style", "")
    own = parsed.raw.replace(page.get_plotlyjs(), "")
    assert {address[:11] for address in re.findall(r"url\(\"?([^)]*)", own)} == {"data:image/"}
    assert "@import" not in own
    assert "http" not in own
    policy = next(attributes["content"] for _, attributes in parsed.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")
    assert not re.search("http|\\*|connect", policy)


def test_plotly_and_every_picture_are_there_once(report):
    text = report.read_text(encoding="utf-8")
    assert text.count(page.get_plotlyjs()) == 1
    assert text.replace(page.get_plotlyjs(), "").count("data:image/png;base64,") == len(make_galleries())


def test_hostile_text_stays_text(parsed):
    assert parsed.words.count(HOSTILE) == 1
    assert "fastv says </b>" in parsed.words
    assert "16 is <out> of reach" in parsed.words
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in parsed.tags}
    hover = traces(task_report(make_run())["accuracy"])["FastV"]["hovertext"]
    assert any("16 is &lt;out&gt; of reach" in text for text in hover)


def test_the_table_holds_every_row_with_its_intervals_and_its_note(parsed):
    (row,) = [cells for cells in parsed.table_rows if cells[0].strip() == "Random" and "32" in cells[1] and len(cells) > 6][:1]
    shown = [" ".join(cell.split()) for cell in row]
    assert shown[1:6] == ["32", "55.0 [52.5, 56.5]", "56.2 [53.8, 57.8]", "-35.0 [-40.0, -30.0]", "32.0"]
    assert "in the decoder" in shown
    assert {"4.6", "2.34", "43.21", "0.00032", "0.64", "–", "361", "3", "1: 0.5"} <= set(shown)
    noted = [" ".join(cells[0].split()) for cells in parsed.table_rows if cells and "1" in cells[0].split()]
    assert noted == ["FastV 1"] * 2
    tables = [cells for cells in parsed.table_rows if len(cells) > 6]
    assert len(tables) == 2 * (1 + len(make_run(["demo"])["results"]))


def test_the_page_says_how_it_was_made(parsed):
    facts = ("tiny & small", "--tasks 'demo,pope'", "a small one", "torch 2.13", "2026-11-24 10:11", "equal:", "361 samples")
    for fact in facts:
        assert fact in parsed.words


@pytest.mark.parametrize(
    ("second", "overlap", "said"),
    [
        ((94.0, [92.0, 96.0]), True, "Best: V2Drop at 32 tokens. The next method's interval overlaps every time"),
        ((91.0, [90.0, 92.9]), False, "Best: V2Drop at 32 tokens. The next method's interval lies below it every time."),
        ((95.0, [93.0, 97.0]), False, "Best: V2Drop and FastV at 32 tokens."),
    ],
)
def test_the_headline_says_whether_intervals_overlap(second, overlap, said):
    scores = {"v2drop": (95.0, [93.0, 97.0]), "fastv": second, "random": (50.0, [40.0, 60.0])}
    comparison, headline = comparison_of(scores)
    assert comparison["overlap"] == overlap
    assert headline.startswith(said)


def test_a_method_above_the_budget_is_shown_but_not_ranked():
    scores = {"pdrop": (99.0, [98.0, 100.0]), "v2drop": (90.0, [88.0, 92.0]), "fastv": (80.0, [78.0, 82.0])}
    comparison, headline = comparison_of(scores, pdrop={"mean_vision_tokens": 33.7}, v2drop={"mean_vision_tokens": 33.5})
    assert [row["method"] for row in comparison["best"]] == ["v2drop"]
    assert [row["method"] for row in comparison["left_out"]] == ["pdrop"]
    assert "PyramidDrop" not in headline
    names = [trace["y"][0] for trace in task_report(make_run())["rankings"]["16"]["data"]]
    assert names == ["Random", "FastV (25.6)", "V2Drop"]
    assert [trace["y"] for trace in task_report(make_run())["rankings"]["published"]["data"]] == [["FastV K=2 R=50% (77.0)"]]


def test_budgets_without_a_second_method_have_no_headline():
    assert comparison_of({"v2drop": (95.0, [93.0, 97.0])})[1] == ""
    assert page.headline([]) == ""


def test_published_settings_are_ranked_by_nobody():
    reported = task_report(make_run())
    assert [comparison["budget"] for comparison in reported["comparisons"]] == ["48", "32", "16"]
    assert list(reported["rankings"]) == ["48", "32", "16", "published"]


def test_one_method_beside_itself_has_a_mark_for_every_setting(tmp_path):
    rows = [make_row("demo", "v2drop", 48.0, 90.0, label=f"v2drop {metric}", paper={"MME": 1712}) for metric in ("l1", "l2")]
    run = {**make_run(["demo"]), "results": [make_row("demo", "dense", None, 97.0), *rows], "position_bias": []}
    found = Parsed(write_run(tmp_path, run, []))
    switches = [attributes["data-switch"] for _, attributes in found.tags if "data-switch" in attributes]
    assert switches == ["dense", "v2drop l1", "v2drop l2"]
    symbols = {trace["marker"]["symbol"] for trace in found.figures()[0]["data"]}
    assert len(symbols) == 2
    assert "MME 1712" in found.words


@pytest.mark.parametrize("case", ["official", "dense only", "no dense", "no bias, no pictures", "nothing kept"])
def test_runs_with_less_in_them_have_a_page_too(case, tmp_path):
    run, galleries = make_run(), make_galleries()
    if case == "official":
        run["accounting"] = "official"
        run["results"] += [make_row("demo", "v2drop", None, 93.0, label="v2drop paper-192")]
        run["results"] = [row for row in run["results"] if row["asked_tokens"] is None]
        run["position_bias"] = [make_bias("demo", "v2drop", None, np.ones((GRID, GRID)))]
        galleries = []
    if case == "dense only":
        run["results"] = [row for row in run["results"] if row["method"] == "dense"]
        run["position_bias"], galleries = [], []
    if case == "no dense":
        rows = [row for row in run["results"] if row["method"] != "dense"]
        run["results"] = [{**row, "relative_score": None, "relative_interval": None} for row in rows]
        galleries = []
    if case == "no bias, no pictures":
        run["position_bias"], galleries = [], []
    if case == "nothing kept":
        run["position_bias"] = [make_bias("demo", "v2drop", 16.0, np.zeros((GRID, GRID)))]
    found = Parsed(write_run(tmp_path, run, galleries))
    assert ("without dropping, so there is nothing to compare with" in found.words) == (case == "no dense")
    assert ("use different numbers of tokens: compare" in found.words) == (case == "official")
    assert ("Which places are kept" in found.words) == (case not in ("dense only", "no bias, no pictures"))
    assert len(found.figures()) > 3


def test_runs_in_a_folder_called_results_share_plotlys_script(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    pages = [write_run(folder / name, make_run(["demo"]), []) for name in ("a", "b")]
    (script,) = folder.glob("plotly-*.min.js")
    assert script.read_text(encoding="utf-8") == page.get_plotlyjs()
    for path in pages:
        assert f'<script src="../{script.name}"></script>' in path.read_text(encoding="utf-8")
        assert path.stat().st_size < 500_000
    page.main([str(folder / "a"), "--standalone"])
    assert page.get_plotlyjs() in pages[0].read_text(encoding="utf-8")
    assert list((tmp_path).glob("plotly*")) == []


def test_a_run_elsewhere_writes_nothing_outside_its_folder(tmp_path):
    write_run(tmp_path / "run", make_run(["demo"]), [])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def ablation_run() -> dict[str, Any]:
    scores = {"l1": 90.0, "l2": 91.0, "progressive": 94.0, "one-shot": 89.0}
    rows = [
        make_row("demo", "v2drop", 32.0, score, label=f"v2drop {name}", paper={"MME": 1700 + score})
        for name, score in scores.items()
    ]
    panels = {"metric": ["v2drop l1", "v2drop l2"], "steps": ["v2drop progressive", "v2drop one-shot"]}
    results = [make_row("demo", "dense", None, 97.0), *rows]
    return {**make_run(["demo"]), "results": results, "position_bias": [], "panels": panels}


def test_ablation_questions_are_separate_panels_and_not_ranked_with_each_other():
    run = ablation_run()
    reported = page.task_report("demo", 1, run, [], figures.method_styles([row["method"] for row in run["results"]]))
    assert {name: [row["label"] for row in report["rows"]] for name, report in reported["ablations"].items()} == {
        "metric": ["v2drop l2", "v2drop l1"],
        "steps": ["v2drop progressive", "v2drop one-shot"],
    }
    assert [len(report["figure"]["data"]) for report in reported["ablations"].values()] == [2, 2]
    assert reported["comparisons"] == []
    assert reported["rankings"] == {}
    assert reported["headline"] == ""


def test_several_runs_share_a_page_with_their_comparison_and_a_choice_for_each(tmp_path):
    outputs = [tmp_path / "one", tmp_path / "two"]
    other = {**make_run(["demo"]), "model": "another model"}
    for output, run in zip(outputs, (make_run(["demo"]), other), strict=True):
        write_run(output, run, make_galleries()[:2])
    compared = [["method", "run 1", "2 - 1"], ["fastv", "93.0", "+1.0 [+0.5, +1.5]*"]]
    found = Parsed(page.write_common_page(outputs, compared, tmp_path / "pages" / "both.html"))
    (row,) = [cells for cells in found.table_rows if "fastv" in cells]
    assert [cell.split("\n")[0] for cell in row] == compared[1]
    panels = [attributes["data-value"] for _, attributes in found.tags if attributes.get("data-choice") == "task"]
    assert panels == ["demo, run 1", "demo, run 2"]
    assert "tiny & small and another model" in found.words
    assert "How this was made, run 2" in found.words


def test_a_run_of_an_older_version_is_told_in_one_line(tmp_path, capsys):
    run = make_run()
    run["results"] = [{name: value for name, value in row.items() if name != "acts"} for row in run["results"]]
    with pytest.raises(ValueError, match="an older version wrote it"):
        write_run(tmp_path, run, make_galleries())
    with pytest.raises(SystemExit, match="2"):
        page.main([str(tmp_path)])
    assert "write it again with --resume" in capsys.readouterr().err


def test_claims_stand_in_a_section_of_their_own(tmp_path):
    finding = {"claim": "it <b>works</b>", "paper": "yes", "measured": "+1.0", "verdict": "holds here", "decides": "by formula"}
    found = Parsed(write_run(tmp_path, {**ablation_run(), "claims": [finding]}, []))
    assert "The paper's claims" in found.words
    assert "it <b>works</b>" in found.words
    assert "The paper's claims" not in Parsed(write_run(tmp_path, ablation_run(), [])).words


# -- figures


def test_plotly_accepts_every_figure(parsed):
    found = parsed.figures()
    assert len(found) == 2 * (1 + 4 + 4 + 3 * (1 + 3))  # accuracy, rankings, costs, and by budget a curve and three maps
    for figure in found:
        text = re.sub(r"light-dark\(([^,]*), [^)]*\)|var\(--[a-z]+\)", lambda match: match[1] or "#123456", json.dumps(figure))
        go.Figure(json.loads(text))


def test_colours_of_figures_are_in_the_style_sheet(parsed):
    used = {name for figure in parsed.figures() for name in re.findall(r"var\((--[a-z]+)\)", json.dumps(figure))}
    assert used
    assert used <= set(re.findall(r"(--[a-z]+):", parsed.raw))


def test_every_method_has_a_mark_of_its_own_that_the_page_can_draw():
    styles = [*figures.STYLES.values(), *figures.SPARE_STYLES]
    assert len({style.symbol for style in styles}) == len(styles)
    assert figures.STYLES.keys() == {DENSE, *DROPPERS}
    template = (Path(page.__file__).parent / "page.html").read_text()
    assert {style.symbol for style in styles} == set(re.findall(r'<symbol id="mark-([a-z-]+)"', template))


def test_the_look_of_a_method_does_not_depend_on_the_others():
    alone, together = figures.method_styles(["fastv"]), figures.method_styles(["random", "mine", "fastv", "v2drop", "dense"])
    assert alone["fastv"] == together["fastv"]
    assert list(together) == ["dense", "v2drop", "mine", "fastv", "random"]
    many = figures.method_styles(["dense", *(f"mine {number}" for number in range(12))])
    assert len({style.symbol for style in many.values()}) == 13


def test_error_bars_end_at_the_intervals():
    reported = task_report(make_run())
    trace = traces(reported["accuracy"])["V2Drop"]
    bars = zip(trace["y"], trace["error_y"]["arrayminus"], trace["error_y"]["array"], strict=True)
    assert [(y, y - low, y + high) for y, low, high in bars] == [(70.0, 67.5, 71.5), (90.0, 87.5, 91.5), (94.0, 91.5, 95.5)]
    ranked = traces(reported["rankings"]["32"])["V2Drop"]
    assert (ranked["x"], ranked["error_x"]["arrayminus"], ranked["error_x"]["array"]) == ([90.0], [2.5], [1.5])


def test_lines_stand_apart_sideways_but_nearer_to_their_budget_than_to_the_next():
    figure = task_report(make_run())["accuracy"]
    places = np.array([[math.log(tokens) for tokens in traces(figure)[name]["x"]] for name in ("V2Drop", "Random")])
    budgets = np.log(sorted(BUDGETS))
    assert np.abs(places - budgets).max() < np.diff(budgets).min() / 4
    assert (places[0] > budgets).all()  # V2Drop's on the dear side
    assert (places[1] < budgets).all()
    assert figure["layout"]["xaxis"]["tickvals"] == [16, 32, 48, 144]


def test_dense_is_a_line_and_a_band_as_wide_as_its_interval():
    reported = task_report(make_run())
    band, line = reported["accuracy"]["layout"]["shapes"]
    assert (band["y0"], band["y1"], line["y0"], line["y1"]) == pytest.approx((94.7, 98.7, 97.2, 97.2))
    band, line = reported["rankings"]["48"]["layout"]["shapes"]
    assert (band["x0"], band["x1"], line["x0"], line["x1"]) == pytest.approx((94.7, 98.7, 97.2, 97.2))
    assert band["name"] == line["name"] == "dense"


def test_published_settings_are_open_marks_without_a_line():
    found = traces(task_report(make_run())["accuracy"])
    assert found["FastV K=2 R=50%"]["marker"]["symbol"] == "triangle-up-open"
    assert len(found["FastV K=2 R=50%"]["x"]) == 1
    assert found["FastV"]["marker"]["symbol"] == "triangle-up"


def test_a_long_name_beside_a_figure_is_broken_into_lines_that_leave_room_for_the_marks():
    rows = [
        make_row("demo", name, 48.0, 80.0)
        for name in ("v2drop", "<b> of my own & with a name that is long", "visionzip+v2drop:share=0.5")
    ]
    drawn = figures.ranking_figure(rows, "48", figures.method_styles([row["method"] for row in rows]))
    names = [name for trace in drawn["data"] for name in trace["y"]]
    assert names == ["V2Drop", "&lt;b&gt; of my own &amp; with a<br>name that is long", "visionzip+v2drop:share=0.5"]


def test_costs_that_were_not_measured_have_no_figure():
    times, memories = task_report(make_run())["costs"]
    assert list(times) == ["prefill of a prompt, ms", "whole answer, ms"]
    assert list(memories) == ["key/value cache of a prompt, MB", "prefill of a prompt, TFLOPs"]
    trace = traces(memories["key/value cache of a prompt, MB"])["V2Drop"]
    assert (trace["x"], trace["y"]) == ([16 / 50, 32 / 50, 48 / 50], [70.0, 90.0, 94.0])
    assert trace["marker"]["size"] == sorted(set(trace["marker"]["size"]))


def test_maps_show_how_often_a_place_is_kept_beside_the_average():
    entry = make_run()["position_bias"][0]
    entry["map"][1][1], entry["kept_share"] = None, 0.2
    picture, rows, columns = figures.map_figure(entry)["data"]
    average = entry["kept_share"]
    for row, column in itertools.product(range(GRID), range(GRID)):
        probability = entry["map"][row][column]
        if probability is None:
            assert picture["z"][row][column] is None
        else:
            assert 2 ** picture["z"][row][column] == pytest.approx(min(4, max(0.25, probability / average)))
    assert {-2, 2} < {value for row in picture["z"] for value in row}  # both ends of the scale are reached
    assert (rows["x"], columns["y"]) == (entry["rows"], entry["columns"])


def test_curves_show_every_tenth_beside_the_average():
    entry = make_run()["position_bias"][0]
    even, curve = figures.bias_figure([entry], figures.STYLES)["data"]
    assert set(even["y"]) == {1}
    expected = [share / entry["kept_share"] for share in entry["bins"][:9]]
    assert curve["y"][:9] == pytest.approx(expected)
    assert curve["y"][9] is None
    assert curve["x"][0] == 5


@pytest.mark.parametrize("seed", range(8))
def test_the_faded_path_covers_the_dropped_patches_and_no_others(seed):
    rng = np.random.default_rng(seed)
    rows, columns = 5, 7
    kept = rng.permutation(rows * columns)[: seed * 5].tolist()
    covered = np.zeros((rows, columns), dtype=int)
    for left, top, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", page.dropped_path(kept, (rows, columns))):
        covered[int(top), int(left) : int(left) + int(width)] += 1
    assert covered.flatten().tolist() == [int(patch not in kept) for patch in range(rows * columns)]


@pytest.mark.parametrize(("correct", "said"), [(1.0, "right"), (0.0, "wrong"), (0.3, "partly right, 0.3")])
def test_answers_are_marked_in_words(correct, said):
    assert page.verdict(correct) == said


# -- in a browser


class Browser:
    """Chromium without a window, told what to do over a pipe in its developer tools' protocol."""

    def __init__(self, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        redirect = f'exec "$@" 3<&{read_there} 4>&{write_there}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", str(CHROMIUM), *flags, f"--user-data-dir={profile}"],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self.writer, self.reader = os.fdopen(write_here, "wb", 0), os.fdopen(read_here, "rb")
        self.numbers, self.session, self.events = itertools.count(1), {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.writer.write(json.dumps({"id": number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (message := self.receive()).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def receive(self) -> dict[str, Any]:
        """One message; they end with a zero byte."""
        message = b""
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "the browser ended"
            message += byte
        return json.loads(message)

    def run(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.prefer("dark" if dark else "light")
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait_for(self, condition: str) -> None:
        deadline = time.monotonic() + 60
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def prefer(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def named(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["method"] in names]

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


MARKS = "[...new Set([...document.querySelectorAll('.plot.tall')].find(p => p.offsetParent).data.map(t => t.meta))].sort()"
DRAWN = """[...document.querySelectorAll('.plot')].filter(p => p.offsetParent).map(
    p => [p.querySelectorAll('svg.main-svg').length, p.scrollWidth - p.clientWidth, p.querySelector('svg').clientWidth])"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390, 320])
def test_every_figure_is_drawn_within_the_page_without_errors_or_requests(browser, report, width, dark):
    browser.open(report, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width
    drawn = browser.run(DRAWN)
    assert len(drawn) == 1 + 4 + 2 + 1 + 3
    assert all(layers > 0 and overflow <= 0 and 0 < own <= width for layers, overflow, own in drawn)
    assert browser.run(MARKS) == ["fastv", "random", "v2drop"]
    assert browser.run("document.querySelectorAll('.plot.tall .trace.scatter').length") == 4
    assert browser.run("document.title") == "tiny & small: dropping vision tokens"
    assert not browser.named("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    requests = [event["params"]["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert {request.partition(":")[0] for request in requests if request != report.as_uri()} <= {"data", "blob"}


def test_figures_are_drawn_with_the_shared_script_and_a_page_without_it_says_what_to_do(browser, tmp_path):
    (tmp_path / "results").mkdir()
    path = write_run(tmp_path / "results" / "run", ablation_run(), [])
    browser.open(path, 1400, False)
    assert all(layers > 0 for layers, _, _ in browser.run(DRAWN))
    assert browser.run("document.querySelectorAll('.ablations .trace.scatter').length") == 4
    assert browser.run("document.querySelector('.missing').hidden") is True
    assert not browser.named("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    next((tmp_path / "results").glob("plotly*")).unlink()
    browser.open(path, 1400, False)
    assert "--standalone" in browser.run("document.querySelector('.missing').innerText")
    assert not browser.named("Runtime.exceptionThrown")


TABLE = """(box => [box.previousElementSibling.hidden, box.classList.contains('more'), box.scrollWidth > box.clientWidth])(
    [...document.querySelectorAll('.scroll')].find(box => box.offsetParent))"""


def test_a_table_that_is_wider_than_the_page_shows_that_it_scrolls(browser, report):
    browser.open(report, 3000, False)
    browser.run("document.querySelector('main').style.maxWidth = 'none'; dispatchEvent(new Event('resize'))")
    assert browser.run(TABLE) == [True, False, False]
    browser.open(report, 600, False)
    assert browser.run(TABLE) == [False, True, True]
    browser.run("[...document.querySelectorAll('.scroll')].find(box => box.offsetParent).scrollTo(9999, 0)")
    browser.run("dispatchEvent(new Event('resize'))")
    assert browser.run(TABLE) == [False, False, True]


def test_figures_change_their_colours_with_the_theme(browser, report):
    ink = "getComputedStyle(document.querySelector('.plot.tall text')).fill"
    line = "document.querySelector('.plot.tall').data.find(t => t.meta === 'v2drop').line.color"
    browser.open(report, 1400)
    light = browser.run(ink), browser.run(line)
    browser.run("document.getElementById('theme').click()")
    dark = browser.run(ink), browser.run(line)
    assert light == ("rgb(29, 33, 37)", "rgb(214, 60, 0)")
    assert dark == ("rgb(231, 229, 224)", "rgb(255, 127, 77)")
    browser.run("document.getElementById('theme').click()")
    assert (browser.run(ink), browser.run(line)) == light
    browser.open(report, 1400)
    browser.prefer("dark")
    browser.wait_for(f"{ink} === '{dark[0]}'")  # the browser tells the page at its next frame
    assert browser.run(line) == dark[1]


def test_the_legend_switches_a_method_off_everywhere(browser, report):
    shown = "[...document.querySelectorAll('[data-method=fastv]')].filter(part => part.offsetParent).length"
    browser.open(report, 1400)
    before = browser.run(shown)
    browser.run("document.querySelector('[data-switch=fastv]').click()")
    assert (before > 4, browser.run(shown)) == (True, 0)
    for part in ("table tr", ".maps figure", ".answer"):
        visible = f"[...document.querySelectorAll('{part}')].filter(p => p.offsetParent)"
        words = browser.run(f"{visible}.map(p => p.innerText).join()")
        assert ("V2Drop" in words, "FastV" in words) == (True, False), part
    assert browser.run(MARKS) == ["random", "v2drop"]
    browser.run("document.querySelector('[data-switch=dense]').click()")
    assert browser.run("document.querySelector('.plot.tall').layout.shapes.length") == 0
    browser.run("document.querySelector('[data-switch=v2drop]').dispatchEvent(new MouseEvent('dblclick'))")
    assert browser.run(MARKS) == ["v2drop"]
    browser.run("document.getElementById('everything').click()")
    assert (browser.run(shown), browser.run(MARKS)) == (before, ["fastv", "random", "v2drop"])


def test_tasks_budgets_and_pictures_are_chosen(browser, report):
    choose = "(select => {{ select.value = '{}'; select.dispatchEvent(new Event('change', {{bubbles: true}})) }})({})"
    browser.open(report, 390)
    assert "Plain?" not in browser.run("document.body.innerText")
    browser.run("document.querySelectorAll('input[type=radio]')[1].click()")
    assert "Plain?" in browser.run("document.body.innerText")
    cards = "[...document.querySelectorAll('[data-choice^=answers]')].filter(p => p.offsetParent).map(p => p.dataset.value)"
    assert browser.run(cards) == ["48"]
    browser.run(choose.format("16", "document.querySelector('select[name=answers-1]')"))
    assert browser.run(cards) == ["16"]
    browser.run(choose.format("pope", "document.querySelector('select[name=task]')"))
    assert "Else?" in browser.run("document.body.innerText")
    assert "Plain?" not in browser.run("document.body.innerText")
    assert all(layers for layers, _, _ in browser.run(DRAWN))
    assert not browser.named("Runtime.exceptionThrown")


def test_a_click_on_a_column_sorts_by_it_and_missing_numbers_come_last(browser, report):
    browser.open(report, 1400)
    column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[{}].dataset.value)"
    headers = browser.run("[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map(cell => cell.innerText.trim())")
    score, decode = headers.index("score"), headers.index("ms a token")
    click = "document.querySelectorAll('table')[0].tHead.rows[0].cells[{}].querySelector('button').click()"
    browser.run(click.format(score))
    falling = [float(value) for value in browser.run(column.format(score))]
    assert falling == sorted(falling, reverse=True)
    browser.run(click.format(score))
    assert [float(value) for value in browser.run(column.format(score))] == falling[::-1]
    browser.run(click.format(decode))
    browser.run(click.format(decode))
    assert browser.run(column.format(decode))[-4:] == [""] * 4
    browser.run(click.format(0))
    browser.run(click.format(0))
    names = browser.run(column.format(0))
    assert names == sorted(names, key=str.lower)
