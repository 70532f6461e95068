"""The invariants of the prefill loop, each against its slow twin: one masked full forward."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    FAMILIES,
    META,
    NoWaiting,
    changed_prompt,
    masked_forward,
    one_prompt,
    pack_together,
    tiny_decoder,
    tiny_prompts,
)
from tiny_methods import SCHEDULE, every_method, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovlm_v2drop.dropping import DROPPERS, BatchSchedule, DropSchedule
from nanovlm_v2drop.inference import (
    GraphedSteps,
    decode_one_token,
    decode_step,
    decode_steps,
    decode_tokens,
    decode_until,
    decoding,
    prefill,
    prefill_loop,
    share_prefix,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
# Averages are not rows of the prompt, so a masked forward cannot have them. The authors' codes test methods that average.
every_method_that_only_drops = pytest.mark.parametrize("name", [name for name in DROPPERS if not DROPPERS[name].merges])


@every_family
def test_prefill_without_a_dropper_equals_a_plain_full_forward(family):
    decoder, packed = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family)
    torch.testing.assert_close(prefill(decoder, packed).logits[0], masked_forward(decoder, packed)[-1], atol=1e-4, rtol=0)


@every_family
@every_method
@pytest.mark.filterwarnings("ignore:.*dropped nothing")
def test_keeping_everything_is_bit_identical_to_no_dropper(name, family):
    decoder, packed = tiny_decoder(**FAMILIES[family]), pack_together(tiny_prompts(family=family))
    dense = prefill(decoder, packed)
    kept_all = prefill(decoder, packed, make(name, share=1.0))
    assert torch.equal(dense.logits, kept_all.logits)


def answered(decoder, packed, dropper, prefix=None):
    """Everything that a run leaves, with the logits of two decoded tokens."""
    out = prefill(decoder, packed, dropper, max_new_tokens=3, prefix=prefix)
    sizes = [out.cache.nbytes_of(index) for index in range(len(packed.seqlens))]
    steps = [decode_one_token(decoder, torch.full((len(packed.seqlens),), token), out.cache) for token in (3, 4)]
    return [out.logits, *steps], out.kept, sizes


@every_family
@pytest.mark.filterwarnings("ignore:.*dropped nothing")
def test_runs_that_share_the_layers_before_their_drop_points_are_bit_identical_to_runs_of_their_own(family):
    decoder, packed = tiny_decoder(**FAMILIES[family]), pack_together(tiny_prompts(family=family))
    late = [DROPPERS[name](DropSchedule({3: 0.4})) for name in DROPPERS if DROPPERS[name].latest_layer != 0]
    droppers = [None, *map(make, DROPPERS), *late, make("random", seed=1), make("v2drop", share=1.0), None]
    prefix = share_prefix(decoder, packed, droppers, max_new_tokens=3)
    assert len(prefix.states) >= 3
    for dropper in droppers:
        own, shared = answered(decoder, packed, dropper), answered(decoder, packed, dropper, prefix)
        assert all(map(torch.equal, own[0], shared[0]))
        assert own[2] == shared[2]
        for (layer, kept), (shared_layer, shared_kept) in zip(own[1], shared[1], strict=True):
            assert layer == shared_layer
            assert all(map(torch.equal, kept, shared_kept))


@every_method
def test_a_prefix_that_was_made_for_other_droppers_changes_nothing(name):
    decoder, packed = tiny_decoder(), pack_together(tiny_prompts())
    for droppers in ([make("v2drop")], [make("pdrop")], [None], []):
        prefix = share_prefix(decoder, packed, droppers, max_new_tokens=3)
        assert all(map(torch.equal, answered(decoder, packed, make(name))[0], answered(decoder, packed, make(name), prefix)[0]))


def test_a_method_that_changes_rows_before_layer_0_shares_no_layer():
    class Halved(DROPPERS["v2drop"]):
        def begin(self, state):
            return replace(state, hidden_states=state.hidden_states / 2)

    decoder, packed, dropper = tiny_decoder(), one_prompt(5, 24, 7), Halved(SCHEDULE)
    prefix = share_prefix(decoder, packed, [dropper], max_new_tokens=3)
    own = answered(decoder, packed, dropper)
    assert all(map(torch.equal, own[0], answered(decoder, packed, dropper, prefix)[0]))
    assert not torch.equal(own[0][0], answered(decoder, packed, make("v2drop"), prefix)[0][0])


def test_shared_layers_run_once(monkeypatch):
    decoder, packed, ran = tiny_decoder(), one_prompt(5, 24, 7), []
    droppers = [None, make("v2drop"), make("random"), make("random", seed=1)]
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    prefix = share_prefix(decoder, packed, droppers)
    for dropper in droppers:
        prefill(decoder, packed, dropper, prefix=prefix)
    first = next(iter(SCHEDULE))
    assert [ran.count(number) for number in range(len(decoder.layers))] == [
        1 if number < first else len(droppers) for number in range(len(decoder.layers))
    ]


@every_family
@every_method_that_only_drops
def test_dropping_equals_masking_the_same_keys_from_that_layer_on(name, family):
    decoder, packed, dropper = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family), make(name)
    out = prefill(decoder, packed, dropper)
    wanted = masked_forward(decoder, packed, out.kept, renumbers=dropper.renumbers)[-1]
    assert [len(kept[0]) for _, kept in out.kept] == [12, 3, 1][: len(dropper.schedule)]
    torch.testing.assert_close(out.logits[0], wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(out.logits, prefill(decoder, packed).logits, atol=1e-2)


@every_family
@every_method_that_only_drops
def test_cached_decode_after_dropping_equals_one_masked_full_forward(name, family):
    decoder, packed, dropper = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family), make(name)
    out = prefill(decoder, packed, dropper, max_new_tokens=3)
    out.cache.pruning = None
    tokens = [7, 11, 42, 0, 5]  # more than the cache has room for, so it must grow
    logits = [decode_one_token(decoder, torch.tensor([token]), out.cache)[0] for token in tokens]
    wanted = masked_forward(decoder, packed, out.kept, tokens, dropper.renumbers)[-len(tokens) :]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=0)


@every_family
@every_method
def test_a_packed_batch_equals_its_samples_one_by_one(name, family):
    decoder, parts = tiny_decoder(**FAMILIES[family]), tiny_prompts(family=family)
    together = prefill(decoder, pack_together(parts), make(name), max_new_tokens=1)
    steps = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9])]
    batched = [together.logits, *(decode_one_token(decoder, tokens, together.cache) for tokens in steps)]
    for index, part in enumerate(parts):
        alone = prefill(decoder, part, make(name) if any(part.vision_counts) else None, max_new_tokens=1)
        logits = [alone.logits, *(decode_one_token(decoder, t[index : index + 1], alone.cache) for t in steps)]
        torch.testing.assert_close(torch.stack(logits)[:, 0], torch.stack(batched)[:, index], atol=1e-4, rtol=0)
        for (_, sequences), (_, (kept,)) in zip(together.kept, alone.kept, strict=False):
            assert sequences[index].tolist() == kept.tolist()
    left = (12, 6) if DROPPERS[name].latest_layer == 0 else (1, 1)
    assert together.cache.seqlens[-1] == (12 + left[0] + 2, 7 + left[1] + 2, 15 + 2)


@every_family
@every_method
def test_an_attention_matrix_written_out_gives_the_same_answers(name, family):
    decoder, packed = tiny_decoder(**FAMILIES[family]), pack_together(tiny_prompts(family=family))
    fast = prefill(decoder, packed, make(name))
    decoder.attention = "eager"
    written_out = prefill(decoder, packed, make(name))
    torch.testing.assert_close(written_out.logits, fast.logits, atol=1e-4, rtol=0)
    for (_, kept), (_, wanted) in zip(written_out.kept, fast.kept, strict=True):
        assert [rows.tolist() for rows in kept] == [rows.tolist() for rows in wanted]


@every_family
@every_method_that_only_drops
def test_with_the_cut_decoded_tokens_see_in_every_layer_what_is_left_at_the_end(name, family):
    decoder, packed = tiny_decoder(**FAMILIES[family]), one_prompt(5, 24, 7, family=family)
    whole, dropper = prefill(decoder, packed, make(name)), make(name, cut_cache=True)
    out = prefill(decoder, packed, dropper, max_new_tokens=3)
    assert torch.equal(out.logits, whole.logits)
    assert out.cache.seqlens == [whole.cache.seqlens[-1]] * 6
    assert out.cache.nbytes <= whole.cache.nbytes
    assert torch.equal(out.cache.position_ids, whole.cache.position_ids)
    out.cache.pruning = None
    tokens = [7, 11, 42, 0, 5]
    logits = [decode_one_token(decoder, torch.tensor([token]), out.cache)[0] for token in tokens]
    wanted = masked_forward(decoder, packed, out.kept, tokens, dropper.renumbers, cut=True)[-len(tokens) :]
    torch.testing.assert_close(torch.stack(logits), wanted, atol=1e-4, rtol=0)


def test_the_cut_treats_every_sequence_of_a_batch_by_itself_and_never_waits_for_the_device(monkeypatch):
    decoder, parts, tokens = tiny_decoder(), tiny_prompts(), torch.tensor([3, 1, 4])
    together = prefill(decoder, pack_together(parts), make("v2drop", cut_cache=True))
    logits = decode_one_token(decoder, tokens, together.cache)
    for index, part in enumerate(parts):
        alone = prefill(decoder, part, make("v2drop", cut_cache=True) if any(part.vision_counts) else None)
        own = decode_one_token(decoder, tokens[index, None], alone.cache)[0]
        torch.testing.assert_close(own, logits[index], atol=1e-4, rtol=0)
    monkeypatch.setattr(prefill_loop, "resolve_backend", lambda *_: "varlen")
    decoder, packed = decoder.to(META, torch.bfloat16), on_meta(pack_together(parts))
    with NoWaiting():
        prefill(decoder, packed, make("v2drop", cut_cache=True))


@pytest.mark.parametrize("name", [name for name in DROPPERS if DROPPERS[name].merges and DROPPERS[name].latest_layer != 0])
def test_a_method_that_averages_inside_the_decoder_has_nothing_to_cut_to(name):
    with pytest.raises(ValueError, match=f"{name} averages tokens, which earlier caches do not hold: use it without cut_cache"):
        make(name, cut_cache=True)


def test_a_layer_shows_its_module_outputs_to_a_dropper_that_asks():
    decoder, packed, seen = tiny_decoder(), one_prompt(5, 24, 7), {}

    class Curious(DROPPERS["v2drop"]):
        layers_observed = frozenset({0, 2})

        def observe(self, state, outputs):
            seen[state.layer_idx] = (state.hidden_states, outputs)

    with_eyes = prefill(decoder, packed, Curious(SCHEDULE))
    assert torch.equal(with_eyes.logits, prefill(decoder, packed, make("v2drop")).logits)
    assert sorted(seen) == [0, 2]
    for layer_idx, (hidden, outputs) in seen.items():
        layer = decoder.layers[layer_idx]
        assert torch.equal(outputs.attention_input, layer.input_layernorm(hidden))
        middle = hidden + outputs.attention_output
        assert torch.equal(outputs.mlp_input, layer.post_attention_layernorm(middle))
        torch.testing.assert_close(outputs.mlp_output, layer.mlp(outputs.mlp_input))
    # The input of layer 1 is what layer 0 made of its own input.
    rows = with_eyes.kept[0][1][0]
    hidden, outputs = seen[0]
    assert len(rows) == 12
    assert outputs.mlp_output.shape == hidden.shape


def test_equally_long_prompts_take_the_batched_path_and_agree_with_it():
    decoder = tiny_decoder()
    parts = tiny_prompts([(5, 24, 7), (2, 24, 10)])
    together = prefill(decoder, pack_together(parts))
    alone = torch.cat([prefill(decoder, part).logits for part in parts])
    torch.testing.assert_close(together.logits, alone, atol=1e-4, rtol=0)


def test_the_cache_of_a_late_layer_takes_less_memory():
    out = prefill(tiny_decoder(), one_prompt(5, 24, 7), DROPPERS["v2drop"](SCHEDULE), max_new_tokens=4)
    slots = [keys.shape[1] for keys in out.cache.keys]
    assert slots == [40, 28, 28, 19, 17, 17]


def test_decode_positions_go_on_from_the_undropped_prompt():
    out = prefill(tiny_decoder(), one_prompt(5, 24, 7), DROPPERS["v2drop"](SCHEDULE))
    assert out.cache.position_ids.tolist() == [[36]] * 6


def test_greedy_decoding_takes_the_largest_logit_of_each_step():
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    tokens = decode_until(decode_tokens(decoder, prefill(decoder, packed)), (), 4)[0]
    logits = masked_forward(decoder, packed, more_tokens=tokens)[-5:-1]
    assert tokens == logits.argmax(-1).tolist()


def test_packed_inputs_that_disagree_in_length_are_refused():
    packed = one_prompt(5, 24, 7)
    with pytest.raises(ValueError, match="packed inputs disagree on the number of tokens"):
        type(packed)(packed.inputs_embeds, packed.position_ids, packed.vision_mask, [30])


def on_meta(packed):
    """The prompt in bfloat16 on a device that has no values."""

    def moved(tensor):
        return tensor.to(META, torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)

    return changed_prompt(packed, moved)


@every_family
@every_method
def test_prefill_and_decode_never_wait_for_the_device(name, family, monkeypatch):
    for module in (prefill_loop, decoding):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: "varlen")
    decoder = tiny_decoder(**FAMILIES[family]).to(META, torch.bfloat16)
    packed, token_ids = on_meta(pack_together(tiny_prompts(family=family))), torch.zeros(3, dtype=torch.long, device=META)
    with NoWaiting():
        out = prefill(decoder, packed, make(name), max_new_tokens=1)
        steps = 0 if out.cache.pruning else 3  # the cache grows
        logits = [decode_one_token(decoder, token_ids, out.cache) for _ in range(steps)]
    assert {(each.device, each.dtype, each.shape) for each in [out.logits, *logits]} == {(META, torch.bfloat16, (3, 61))}


@pytest.mark.parametrize(
    ("score", "error"),
    [
        (lambda values: values / float(values.max()), "cannot be called on meta tensors"),
        (lambda values: values[values > 0].mean().expand_as(values), "nonzero"),
        (lambda values: values * torch.tensor([2.0] * len(values), device=values.device), "takes values from the host"),
        (lambda values: values[torch.arange(len(values))], "takes values from the host"),
        (lambda values: values + torch.rand(len(values)).to(values.device), "takes values from the host"),
    ],
)
def test_waiting_for_the_device_would_be_noticed(score, error):
    class Curious(DROPPERS["v2drop"]):
        def score(self, state):
            return score(super().score(state))

    decoder, packed = tiny_decoder().to(META, torch.bfloat16), on_meta(one_prompt(5, 24, 7))
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError), match=error):
        prefill(decoder, packed, Curious(SCHEDULE))


def test_what_a_device_tells_of_a_wrong_method_names_it_and_the_way_out(monkeypatch):
    class Mine(DROPPERS["v2drop"]):
        name = "mine"

    told = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: told.append(message))
    prefill(tiny_decoder().to(META, torch.bfloat16), on_meta(one_prompt(5, 24, 7)), Mine(DropSchedule({2: 0.5})))
    way_out = "run it again with --device cpu, which stops at the line of the error"
    place = "at the drop point of layer 2"
    assert told == [
        f"mine scored a vision token NaN: it divides by zero, or activations overflow; try --dtype float32, "
        f"and if it stays, {way_out}",
        f"mine loses, moves or changes text rows: text must stay, {place}; {way_out}",
        f"mine keeps other rows than the 12 vision tokens that it should, {place}; {way_out}",
        f"mine keeps a vision row twice, or moves rows: they stay in reading order unless merges = True, {place}; {way_out}",
    ]


@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
def test_a_step_that_knows_lengths_on_the_device_alone_gives_the_same_logits(backend, monkeypatch):
    for module in (prefill_loop, decoding):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: backend)
    decoder, packed = tiny_decoder(), pack_together(tiny_prompts())
    known, unknown = (prefill(decoder, packed, make("v2drop"), max_new_tokens=4) for _ in range(2))
    with torch.no_grad():
        for tokens in (torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9])):
            wanted = decode_one_token(decoder, tokens, known.cache)
            logits = decode_step(decoder, tokens, unknown.cache, unknown.cache.visible_on_device)
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    assert torch.equal(unknown.cache.slots, torch.tensor(known.cache.seqlens))
    assert torch.equal(unknown.cache.position_ids, known.cache.position_ids)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_a_step_that_a_cuda_graph_records_never_waits_for_the_device(backend, monkeypatch):
    for module in (prefill_loop, decoding):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: backend)
    decoder, packed = tiny_decoder().to(META, torch.bfloat16), on_meta(pack_together(tiny_prompts()))
    with NoWaiting(), torch.no_grad():
        cache = prefill(decoder, packed, make("v2drop"), max_new_tokens=4).cache
        logits = decode_step(decoder, torch.zeros(3, dtype=torch.long, device=META), cache, cache.visible_on_device)
    assert logits.is_meta


@pytest.mark.parametrize("heads_first", [True, False])
def test_how_a_cache_lies_in_memory_does_not_change_what_is_decoded(heads_first, monkeypatch):
    decoder, packed, tokens = tiny_decoder(), pack_together(tiny_prompts()), torch.tensor([3, 1, 4])
    wanted = [decode_one_token(decoder, tokens, out.cache) for out in [prefill(decoder, packed)] for _ in range(3)]
    monkeypatch.setattr(prefill_loop, "reads_heads_first", lambda backend: heads_first)
    cache = prefill(decoder, packed, max_new_tokens=1).cache  # it grows twice
    for logits in wanted:
        torch.testing.assert_close(decode_one_token(decoder, tokens, cache), logits, atol=1e-5, rtol=0)
    assert all(keys.transpose(1, 2).is_contiguous() == heads_first for keys in cache.keys)


def test_tokens_that_are_cropped_from_a_cache_were_never_there():
    decoder, packed = tiny_decoder(), pack_together(tiny_prompts())
    cache = prefill(decoder, packed, make("v2drop")).cache
    wanted = decode_one_token(decoder, torch.tensor([3, 1, 4]), cache)
    decode_one_token(decoder, torch.tensor([8, 8, 8]), cache)
    cache.crop(2)
    assert torch.equal(decode_one_token(decoder, torch.tensor([3, 1, 4]), cache), wanted)


@every_method
def test_prompts_of_one_batch_may_have_budgets_of_their_own(name):
    decoder, parts = tiny_decoder(), tiny_prompts()
    layers = [0] if DROPPERS[name].latest_layer == 0 else [1, 3]
    schedules = [DropSchedule({layers[0]: 0.5}), DropSchedule(dict.fromkeys(layers, 0.8)), DropSchedule({})]
    together = prefill(decoder, pack_together(parts), DROPPERS[name](BatchSchedule(schedules)))
    for index, (part, schedule) in enumerate(zip(parts, schedules, strict=True)):
        alone = prefill(decoder, part, DROPPERS[name](schedule) if schedule else None)
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-4, rtol=0)
        assert [lengths[index] for lengths in together.cache.seqlens] == [lengths[0] for lengths in alone.cache.seqlens]


def test_a_batch_with_another_number_of_prompts_than_schedules_is_refused():
    with pytest.raises(ValueError, match="2 schedules for a batch of 3 prompts"):
        prefill(tiny_decoder(), pack_together(tiny_prompts()), DROPPERS["v2drop"](BatchSchedule([SCHEDULE] * 2)))


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on a CPU: each replay calls the recorded operators again, with the same tensors.

    No Python runs again, so whatever was a host value while recording has stayed what it was. Unlike a CUDA graph it runs what
    it records.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
def test_recorded_steps_decode_what_single_launches_decode(backend, monkeypatch):
    for module in (prefill_loop, decoding):
        monkeypatch.setattr(module, "resolve_backend", lambda *_: backend)
    decoder, packed = tiny_decoder(), pack_together(tiny_prompts())
    single, recorded = (prefill(decoder, packed, make("v2drop"), max_new_tokens=2) for _ in range(2))

    @contextmanager
    def recording(graph):
        with graph:
            yield
        recorded.cache.advance_on_device(-1)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": RecordedGraph, "graph": recording, "stream": nullcontext}
    for name, fake in {**fakes, "Stream": lambda: stream, "current_stream": lambda: stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    step = GraphedSteps(decoder, recorded.cache)
    for number in range(5):  # the cache grows twice
        tokens = torch.tensor([3, 1, 4]) + number
        torch.testing.assert_close(step(tokens), decode_one_token(decoder, tokens, single.cache), atol=1e-4, rtol=0)
    assert recorded.cache.seqlens == single.cache.seqlens
    assert torch.equal(recorded.cache.slots, torch.tensor(single.cache.seqlens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_decodes_what_single_launches_decode():
    decoder, packed = tiny_decoder().cuda(), pack_together(tiny_prompts())
    packed = changed_prompt(packed, torch.Tensor.cuda)
    single, graphed = (prefill(decoder, packed, make("v2drop"), max_new_tokens=2) for _ in range(2))
    step = GraphedSteps(decoder, graphed.cache)
    for number in range(5):  # the cache grows twice
        tokens = torch.tensor([3, 1, 4], device="cuda") + number
        torch.testing.assert_close(step(tokens), decode_one_token(decoder, tokens, single.cache), atol=1e-4, rtol=0)
    assert graphed.cache.seqlens == single.cache.seqlens


def test_a_method_that_chooses_slots_for_each_token_is_not_put_into_a_cuda_graph():
    decoder = tiny_decoder()
    out = prefill(decoder, one_prompt(5, 24, 7), make("dycoke"))
    decoder.cuda_graph = True
    assert not isinstance(decode_steps(decoder, out.cache), GraphedSteps)
    with pytest.raises(ValueError, match="without a CUDA graph"):
        GraphedSteps(decoder, out.cache)
