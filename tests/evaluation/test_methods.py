"""Users' own methods: how they are found, and what is said of one that fails."""

from pathlib import Path
from typing import Any

import pytest
from tiny import one_prompt, tiny_decoder
from tiny_tasks import OWN_METHOD

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation.methods import MethodFailed, find_method, find_methods, naming_errors, sources_of
from nanovlm_v2drop.evaluation.plans import Plan, equal_budget_plans, official_plans
from nanovlm_v2drop.inference import prefill

DEMO = Shape(144, 12)


def test_a_users_own_file_gives_a_method(tmp_path: Path):
    file = tmp_path / "my_method.py"
    file.write_text(OWN_METHOD)
    (plan,) = equal_budget_plans([f"{file}:Own"], [Budget(tokens=48)], DEMO, seeds=[0])
    assert (plan.method, plan.key) == ("own", "own 48")
    with pytest.raises(ValueError, match="own has no published setting; compare it with --accounting equal"):
        official_plans([f"{file}:Own"], DEMO, seeds=[0])
    with pytest.raises(ValueError, match="has no class Missing that is a TokenDropper"):
        find_methods([f"{file}:Missing"])
    with pytest.raises(ValueError, match=r"Half in .* chooses nothing: it must have a score, a select or a compress method"):
        find_methods([f"{file}:Half"])
    with pytest.raises(ValueError, match="there is no file"):
        find_methods([f"{tmp_path}/nowhere.py:Own"])


def test_a_users_method_needs_a_name_that_no_other_has(tmp_path: Path):
    for number in (1, 2):
        (tmp_path / f"own_{number}.py").write_text(OWN_METHOD)
    with pytest.raises(ValueError, match="are both called 'own': give each a name of its own"):
        find_methods([f"{tmp_path}/own_1.py:Own", f"{tmp_path}/own_2.py:Own"])
    for taken in ("dense", "v2drop"):
        (tmp_path / "own_1.py").write_text(OWN_METHOD.replace('"own"', f'"{taken}"'))
        with pytest.raises(ValueError, match=f"is called '{taken}' as another method is: give it a name of its own"):
            find_methods([f"{tmp_path}/own_1.py:Own"])
    (tmp_path / "own_1.py").write_text("from nanovlm_v2drop import V2Drop\n\nclass Own(V2Drop):\n    pass\n")
    with pytest.raises(ValueError, match="is called 'v2drop'"):
        find_methods([f"{tmp_path}/own_1.py:Own"])


@pytest.mark.parametrize(("text", "message"), [("class Own(:", "invalid syntax"), ("import nowhere", "No module named")])
def test_a_users_file_that_does_not_run_is_named(text, message, tmp_path: Path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=rf"own\.py.* cannot be read: {message}"):
        find_methods([f"{tmp_path}/own.py:Own"])


def test_a_users_file_may_hold_dataclasses(tmp_path: Path):
    imports = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    settings = "@dataclass\nclass Settings:\n    power: int = 2\n"
    (tmp_path / "own.py").write_text(imports + settings + OWN_METHOD)
    (method,) = find_methods([f"{tmp_path}/own.py:Own"])
    assert method.name == "own"


