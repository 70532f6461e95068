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


def test_deepstack_follows_its_rows_and_is_added_behind_one_layer_after_the_other():
    state = initial_state(pack_together(tiny_prompts(family="qwen3-vl")))
    levels, entered = state.deepstack, state.hidden_states
    kept = torch.tensor([0, 5, 9, 30, 36, 39, 43, 55])
    state = state.take(kept, (2, 1, 0))
    assert torch.equal(state.deepstack, levels[kept])
    for level in range(3):
        output = torch.full_like(entered[kept], float(level))
        state.advance(output)
        assert torch.equal(state.hidden_states, output + levels[kept, level])
        assert state.previous_output is output
        assert state.without_surroundings().previous_output is state.hidden_states
    assert state.deepstack is None
    state.advance(entered[kept])
    assert torch.equal(state.hidden_states, entered[kept])
    assert state.previous_output is state.hidden_states


def test_merged_rows_bring_their_own_deepstack():
    state = initial_state(pack_together(tiny_prompts(family="qwen3-vl")))
    new = [torch.full((count, 3, 32), 7.0) for count in (2, 1, 0)]
    merged = state.append_merged([part[:, 0] for part in new], new)
    is_new = merged.vision_indices == -2
    assert torch.equal(merged.deepstack[is_new], torch.cat(new))
    assert torch.equal(merged.deepstack[~is_new], state.deepstack)
