"""CLSE beside the authors' code: scores, kept tokens, logits of prefill and decoding, with and without the cut caches."""

import pytest
import torch
from golden import Golden, fingerprint
from golden_inputs import drawn
from tiny import one_prompt, tiny_decoder

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule, DropSchedule
from nanovlm_v2drop.dropping.clse import change_factor, spectral_energy
from nanovlm_v2drop.inference import decode_one_token, prefill
from nanovlm_v2drop.models.vlm import PackedInputs

CLSE = DROPPERS["clse"]
GOLDEN = Golden.open("clse_b")


@pytest.fixture(scope="module")
def decoder():
    return GOLDEN.decoder()


def packed_of(meta) -> PackedInputs:
    (embeds,) = drawn(meta["inputs_embeds"])
    rows, (start, count) = torch.arange(len(embeds)), meta["vision_span"]
    grids = ((tuple(meta["vision_grid"]),),)
    return PackedInputs(embeds, rows, (rows >= start) & (rows < start + count), [len(embeds)], vision_grids=grids)


CASES = [
    ("", CLSE.official("192")),
    ("retain128.", CLSE.official("128")),
    ("retain64.", CLSE.official("64")),
    ("attn.", CLSE.official("192", mode="attn")),
    ("grid.", CLSE(CountSchedule(dict(zip([1, 11, 21], GOLDEN.meta["grid"]["keep"], strict=True))))),
]


@pytest.mark.parametrize(("variant", "dropper"), CASES, ids=[name for name, _ in CASES])
@torch.no_grad()
def test_kept_tokens_and_logits_equal_the_authors_code(decoder, variant, dropper):
    packed = packed_of(GOLDEN.meta["grid"] if variant == "grid." else GOLDEN.meta)
    out = prefill(decoder, packed, dropper)
    for stage, (_, (kept,)) in enumerate(out.kept):
        assert kept.tolist() == GOLDEN.tensors[f"{variant}kept{stage}"].tolist()
    assert len(out.kept) == 3
    torch.testing.assert_close(out.logits[0], GOLDEN.tensors[f"{variant}logits"][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("prefix", "cut"), [("", True), ("uncut.", False)])
def test_decoding_equals_the_authors_code_with_and_without_the_cut(decoder, prefix, cut):
    out = prefill(decoder, packed_of(GOLDEN.meta), CLSE.official("192", cut_cache=cut))
    lengths = GOLDEN.meta["kv_lengths" if cut else "uncut_kv_lengths"]
    assert [own for (own,) in out.cache.seqlens] == lengths
    assert out.cache.position_ids.unique().tolist() == [631]
    for token, wanted in zip(GOLDEN.tensors["tokens"], GOLDEN.tensors[f"{prefix}logits"][1:], strict=True):
        torch.testing.assert_close(decode_one_token(decoder, token[None], out.cache)[0], wanted, atol=1e-3, rtol=0)


def test_the_official_llava_settings_cut_and_those_of_qwen2_vl_do_not():
    assert CLSE.official("64").cut_cache
    assert not CLSE.official("qwen2-vl 0.334").cut_cache
    assert not CLSE(DropSchedule({1: 0.5})).cut_cache


@pytest.mark.parametrize("name", ["odd", "frames"])
def test_the_spectral_energy_equals_the_authors_code(name):
    about = GOLDEN.meta["spectral"][name]
    energy = spectral_energy(drawn(about["features"]), (tuple(about["grid"]),))
    torch.testing.assert_close(energy, GOLDEN.tensors[f"spectral.{name}"], atol=1e-5, rtol=0)


def test_the_factor_of_a_change_equals_the_authors_code():
    inputs = {name: drawn(GOLDEN.meta[name]["inputs_embeds"]) if name == "grid" else drawn(GOLDEN.meta["inputs_embeds"])
              for name in ("grid", "inputs")}  # fmt: skip
    assert fingerprint(inputs) == GOLDEN.meta["inputs_sha256"]
    before, after = GOLDEN.tensors["stage0.s0"], GOLDEN.tensors["stage0.s1"]
    torch.testing.assert_close(change_factor(before, after), GOLDEN.tensors["stage0.factor"], atol=1e-4, rtol=0)
    packed = packed_of(GOLDEN.meta)
    energy = spectral_energy(packed.inputs_embeds[packed.vision_mask], packed.vision_grids[0])
    torch.testing.assert_close(energy, before, atol=1e-5, rtol=0)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown mode 'both'; choose one of: clse_attn, clse, attn"):
        CLSE(DropSchedule({1: 0.5}), mode="both")


@pytest.mark.parametrize("grid", [(1, 1, 24), (24, 1, 1), (4, 2, 3)])
def test_grids_without_a_second_dimension_have_finite_scores(grid):
    packed = one_prompt(5, 24, 7)
    packed.vision_grids = ((grid,),)
    kept = prefill(tiny_decoder(), packed, CLSE(DropSchedule({1: 0.5}))).kept
    assert len(kept[0][1][0]) == 12