HEAD = """import sys
import torch
from nanovlm_v2drop.dropping import TokenDropper

class Own(TokenDropper):
    name = "own"

"""
KEEP = "state.seqlens[0] - state.vision_counts[0] + counts[0]"  # rows that should stay
FAULTS = {  # body of the class -> line, and what is said
    "    def score(self, state): return {}['a']": (8, "KeyError: 'a'"),
    "    def score(self, state): return state.hidden_state.norm(dim=-1)": (8, "AttributeError: .* no attribute 'hidden_state'"),
    "    def score(self, state): return 1 / 0": (8, "ZeroDivisionError: division by zero"),
    "    def score(self, state): sys.exit('enough')": (8, "SystemExit: enough"),
    "    def score(self, state): sys.exit(0)": (8, "SystemExit: 0"),
    "    def score(self, state): raise RuntimeError": (8, "RuntimeError$"),
    "    def score(self, state): raise ValueError('one\\ntwo')": (8, "ValueError: one$"),
    "    def score(self, state): return state.hidden_states": (5, "ValueError: the score of own must be one number for each"),
    "    def score(self, state): return None": (5, "ValueError: the score of own must be one number for each token"),
    "    def select(self, state, counts): return torch.tensor([0])": (5, "ContractBroken: own keeps another number of rows"),
    "    def select(self, state, counts): return torch.arange(10**6)": (5, "IndexError: index out of range"),
    "    def select(self, state, counts): return [1, 2, 3]": (5, "TypeError: "),
    f"    def select(self, state, counts): return torch.zeros({KEEP}, dtype=torch.long)": (5, "ContractBroken: own "),
    f"    def select(self, state, counts): return torch.arange({KEEP})": (5, "ContractBroken: own "),
    f"    def select(self, state, counts): return torch.arange({KEEP}) + 2": (5, "ContractBroken: own "),
    f"    def select(self, state, counts): return torch.arange({KEEP}).flip(0)": (5, "ContractBroken: own "),
    "    def select(self, state, counts): return torch.cat([state.text_rows()[0], state.vision_rows()[0][:counts[0]]])": (
        5, "ContractBroken: own keeps a vision row twice, or moves rows"),
    "    def select(self, state, counts):\n"
    "        twice = state.vision_rows()[0][:1].repeat(counts[0])\n"
    "        return torch.cat([state.text_rows()[0], twice]).sort().values": (5, "ContractBroken: own keeps a vision row"),
    "    def compress(self, state, counts): return None": (5, "ContractBroken: own must return a PrefillState, not NoneType"),
    "    def compress(self, state, counts):\n"
    "        after = state.take(self.select(state, counts), counts)\n"
    "        after.hidden_states = after.hidden_states + 1\n"
    "        return after\n"
    "    def score(self, state): return state.hidden_states.norm(dim=-1)": (5, "ContractBroken: own loses, moves or changes"),
    "    depths, reads_attention = (0.0, 0.5), True\n"
    "    def score(self, state): return state.queries_and_keys()[0]": (
        9, "RuntimeError: no layer before layer 0 has attention: set earliest_layer = 1"),
    "    def score(self, state): return state.hidden_states.norm(dim=-1)\n"
    "    def decode_pruning(self, state): return open('/nowhere/at/all')": (9, "FileNotFoundError: "),
    "    def score(self, state): return state.hidden_states.norm(dim=-1)\n"
    "    def __init__(self, schedule): raise KeyError('made')": (9, "KeyError: 'made'"),
}  # fmt: skip


def own_plan(folder: Path, body: str) -> Plan:
    (folder / "own.py").write_text(HEAD + body + "\n")
    (plan,) = equal_budget_plans([f"{folder}/own.py:Own"], [Budget(tokens=12)], Shape(24, 6), seeds=[0])
    return plan


@pytest.mark.parametrize(("body", "line", "message"), [(body, *said) for body, said in FAULTS.items()])
def test_a_users_method_that_fails_is_named_with_file_and_line(body: str, line: int, message: str, tmp_path: Path) -> None:
    plan = own_plan(tmp_path, body)
    with pytest.raises(MethodFailed, match=rf"^{tmp_path}/own\.py:{line}: {message}") as failed, plan.answering():
        prefill(tiny_decoder(), one_prompt(5, 24, 7), plan.dropper_for(one_prompt(5, 24, 7), 6))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("choice", ["torch.arange(24) < count", "torch.arange(count - 1)"])
def test_a_users_choice_of_another_number_of_tokens_is_told_with_both_numbers(choice: str, tmp_path: Path) -> None:
    imports = "import torch\nfrom nanovlm_v2drop.dropping.before_decoder import BeforeDecoder\n"
    body = f"class Own(BeforeDecoder):\n    name = 'own'\n    def choose(self, picture, count): return {choice}\n"
    (tmp_path / "own.py").write_text(imports + body)
    (method,) = find_methods([f"{tmp_path}/own.py:Own"])
    with pytest.raises(ValueError, match=r"choose of own must give the numbers of 6 tokens, \(6,\), not \((24|5),\)"):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), method(DropSchedule({0: 0.25})))


def test_a_users_method_that_keeps_right_rows_is_not_disturbed(tmp_path: Path) -> None:
    plan = own_plan(tmp_path, "    def score(self, state): return (state.hidden_states - state.previous).float().norm(dim=-1)")
    with plan.answering():
        own = prefill(tiny_decoder(), one_prompt(5, 24, 7), plan.dropper)
    official = prefill(tiny_decoder(), one_prompt(5, 24, 7), DROPPERS["v2drop"](plan.schedule))
    assert [kept[0].tolist() for _, kept in own.kept] == [kept[0].tolist() for _, kept in official.kept]


