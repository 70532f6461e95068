"""lmms-eval's own prompts and scores, by the names of our tasks. Needs lmms-eval 0.7 (an environment of its own).

python tests/lmms_eval_oracle.py        writes tests/goldens/lmms_eval.json
"""

import contextlib
import copy
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

from benchmark_rows import answer, rows_of

GOLDENS = Path(__file__).parent / "goldens" / "lmms_eval.json"
FOLDERS = {  # folder and yaml file below lmms_eval/tasks
    "gqa": ("gqa", "gqa"), "scienceqa": ("scienceqa", "scienceqa_img"), "textvqa": ("textvqa", "textvqa_val"),
    "textvqa-ocr": ("textvqa", "textvqa_val"), "vizwiz": ("vizwiz_vqa", "vizwiz_vqa_val"),
    "mmbench": ("mmbench", "mmbench_en_dev_static"), "ai2d": ("ai2d", "ai2d"), "mmstar": ("mmstar", "mmstar"),
    "seed-image": ("seedbench", "seedbench"), "pope": ("pope", "pope"), "mme": ("mme", "mme"),
    "mvbench": ("mvbench", "mvbench_action_sequence"), "videomme": ("videomme", "videomme"),
    "longvideobench": ("longvideobench", "longvideobench_val_v"), "mlvu": ("mlvu", "mlvu_dev"),
}  # fmt: skip
FUNCTIONS = {  # by which the names in utils.py begin, where that is not the folder's name
    "scienceqa": "sqa", "vizwiz": "vizwiz_vqa", "seed-image": "seed",
}  # fmt: skip
GOLDEN_ROWS, GOLDEN_ANSWERS = 12, 120
Row = dict[str, Any]


