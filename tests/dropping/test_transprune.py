"""TransPrune beside the authors' code: scores, kept tokens, logits of prefill and decoding."""

import pytest
import torch
from golden import Golden, check_run, fingerprint
from golden_inputs import drawn
from tiny import one_prompt, pack_together, tiny_decoder

from nanovlm_v2drop.dropping import DROPPERS, BatchSchedule, DropSchedule
from nanovlm_v2drop.dropping.schedule import PromptShares
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.models.vlm import PackedInputs

TransPrune = DROPPERS["transprune"]
GOLDEN = Golden.open("transprune_b")


class Noting(TransPrune):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.noted = []

    def score(self, state):
        scores = super().score(state)
        shares = [self.normed(numbers, state) for numbers in (state.marks, self.question_attention(state))]
        self.noted.append([values[state.vision_mask] for values in (scores, *shares)])
        return scores


def test_scores_kept_tokens_and_logits_equal_the_authors_code():
    embeds = drawn(GOLDEN.meta["inputs_embeds"])
    assert fingerprint({"inputs": embeds}) == GOLDEN.meta["inputs_sha256"]
    rows, (start, count) = torch.arange(embeds.shape[1]), GOLDEN.meta["vision_span"]
    packed = PackedInputs(embeds[0], rows, (rows >= start) & (rows < start + count), [len(rows)])
    dropper, decoder = Noting.official(), GOLDEN.decoder()
    GOLDEN.tensors["kv_lengths"] = torch.tensor(GOLDEN.meta["kv_lengths"])
    out = check_run(GOLDEN, decoder, packed, dropper)
    for stage, (_, (kept,)) in enumerate(out.kept):
        assert kept.tolist() == GOLDEN.tensors[f"kept{stage}"].tolist()
        for name, values in zip(("score", "ttv", "iga"), dropper.noted[stage], strict=True):
            torch.testing.assert_close(values, GOLDEN.tensors[f"{name}{stage}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("prompt", "counts"), [(576, [504, 360, 72]), (300, [262, 187, 37])])
def test_the_official_shares_are_of_the_prompts_tokens(prompt, counts):
    per_layer = TransPrune.official().schedule.vision_tokens_per_layer(prompt, 32)
    assert per_layer == [prompt] * 7 + [counts[0]] * 2 + [counts[1]] * 3 + [counts[2]] * 20


def test_the_official_mean_is_236():
    assert TransPrune.official().schedule.mean_tokens(576, 32) == 236.25


def test_on_a_shallow_decoder_drop_points_move_to_neighbouring_layers():
    assert dict(TransPrune.official().schedule.mapped(12, 144)) == {3: 0.875, 4: 0.625, 5: 0.125}
    with pytest.raises(TypeError, match="need the prompt's count"):
        PromptShares({3: 0.5}).kept_count(3, 10)


def test_prompts_of_a_batch_with_other_drop_points_sum_their_own_layers():
    parts = [one_prompt(5, 24, 7), one_prompt(3, 24, 4, seed=2)]
    schedules = [DropSchedule({1: 0.9, 4: 0.5}), DropSchedule({3: 0.4})]
    together = prefill(tiny_decoder(), pack_together(parts), TransPrune(BatchSchedule(schedules)))
    for index, (part, schedule) in enumerate(zip(parts, schedules, strict=True)):
        alone = prefill(tiny_decoder(), part, TransPrune(schedule))
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
