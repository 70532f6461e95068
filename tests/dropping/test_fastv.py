"""FastV beside the authors' two codes, and beside attention written out."""

import torch
from golden import Golden, check_run
from tiny import one_prompt, pack_together, tiny_decoder, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.inference import prefill

FastV = DROPPERS["fastv"]


def test_kept_tokens_logits_cache_and_decode_equal_the_authors_cached_code():
    golden = Golden.open("fastv_cached_b")
    out = check_run(golden, golden.decoder(), golden.packed(golden.inputs_embeds()), FastV.official("K=3 R=50%"))
    assert out.kept[0][1][0].tolist() == golden.tensors["kept0"].tolist()


def test_every_step_of_the_authors_in_place_code_is_a_prefill_of_prompt_and_answer():
    golden = Golden.open("fastv_inplace_b")
    decoder, embeds = golden.decoder(), golden.inputs_embeds()
    for step, (logits, kept) in enumerate(zip(golden.tensors["logits"], golden.tensors["kept_per_step"], strict=True)):
        answer = decoder.embed_tokens(golden.tensors["tokens"][:step])
        out = prefill(decoder, golden.packed(torch.cat([embeds, answer])), FastV.official("K=2 R=50%"))
        assert out.kept[0][1][0].tolist() == kept.tolist()
        torch.testing.assert_close(out.logits[0], logits, atol=2e-4, rtol=0)


def test_each_sequence_is_ranked_by_its_own_last_token():
    decoder = tiny_decoder()
    dropper = FastV(DropSchedule({2: 0.5}))
    together = prefill(decoder, pack_together(tiny_prompts()), dropper)
    for index, part in enumerate(tiny_prompts()[:2]):
        alone = prefill(decoder, part, dropper)
        assert together.kept[0][1][index].tolist() == alone.kept[0][1][0].tolist()


def test_the_kept_tokens_are_those_with_most_attention_in_an_attention_matrix_written_out():
    decoder, packed, seen = tiny_decoder(), one_prompt(5, 24, 7), []

    class Watching(FastV):
        def score(self, state):
            q, k = state.queries, state.keys.repeat_interleave(2, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            scores.masked_fill_(torch.ones(36, 36).triu(1).bool(), -torch.inf)
            seen.append((scores.softmax(-1)[:, -1].mean(0), super().score(state)))
            return seen[-1][1]

    prefill(decoder, packed, Watching(DropSchedule({1: 0.5})))
    torch.testing.assert_close(*seen[0])
