"""What a method sees at a drop point, and how rows leave."""

from dataclasses import replace

import torch
from tiny import one_prompt, pack_together, tiny_prompts
from tiny_methods import SCHEDULE

from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.inference import initial_state


def test_numbers_of_rows_follow_their_rows_through_drops_and_merges():
    state = initial_state(pack_together(tiny_prompts()))
    numbers = torch.arange(len(state.hidden_states))
    state.marks, state.carried = numbers, {"more": 10 * numbers}
    kept = state.take(torch.tensor([0, 3, 4, 7]), (3, 0, 0))
    assert (kept.marks.tolist(), kept.carried["more"].tolist()) == ([0, 3, 4, 7], [0, 30, 40, 70])
    merged = state.append_merged([torch.zeros(2, 32), torch.zeros(1, 32), torch.zeros(0, 32)])
    assert merged.marks.tolist() == merged.carried["more"].div(10).tolist()
    assert merged.marks[merged.vision_indices >= -1].tolist() == numbers.tolist()


def test_the_question_is_the_text_behind_the_picture_or_all_text_where_none_is_behind():
    parts = [one_prompt(5, 24, 7), one_prompt(4, 8, 0), one_prompt(6, 0, 9)]
    state = initial_state(pack_together(parts))
    questions = [rows.tolist() for rows in state.question_rows()]
    assert questions == [list(range(29, 36)), [36, 37, 38, 39], list(range(48, 63))]
    after = DROPPERS["v2drop"](SCHEDULE).compress(replace(state, previous=state.hidden_states), (3, 2, 0))
    assert [len(rows) for rows in after.question_rows()] == [7, 4, 15]
    assert torch.equal(after.hidden_states[after.question_rows()[0]], state.hidden_states[29:36])
