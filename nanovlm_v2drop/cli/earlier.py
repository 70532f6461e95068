"""The plans of earlier starts of a run: plans.json in the output folder lists the options that each start had.

With `--resume` the tables show every plan that the folder has answers of, not only those of the last start.
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from ..dropping.budget import Shape
from ..evaluation.output import write_whole
from ..evaluation.plans import Plan
from ..evaluation.records import read_records
from .planning import plans_for

NOTED = ("methods", "accounting", "ablation", "tokens", "retain", "seed", "seeds")  # options that decide what plans there are


def note_plans(arguments: argparse.Namespace, output: Path) -> None:
    """Add this start's options to `output`/plans.json, unless an earlier start had the same."""
    options = {name: getattr(arguments, name) for name in NOTED}
    options["methods"] = [absolute(name) for name in options["methods"]]
    noted = noted_plans(output)
    if options in noted:
        return
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "plans.json", json.dumps([*noted, options], indent=1) + "\n")


def absolute(method: str) -> str:
    """A user's own FILE.py:CLASS as it can be found from any folder."""
    file, colon, class_name = method.rpartition(":")
    return f"{Path(file).resolve()}:{class_name}" if colon else method


def noted_plans(output: Path) -> list[dict[str, Any]]:
    """The options of all starts; raises ValueError for a file that does not hold such a list."""
    path = output / "plans.json"
    if not path.is_file():
        return []
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if not all(set(options) == set(NOTED) for options in noted):
            raise ValueError(f"every entry needs {', '.join(NOTED)}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it: tables then show the plans of this start only") from error
    return list(noted)


def earlier_plans(
    task: str, shape: Shape, plans: Sequence[Plan], sample_ids: Collection[str], arguments: argparse.Namespace, output: Path
) -> tuple[list[Plan], list[str]]:
    """The plans of earlier starts that are not in `plans` and have answered every sample of this run.

    The second list has a line for each plan that has answered only some of them, which cannot be compared.
    """
    counts = Counter(record.plan for record in read_records(output, {task: sample_ids}))
    earlier = {plan.key: plan for options in noted_plans(output) for plan in plans_of(shape, arguments, options)}
    others = [plan for key, plan in earlier.items() if key not in {plan.key for plan in plans}]
    left_out = [
        f"not shown: {plan.key} has answered {counts[plan.key]} of {len(sample_ids)} questions of {task}"
        for plan in others
        if 0 < counts[plan.key] < len(sample_ids)
    ]
    return [plan for plan in others if counts[plan.key] == len(sample_ids)], left_out


def plans_of(shape: Shape, arguments: argparse.Namespace, options: dict[str, Any]) -> list[Plan]:
    """The plans of one earlier start; none where its options no longer make any, such as a method whose file is gone."""
    earlier = copy(arguments)
    vars(earlier).update(options)
    try:
        return plans_for(shape, earlier)
    except ValueError:
        return []