class Official:
    """One task of lmms-eval: its settings, and its functions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder, self.yaml = FOLDERS[name]
        if name == "longvideobench":  # its module imports decord, which prompts and scores do not need
            sys.modules.setdefault("decord", Mock())
        self.module = importlib.import_module(f"lmms_eval.tasks.{self.folder}.{'en_utils' if name == 'mmbench' else 'utils'}")
        self.settings = settings_of(Path(self.module.__file__ or "").parent, f"{self.yaml}.yaml")

    def function(self, end: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self.module, f"{FUNCTIONS.get(self.name, self.folder.replace('-', '_'))}_{end}")
        return found

    @property
    def max_new_tokens(self) -> int | None:
        """The limit that the task names; None where it names none."""
        return (self.settings.get("generation_kwargs") or {}).get("max_new_tokens")

    @property
    def until(self) -> list[str]:
        """What ends an answer: what the task names, or the separator of examples."""
        return (self.settings.get("generation_kwargs") or {}).get("until") or ["\n\n"]

    def prompt(self, row: Row) -> str:
        kwargs = (self.settings.get("lmms_eval_specific_kwargs") or {}).get("default")
        if self.name == "textvqa-ocr":
            kwargs = {**kwargs, "ocr": True}
        row = copy.deepcopy(row)
        text: str = self.function("doc_to_text")(row, kwargs) if kwargs else self.function("doc_to_text")(row)
        return text

    def score(self, row: Row, text: str) -> float:
        """What one answer gets, 0 to 1, as if it were the only one (of MMBench, to the first rotation)."""
        first = {"index": row["index"] % 1_000_000} if self.name == "mmbench" else {}
        return self.summary([{**row, **first}], [text])

    def results(self, row: Row, text: str, process: str = "process_results") -> dict[str, Any]:
        if self.name == "longvideobench":  # an answer without a letter is drawn at random; ours by the question's id
            self.module.random = Random(row["id"])
        found: dict[str, Any] = self.function(process)(copy.deepcopy(row), [text])
        return found

    def summary(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        """The task's number over answers to rows; a share, but for MMBench and MME."""
        compute = getattr(self, self.name.replace("-", "_"), self.mean_of_exact_match)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            return float(compute(rows, texts))

    def mean_of_exact_match(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        scores = [self.results(row, text)["exact_match"] for row, text in zip(rows, texts, strict=True)]
        return sum(scores) / len(scores)

    def gqa(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.by_metric([row["answer"] for row in rows], texts)

    def by_metric(self, truths: Sequence[str], texts: Sequence[str]) -> float:
        """The metric that the task's settings name, answer by answer as lmms-eval does."""
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        (metric,) = self.settings["metric_list"]
        options = {name: value for name, value in metric.items() if name.startswith("ignore_")}
        assert metric["metric"] == "exact_match"
        scores = [
            exact_match_hf_evaluate(predictions=[text], references=[truth], **options)["exact_match"]
            for truth, text in zip(truths, texts, strict=True)
        ]
        return float(sum(scores) / len(scores))

    def ai2d(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        options = {key: value for key, value in self.settings["filter_list"][0]["filter"][0].items() if key != "function"}
        filtered = self.module.MultiChoiceRegexFilter(**options).apply([[text] for text in texts], rows)
        truths = [self.function("doc_to_target")(row, self.settings["model_specific_target_kwargs"]["default"]) for row in rows]
        return self.by_metric(truths, [text.strip() for text in filtered])

    def mmbench(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        data = [self.results(row, text)["gpt_eval_score"] for row, text in zip(rows, texts, strict=True)]
        overall, _, _ = self.module.mmbench_evaluator.eval_result(data, eval_method="static")
        return float(overall)

    def mmstar(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.aggregated("average", rows, texts)

    def seed_image(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.aggregated("seed_image", rows, texts, "aggregation_result", "process_result")

    def aggregated(
        self,
        metric: str,
        rows: Sequence[Row],
        texts: Sequence[str],
        end: str = "aggregate_results",
        process: str = "process_results",
    ) -> float:
        found = [self.results(row, text, process)[metric] for row, text in zip(rows, texts, strict=True)]
        return float(self.function(end)(found))

    def pope(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.aggregated("pope_accuracy", rows, texts, "aggregate_accuracy")

    def mvbench(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        """The unweighted mean of the kinds."""
        kinds = dict.fromkeys(row["kind"] for row in rows)
        pairs = list(zip(rows, texts, strict=True))
        own = [[pair for pair in pairs if pair[0]["kind"] == kind] for kind in kinds]
        return sum(self.aggregated("mvbench_accuracy", *zip(*some, strict=True)) / 100 for some in own) / len(kinds)

    def videomme(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.aggregated("videomme_perception_score", rows, texts) / 100

    def longvideobench(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        return self.aggregated("lvb_acc", rows, texts)

    def mlvu(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        """Of one answer whether it is right; of more the mean over the kinds."""
        share = self.aggregated("mlvu_percetion_score", rows, texts, "aggregate_results_dev") / 100
        return float(round(7 * share)) if len(rows) == 1 else share

    def mme(self, rows: Sequence[Row], texts: Sequence[str]) -> float:
        """Of one answer whether it is right; of whole pictures the sum of both scores."""
        found = [self.results(row, text) for row, text in zip(rows, texts, strict=True)]
        if len(found) == 1:
            return float(next(iter(found[0].values()))["score"])
        metrics = ("mme_perception_score", "mme_cognition_score")
        groups = [[one[metric] for one in found if metric in one] for metric in metrics]
        return float(sum(self.function("aggregate_results")(group) for group in groups if group))


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """A task's yaml file with what it includes; functions are left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    found: dict[str, Any] = yaml.load((folder / name).read_text(), Loader)
    included = settings_of(folder, found["include"]) if "include" in found else {}
    return {**included, **found}


def is_asked(row: Row) -> bool:
    """Whether a row is a question of the task: those of SEED-Bench about videos are not."""
    return row.get("data_type") != "video"


def plain(row: Row) -> Row:
    """A row without its pictures."""
    return {name: value for name, value in row.items() if name != "image"}


def goldens_of(name: str) -> dict[str, Any]:
    official, rng = Official(name), Random(name)
    rows = rows_of(name, GOLDEN_ROWS, seed=1)
    asked = [row for row in rows if is_asked(row)]
    texts = [[answer(rng, row) for _ in range(GOLDEN_ANSWERS // GOLDEN_ROWS)] for row in asked]
    return {
        "max_new_tokens": official.max_new_tokens,
        "until": official.until,
        "rows": [plain(row) for row in rows],
        "prompts": [official.prompt(row) for row in asked],
        "answers": [[[text, official.score(row, text)] for text in own] for row, own in zip(asked, texts, strict=True)],
        "summary": official.summary(asked, [own[0] for own in texts]),
    }


if __name__ == "__main__":
    importlib.import_module("loguru").logger.remove()
    goldens = {name: goldens_of(name) for name in FOLDERS}
    GOLDENS.write_text(json.dumps(goldens, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
