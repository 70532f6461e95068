"""A finding of the ledger: a claim of the paper, what was measured here, and the verdict that follows from the figures.

The rules, with 95 % intervals everywhere:

- "better" holds where the whole interval of the difference is above zero.
- "hardly matters" holds where the whole interval of the difference is within HARDLY points.
- "is kept" holds where the whole interval is above the paper's share less KEPT points.
- "two rankings agree" holds where the whole interval of Spearman's correlation is above AGREES.

No verdict is written down in advance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not decided here"
NEEDS, NEEDS_GPU = "needs the official weights", "needs a GPU"
NEEDS_TEXT = "needs the weights of a text model"
HARDLY = 5.0  # points of score
KEPT = 1.0  # points of a share
AGREES = 0.5  # Spearman's rank correlation
COLUMNS = ("claim", "paper", "measured here", "verdict", "decided by")


@dataclass(frozen=True)
class Finding:
    """One row of the ledger. `decides` is the command or notebook that measures this claim."""

    claim: str
    paper: str
    measured: str
    verdict: str
    decides: str


def shown(value: float, bounds: Sequence[float]) -> str:
    """A difference and its interval, with signs."""
    return f"{value:+.1f} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


def is_better(bounds: Sequence[float]) -> str:
    """The verdict on "better" from the interval (low, high) of a difference."""
    return HOLDS if bounds[0] > 0 else FAILS if bounds[1] < 0 else OPEN


def hardly_matters(bounds: Sequence[Sequence[float]]) -> str:
    """The verdict on "hardly matters" from the intervals of all differences from the paper's choice."""
    if any(low > HARDLY or high < -HARDLY for low, high in bounds):
        return FAILS
    return HOLDS if all(low >= -HARDLY and high <= HARDLY for low, high in bounds) else OPEN


def is_kept(bounds: Sequence[float], share: float) -> str:
    """The verdict on "is kept" from the interval (low, high) of what was measured and the paper's share, in percent."""
    least = share - KEPT
    return HOLDS if bounds[0] > least else FAILS if bounds[1] < least else OPEN


def agrees(bounds: Sequence[float]) -> str:
    """The verdict on "two rankings agree" from the interval of their rank correlation."""
    return HOLDS if bounds[0] > AGREES else FAILS if bounds[1] < AGREES else OPEN


def write_ledger(output: Path, findings: Sequence[Finding], command: str) -> Path:
    """Write `output`/claims.md, a markdown table with one row a finding below the command that measured them.

    Returns the file's path. Raises OSError where the folder cannot be written to.
    """
    path = output / "claims.md"
    path.write_text(ledger(findings, command), encoding="utf-8")
    return path


def ledger(findings: Sequence[Finding], command: str) -> str:
    """The text of claims.md."""
    rows = [(f.claim, f.paper, f.measured, f.verdict, decided_by(f.decides)) for f in findings]
    lines = [table_row(cells) for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return f"# The paper's claims, one by one\n\n```bash\n{command}\n```\n\n" + "\n".join(lines) + "\n"


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def decided_by(decides: str) -> str:
    """A link for a notebook, as seen from docs/; code for a command; other words as they are."""
    if decides.endswith(".ipynb"):
        return f"[{Path(decides).name}](../{decides})"
    return f"`{decides}`" if decides.startswith("python ") else decides
