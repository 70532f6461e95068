"""CDPruner beside the authors' code, and beside the determinant that its greedy choice maximises."""

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import in_a_prompt, open_parts, tokens, vision_after

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule
from nanovlm_v2drop.dropping.cdpruner import clip_relevance, greedy_choice, scaled

CDPruner = DROPPERS["cdpruner"]
PARTS, INPUTS, OUTPUTS = open_parts("cdpruner_b")
NO_TEXT = torch.empty(0, 256)


@pytest.mark.parametrize("count", [64, 128])
def test_with_the_questions_embeddings_kept_tokens_equal_the_authors_routine(count):
    features, text = INPUTS["llm"]["features"], INPUTS["llm"]["text"]
    packed = in_a_prompt(features, [(1, 24, 24)], before=NO_TEXT, behind=text)
    kept, rows = vision_after(CDPruner(CountSchedule({0: count})), packed)
    assert kept == OUTPUTS["llm"][f"kept{count}"].tolist()
    assert torch.equal(rows, features[kept])


def test_a_question_before_the_picture_counts_where_no_text_is_behind():
    features, text = INPUTS["llm"]["features"], INPUTS["llm"]["text"]
    packed = in_a_prompt(features, [(1, 24, 24)], before=text, behind=NO_TEXT)
    assert vision_after(CDPruner(CountSchedule({0: 64})), packed)[0] == OUTPUTS["llm"]["kept64"].tolist()


@pytest.mark.parametrize("count", [32, 64, 128, 192])
def test_with_clips_relevance_kept_tokens_equal_the_authors_code(count):
    given = INPUTS["clip"]
    relevance = clip_relevance(given["image_embeds"], given["text_embeds"])
    torch.testing.assert_close(relevance, OUTPUTS["clip"]["relevance"], atol=1e-5, rtol=0)
    kept = CDPruner.diverse(given["features"], relevance, count)
    assert kept.tolist() == OUTPUTS["clip"][f"kept{count}"].tolist()


def test_tiles_share_one_range_of_relevance():
    given = INPUTS["tiles"]
    relevance = clip_relevance(given["image_embeds"], given["text_embeds"]).split(144)
    for tile, (features, own) in enumerate(zip(given["features"].split(144), relevance, strict=True)):
        torch.testing.assert_close(own, OUTPUTS["tiles"]["relevance"][tile], atol=1e-5, rtol=0)
        assert CDPruner.diverse(features, own, 48).tolist() == OUTPUTS["tiles"]["kept"][tile].tolist()


def test_features_of_a_low_rank_meet_the_count():
    given = INPUTS["rank"]
    relevance = clip_relevance(given["image_embeds"], given["text_embeds"])
    assert CDPruner.diverse(given["features"], relevance, 24).tolist() == OUTPUTS["rank"]["kept24"].tolist()
    kept = CDPruner.diverse(given["features"], relevance, 48)
    assert len(kept.unique()) == 48
    assert set(OUTPUTS["rank"]["kept24"].tolist()) <= set(kept.tolist())
    assert len(CDPruner.diverse(torch.ones(144, 8), torch.ones(144), 8).unique()) == 8


def test_each_step_makes_the_determinant_as_large_as_it_can():
    vectors = tokens(3, 14, 10)
    chosen = greedy_choice(vectors, 6).tolist()
    for step, token in enumerate(chosen):
        def determinant(candidate, step=step):
            rows = vectors[[*chosen[:step], candidate]]
            return float(torch.linalg.det(rows.double() @ rows.double().T))

        assert token == max(set(range(14)) - set(chosen[:step]), key=determinant)


def test_equal_relevance_leaves_diversity_alone():
    assert scaled(torch.full((4,), 0.3), torch.full((4,), 0.3)).tolist() == [1, 1, 1, 1]
    features = tokens(4, 30, 16)
    wanted = greedy_choice(F.normalize(features, dim=-1), 9).sort().values
    assert torch.equal(CDPruner.diverse(features, torch.ones(30), 9), wanted)
