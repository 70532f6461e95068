"""The benchmark at tiny sizes: that it compares equal work and counts it right. Nothing here looks at a time."""

import json

import pytest
import torch

from nanovlm_v2drop import benchmark
from nanovlm_v2drop.config import TextConfig
from nanovlm_v2drop.dropping import DROPPERS, PUBLISHED_SCHEDULES, DropSchedule, V2Drop
from nanovlm_v2drop.inference import prefill

SIZES = {"layers": 6, "text-tokens": 9, "vision-tokens": 24, "repeats": 2, "decode-steps": 3}
ARGUMENTS = ["--model=tiny", "--tokens=192,12", "--dtype=float32", *(f"--{name}={size}" for name, size in SIZES.items())]
METHODS = ["dense", "v2drop@192", "random@192", "v2drop@12", "random@12"]


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0
    )
    monkeypatch.setitem(benchmark.TEXT_SHAPES, "tiny", shape)


def tiny_workload(*options: str) -> benchmark.Workload:
    torch.manual_seed(0)
    return benchmark.make_workload(benchmark.build_parser().parse_args([*ARGUMENTS, *options]))


def run(capsys, *options: str) -> tuple[dict, str]:
    """The report, and everything on stdout before it."""
    benchmark.main([*ARGUMENTS, *options])
    *lines, last = capsys.readouterr().out.strip().split("\n")
    return json.loads(last), "\n".join(lines)


def test_a_run_ends_with_one_json_object_that_has_every_contender(capsys):
    pytest.importorskip("transformers")
    report, table = run(capsys)
    assert [row["prefill"] for row in report["prefill"]] == [*METHODS, "transformers"]
    assert [row["decode"] for row in report["decode"]] == ["dense", "v2drop@192", "v2drop@12", "transformers"]
    assert all(len(row["rounds_ms"]) == 2 for row in report["prefill"] + report["decode"])
    assert all(row["speedup"] == 1 for row in (report["prefill"][0], report["decode"][0]))
    assert report["logits_check"]["max_difference"] < 1e-3
    assert report["attention"] == "sdpa"
    assert report["machine"]["torch"] == torch.__version__
    assert "--layers=6" in report["command"]
    assert "v2drop@192" in table


def test_without_transformers_the_rest_is_measured_all_the_same(capsys):
    report, nothing = run(capsys, "--no-transformers", "--json")
    assert [row["prefill"] for row in report["prefill"]] == METHODS
    assert report["logits_check"] is None
    assert nothing == ""


def test_ratios_and_sizes_of_a_row_are_those_of_the_one_accounting_and_of_the_real_cache(capsys):
    report, _ = run(capsys, "--no-transformers", "--json")
    workload = tiny_workload()
    config = workload.decoder.config
    for row in report["prefill"]:
        schedule = DropSchedule({int(layer): ratio for layer, ratio in row["schedule"].items()})
        flops = schedule.prefill_flops(config, 9, 24)
        assert row["flops_ratio"] == DropSchedule({}).prefill_flops(config, 9, 24) / flops
        assert row["achieved_percent"] == pytest.approx(100 * row["speedup"] / row["flops_ratio"])
        assert row["mean_vision_tokens"] == schedule.mean_tokens(24, 6)
        cache = prefill(workload.decoder, workload.packed, V2Drop(schedule) if schedule else None).cache
        assert row["kv_cache_mb"] * 1e6 == pytest.approx(cache.nbytes)


def test_gemm_products_are_every_matrix_of_the_decoder_once():
    decoder = tiny_workload().decoder
    products = benchmark.gemm_products(decoder, range(10, 16))
    matrices = [weight for name, weight in decoder.named_parameters() if weight.dim() == 2 and "embed" not in name]
    assert sorted(id(weight) for weight, _ in products) == sorted(map(id, matrices))
    assert [rows for _, rows in products] == [rows for rows in range(10, 16) for _ in range(7)] + [1]
    benchmark.gemm_run(products)()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_the_same_logits_from_the_same_tensors(dtype):
    pytest.importorskip("transformers")
    workload = tiny_workload("--dtype", dtype)
    (dense,), reference = benchmark.our_contenders(workload, ["v2drop"], []), benchmark.transformers_contender(workload)
    with torch.inference_mode():
        before = benchmark.compare_logits(dense.prefill().logits[0], reference.prefill().logits[0])
        workload.decoder.norm.weight.mul_(2)  # seen by both only if nothing was copied
        after = benchmark.compare_logits(dense.prefill().logits[0], reference.prefill().logits[0])
    assert after["largest_logit"] == pytest.approx(2 * before["largest_logit"], rel=1e-2)


def test_logits_that_differ_stop_the_run():
    with pytest.raises(RuntimeError, match="unequal work"):
        benchmark.compare_logits(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.9]))
    with pytest.raises(RuntimeError, match="nan"):
        benchmark.compare_logits(torch.full((4,), torch.nan), torch.ones(4))


def test_decoding_leaves_the_cache_as_it_was():
    workload = tiny_workload()
    contenders = benchmark.our_contenders(workload, ["v2drop", "random", "fastv"], [12])
    for contender in contenders:
        cache = (prefilled := contender.prefill()).cache
        seqlens, positions = list(cache.seqlens), cache.position_ids.clone()
        contender.decode(prefilled)
        assert cache.seqlens == seqlens
        assert torch.equal(cache.position_ids, positions)


def test_transformers_decoding_leaves_the_cache_as_it_was():
    pytest.importorskip("transformers")
    contender = benchmark.transformers_contender(tiny_workload())
    with torch.inference_mode():
        output = contender.prefill()
        contender.decode(output)
    assert output.past_key_values.get_seq_length() == 33


@pytest.mark.parametrize("method", ["v2drop", "fastv", "pdrop", "sparsevlm-plus"])
def test_drop_points_alone_keep_as_many_tokens_as_in_prefill(method):
    workload = tiny_workload()
    schedule = DropSchedule({1: 0.5, 3: 0.3, 4: 0.0})
    states = benchmark.drop_points_run(workload, DROPPERS[method](schedule))()
    tokens = workload.tokens_per_layer(schedule)
    assert [state.seqlens for state in states] == [(tokens[layer],) for layer in schedule]


def test_budgets_of_the_paper_keep_its_ratios_at_any_depth():
    assert benchmark.mapped_schedule(192, 576, 32) == PUBLISHED_SCHEDULES["paper-192"]
    assert benchmark.mapped_schedule(64, 576, 4) == DropSchedule({1: 0.05, 2: 0.05, 3: 0.0})
    assert benchmark.mapped_schedule(300, 576, 32).mean_tokens(576, 32) == pytest.approx(300, abs=0.5)


def test_every_round_runs_everything_once_in_rotating_order():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmark.time_rounds(runs, 3, torch.device("cpu"))
    assert "".join(order) == "cababcbcacab"
    assert [len(seconds[name]) for name in "abc"] == [3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt-5"], "unknown model 'gpt-5'; choose one of: llava-1.5-7b, llava-1.5-13b"),
        (["--repeats", "0"], "must be at least 1"),
        (["--tokens", "many"], "many"),
        (["--tokens", "1"], "out of reach"),
        (["--attention", "flash-attn"], "cannot run"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_options_that_cannot_be_are_explained(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*ARGUMENTS, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