def test_an_error_in_a_method_of_the_package_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("v2drop", DROPPERS["v2drop"], lambda shape: DropSchedule({1: 0.5}), Shape(24, 6))

    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(DROPPERS["v2drop"], "score", broken)
    with pytest.raises(KeyError, match="ours"), plan.answering():
        prefill(tiny_decoder(), one_prompt(5, 24, 7), plan.dropper)


def test_a_schedule_for_of_a_user_that_returns_something_else_is_named(tmp_path: Path) -> None:
    body = "    def score(self, state): return 1\n    @classmethod\n    def schedule_for(cls, *_): return {3: 0.5}"
    with pytest.raises(MethodFailed, match=rf"{tmp_path}/own\.py:5: TypeError: schedule_for of Own must return a DropSchedule"):
        own_plan(tmp_path, body)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine(TokenDropper): pass", r"own\.py:1 cannot be read: NameError: name 'TokenDropper' is not defined"),
        ("import sys\nsys.exit(3)", r"own\.py:2 cannot be read: SystemExit: 3"),
        ("\n\n1 / 0", r"own\.py:3 cannot be read: ZeroDivisionError: division by zero"),
        ("a = '\0'", r"own\.py cannot be read: source code string cannot contain null bytes"),
    ],
)
def test_a_users_file_that_fails_when_it_is_read_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_methods([f"{tmp_path}/own.py:Own"])


MINE = '''
import torch
from nanovlm_v2drop import TokenDropper
class Mine(TokenDropper):
    name = "mine"
    earliest_layer = 1
    def __init__(self, schedule, power=1.0):
        super().__init__(schedule)
        self.power = power
    def score(self, state):
        return state.hidden_states.float().norm(dim=-1) ** self.power
class Wrong(Mine):
    name = "wrong"
    def select(self, state, vision_counts):
        return super().select(state, vision_counts).flip(0)
'''


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_options_and_chains_of_methods_are_found_by_their_text(mine):
    cosine, own, pair = find_methods(["v2drop:metric=cosine", f"{mine}:Mine:power=2", "divprune+v2drop:metric=l1:share=0.3"])
    assert (cosine.name, cosine(DropSchedule({1: 0.5})).metric) == ("v2drop:metric=cosine", "cosine")
    assert (own.name, own(DropSchedule({1: 0.5})).power) == ("mine:power=2", 2)
    assert (pair.name, pair.levels) == ("divprune+v2drop:metric=l1:share=0.3", (0.3, 1.0))
    assert mine.resolve() in sources_of(find_method(f"divprune+{mine}:Mine"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v2drop:metrik=l1", "v2drop has no option metrik; it has: cut_cache, layers, metric"),
        ("v2drop:metric=2", "v2drop: metric must be a value like l2, not 2"),
        ("v2drop:metric=l3", "unknown metric 'l3'; choose one of: l2, l1, cosine"),
        ("dycoke:prune=often", "dycoke: prune must be a value like 0.7, not 'often'"),
        ("dycoke:layer=1.5", "dycoke: layer must be a value like 3, not 1.5"),
        ("v2drop:cut_cache=1", "v2drop: cut_cache must be a value like False, not 1"),
        ("sparsevlm:cut_cache=true", "sparsevlm:cut_cache=True averages tokens, which earlier caches do not hold"),
        ("random:seed=3", "random: give the seed as --seed"),
        ("v2drop+divprune", "divprune acts before the decoder: it must be the first of a chain"),
        ("divprune+v2drop:share=2", r"2 methods need 1 shares from 0 to 1, together at most 1, not \[2.0\]"),
        ("divprune+nobody", "unknown method 'nobody'; choose from: dense"),
    ],
)
def test_a_wrong_option_or_chain_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message):
        find_method(text)


def test_a_users_method_in_a_chain_is_checked_and_named(mine):
    method = find_method(f"divprune+{mine}:Wrong")
    dropper = method(method.schedule_for(8, 24, 6))
    with pytest.raises(MethodFailed, match=r"mine\.py:.*wrong"), naming_errors(method):
        prefill(tiny_decoder(), one_prompt(5, 24, 7), dropper)
