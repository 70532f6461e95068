"""ToMe-style merging beside bipartite soft matching in loops. Tests that also hold for VisionZip are in test_visionzip."""

import pytest
import torch
from test_visionzip import compress, picture, prompt, question
from torch import Tensor

from nanovlm_v2drop import load
from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.models.vision import VisionTrace

ToMe = DROPPERS["tome"]


def naive_tome(trace: VisionTrace, count: int) -> tuple[Tensor, list[int]]:
    """One token at a time, with sizes: rows (count, D), and the number of the patch at whose place each row stands."""
    heads = trace.keys()
    tokens = [
        {"place": place, "size": 1, "key": sum(head[1 + place] for head in heads) / len(heads), "hidden": hidden}
        for place, hidden in enumerate(trace.hidden_states[1:])
    ]
    while len(tokens) > count:
        first, second = tokens[0::2], tokens[1::2]
        edges = []
        for token in first:
            similarity = [float(torch.cosine_similarity(token["key"], other["key"], dim=0)) for other in second]
            edges.append((max(similarity), token, second[similarity.index(max(similarity))]))
        edges.sort(key=lambda edge: -edge[0])
        for _, token, partner in edges[: min(len(tokens) - count, len(tokens) // 2)]:
            size = token["size"] + partner["size"]
            for name in ("key", "hidden"):
                partner[name] = (token[name] * token["size"] + partner[name] * partner["size"]) / size
            partner["size"] = size
            tokens = [other for other in tokens if other is not token]
    return trace.project(torch.stack([token["hidden"] for token in tokens])), [token["place"] for token in tokens]


@pytest.mark.parametrize("num_patches", [2, 40, 41])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.51, 0.8, 0.99])
def test_a_picture_becomes_what_the_loops_make_of_it(num_patches, share):
    count = max(1, int(share * num_patches))
    for seed in range(3):
        packed = prompt(3, picture(num_patches, seed), 4)
        after = compress("tome", packed, count)
        rows, places = naive_tome(packed.vision[0], count)
        assert after.vision_indices.tolist() == [-1] * 3 + places + [-1] * 4
        torch.testing.assert_close(after.hidden_states[3 : 3 + count], rows, atol=1e-5, rtol=0)
        assert torch.equal(after.hidden_states[:3], packed.inputs_embeds[:3])
        assert torch.equal(after.hidden_states[-4:], packed.inputs_embeds[-4:])
        assert after.position_ids.tolist() == list(range(7 + count))


def test_one_token_is_the_projected_mean_of_all_patches():
    trace = picture(23, 0)
    after = compress("tome", prompt(3, trace, 4), 1)
    torch.testing.assert_close(after.hidden_states[3], trace.project(trace.hidden_states[1:].mean(0)), atol=1e-5, rtol=0)


def test_patches_that_merge_with_none_stay_bit_for_bit():
    packed = prompt(3, picture(40, 0), 4)
    after = compress("tome", packed, 39)
    before = packed.inputs_embeds[3:-4][after.vision_indices[3:-4]]
    assert (after.hidden_states[3:-4] != before).any(-1).sum() == 1


def test_twins_merge_before_any_other_pair():
    trace = picture(12, 0)
    keys = trace.keys().clone()
    keys[:, 1 + 4] = 3 * keys[:, 1 + 9]  # the same direction; 4 is in the first set, 9 in the second
    twins = VisionTrace(trace.hidden_states, trace.received_attention, lambda: keys, trace.project, 1)
    after = compress("tome", prompt(3, twins, 4), 11)
    assert after.vision_indices[3:-4].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    merged = trace.project((trace.hidden_states[1 + 4] + trace.hidden_states[1 + 9]) / 2)
    torch.testing.assert_close(after.hidden_states[3 + 8], merged, atol=1e-5, rtol=0)


@torch.no_grad()
def test_on_the_demo_model_the_tokens_are_as_in_the_loops():
    packed = load("demo").prepare([question(1)])
    after = compress("tome", packed, 48)
    rows, places = naive_tome(packed.vision[0], 48)
    assert after.vision_indices[after.vision_mask].tolist() == places
    torch.testing.assert_close(after.hidden_states[after.vision_mask], rows, atol=1e-4, rtol=0)


def test_the_settings_are_the_budgets_of_the_comparisons():
    assert {setting: dict(published.schedule) for setting, published in ToMe.published.items()} == {
        "64": {0: 64},
        "128": {0: 128},
        "192": {0: 192},
    }
