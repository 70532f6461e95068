"""The benchmark at tiny sizes: that it compares equal work and counts it right. Nothing here looks at a time."""

import importlib.util
import json
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovlm_v2drop.benchmark import loading
from nanovlm_v2drop.benchmark.contenders import (
    at_same_depths,
    check_logits,
    compare_logits,
    decoding_contenders,
    our_contenders,
    transformers_contender,
)
from nanovlm_v2drop.benchmark.measure import drop_points_run, gemm_products, gemm_run, plain_gemm_run, time_rounds
from nanovlm_v2drop.benchmark.run import budgets_of, build_parser, main, named_peers
from nanovlm_v2drop.benchmark.workload import SHAPES, Workload, make_workloads, prompt_grids
from nanovlm_v2drop.dropping import DROPPERS, PUBLISHED_SCHEDULES, DropSchedule, V2Drop
from nanovlm_v2drop.inference import prefill
from nanovlm_v2drop.loading.zoo import MODELS
from nanovlm_v2drop.models.config import TextConfig
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.linear_int4 import int4_obstacle

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(int4_obstacle(CPU) is not None, reason=f"int4: {int4_obstacle(CPU)}")
QUANTISABLE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 192}
SIZES = {"layers": 6, "text-tokens": 9, "repeats": 2, "decode-steps": 3}
ARGUMENTS = ["--model=tiny", "--dtype=float32", *(f"--{name}={size}" for name, size in SIZES.items())]
PICTURE, BUDGETS = "--vision-tokens=24", "--tokens=16,12"
REFERENCES = ["transformers sdpa", "transformers eager"]
METHODS = ["dense", "v2drop@16", "random@16", "v2drop@12", "random@12"]
VIDEO_MODELS = ["llava-onevision-tiny", "qwen2-vl-tiny"]

# Weights of LLaMA, Qwen2 and Qwen3 as published, less their embedding tables and heads (one where these are tied).
PUBLISHED_WEIGHTS = {
    "llava-1.5-7b": 6_738_415_616 - 2 * 32000 * 4096,
    "llava-1.5-13b": 13_015_864_320 - 2 * 32000 * 5120,
    "llava-v1.6-vicuna-7b": 6_738_415_616 - 2 * 32000 * 4096,
    "llava-v1.6-vicuna-13b": 13_015_864_320 - 2 * 32000 * 5120,
    "llava-v1.6-mistral-7b": 7_241_732_096 - 2 * 32000 * 4096,
    "llava-onevision-qwen2-0.5b-ov": 494_032_768 - 151936 * 896,
    "llava-onevision-qwen2-7b-ov": 7_615_616_512 - 2 * 152064 * 3584,
    "llava-onevision-qwen2-72b-ov": 72_706_203_648 - 2 * 152064 * 8192,
    "llava-video-7b-qwen2": 7_615_616_512 - 2 * 152064 * 3584,
    "llava-video-72b-qwen2": 72_706_203_648 - 2 * 152064 * 8192,
    "qwen2-vl-2b": 1_543_714_304 - 151936 * 1536,
    "qwen2-vl-7b": 7_615_616_512 - 2 * 152064 * 3584,
    "qwen2-vl-72b": 72_706_203_648 - 2 * 152064 * 8192,
    "qwen2.5-vl-3b": 3_085_938_688 - 151936 * 2048,
    "qwen2.5-vl-7b": 7_615_616_512 - 2 * 152064 * 3584,
    "qwen2.5-vl-72b": 72_706_203_648 - 2 * 152064 * 8192,
    "qwen3-vl-2b": 1_720_574_976 - 151936 * 2048,
    "qwen3-vl-4b": 4_022_468_096 - 151936 * 2560,
    "qwen3-vl-8b": 8_190_735_360 - 2 * 151936 * 4096,
    "qwen3-vl-32b": 32_762_123_264 - 2 * 151936 * 5120,
    **dict.fromkeys(("smolvlm-256m", "smolvlm2-256m", "nanovlm-222m", "nanovlm-230m-8k"), 134_515_008 - 49152 * 576),
    **dict.fromkeys(("smolvlm-500m", "smolvlm2-500m", "nanovlm-450m"), 361_821_120 - 49152 * 960),
    **dict.fromkeys(("smolvlm-2.2b", "smolvlm2-2.2b"), 1_711_376_384 - 49152 * 2048),
}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    shape = TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500.0,
    )
    qwen2 = replace(shape, qkv_bias=True, num_hidden_layers=12)
    monkeypatch.setitem(SHAPES, "tiny", shape)
    monkeypatch.setitem(SHAPES, "tiny-of-32-layers", replace(shape, num_hidden_layers=32))
    monkeypatch.setitem(SHAPES, "smolvlm2-tiny", shape)
    monkeypatch.setitem(SHAPES, "llava-onevision-tiny", replace(qwen2, tie_word_embeddings=True))
    monkeypatch.setitem(SHAPES, "qwen2-vl-tiny", replace(qwen2, mrope_section=(1, 1, 2)))


def tiny_workload(*options: str) -> Workload:
    torch.manual_seed(0)
    prompt = [] if any(option.startswith("--frames") for option in options) else [PICTURE]
    return make_workloads(build_parser().parse_args([*ARGUMENTS, *prompt, *options]), keeps_plain=True)[0]


def run(capsys, *options: str, prompt: tuple[str, ...] = (PICTURE, BUDGETS)) -> tuple[dict, str]:
    """The report, and everything on stdout before it."""
    main([*ARGUMENTS, *prompt, *options])
    *lines, last = capsys.readouterr().out.strip().split("\n")
    return json.loads(last), "\n".join(lines)


def test_a_run_ends_with_one_json_object_that_has_every_contender(capsys):
    pytest.importorskip("transformers")
    report, table = run(capsys)
    assert [row["prefill"] for row in report["prefill"]] == [*METHODS, *REFERENCES]
    assert [row["decode"] for row in report["decode"]] == ["dense", "v2drop@16", "v2drop@12", *REFERENCES]
    assert all(len(row["rounds_ms"]) == 2 for row in report["prefill"] + report["decode"])
    assert all(row["speedup"] == 1 for row in (report["prefill"][0], report["decode"][0]))
    assert report["logits_check"]["max_difference"] < 1e-3
    assert report["attention"] == "sdpa"
    assert report["machine"]["torch"] == torch.__version__
    assert "--layers=6" in report["command"]
    assert report["vision_tokens"] == 24
    assert report["notes"] == []  # the whole model ran
    assert "v2drop@16" in table


def test_without_transformers_the_rest_is_measured_all_the_same(capsys):
    report, nothing = run(capsys, "--peers=none", "--json")
    assert [row["prefill"] for row in report["prefill"]] == METHODS
    assert report["logits_check"] is None
    assert nothing == ""


def test_peers_are_named_with_or_without_a_choice():
    assert named_peers("none") == {}
    assert named_peers("transformers:eager,llama.cpp,transformers:sdpa") == {
        "transformers": ["eager", "sdpa"],
        "llama.cpp": ["Q8_0", "Q4_0"],
    }


def test_a_peer_that_is_not_installed_is_left_out_with_a_note(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report, _ = run(capsys, "--peers=transformers,llama.cpp")
    assert [row["prefill"] for row in report["prefill"]] == METHODS
    assert report["notes"][0] == "transformers was left out: it is not installed"
    assert report["notes"][1].startswith("llama.cpp was left out: ")
    assert "memory" not in report


@needs_int4
def test_several_dtypes_run_side_by_side_with_their_own_weights(capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], **QUANTISABLE))
    options = ["--methods=v2drop", "--tokens=16", "--dtype=bfloat16,int8,int4", "--peers=none"]
    report, _ = run(capsys, *options, prompt=(PICTURE,))
    names = ["dense", "v2drop@16", "int8 dense", "int8 v2drop@16", "int4 dense", "int4 v2drop@16"]
    assert [row["prefill"] for row in report["prefill"]] == names
    assert [row["decode"] for row in report["decode"]] == names
    bfloat16, _, int8, _, int4, _ = (row["touched_mb"] for row in report["decode"])
    assert bfloat16 > int8 > int4


@needs_int4
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_one_decoded_token_reads_every_weight_but_the_embeddings(dtype, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], **QUANTISABLE))
    workload = tiny_workload("--dtype", dtype)
    inside = sum(tensor.numel() for name, tensor in workload.plain.items() if tensor.dim() == 2 and "layers" in name)
    head, norms = 192 * 64, 13 * 64 * workload.precision.dtype.itemsize
    channels = sum(len(tensor) for name, tensor in workload.plain.items() if tensor.dim() == 2 and "layers" in name)
    matrices = {
        "float32": 4 * (inside + head),
        "bfloat16": 2 * (inside + head),
        "int8": inside + head + 4 * (channels + 192),
        "int4": inside // 2 + inside // 64 * 4 + head + 4 * 192,  # a scale and a zero in bfloat16 for 64 inputs
    }
    assert workload.decode_weight_bytes == matrices[dtype] + norms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_further_dtypes_have_the_same_weights(dtype):
    arguments = build_parser().parse_args([*ARGUMENTS, PICTURE, f"--dtype=float32,{dtype}"])
    first, second = make_workloads(arguments)
    for name, tensor in first.decoder.state_dict().items():
        own = second.decoder.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(own, tensor.to(own.dtype)), name


def test_loading_is_measured_instead_where_that_is_asked_for(capsys, monkeypatch):
    loaded = {"load_seconds": 1.0, "ready_seconds": 2.0, "cpu_seconds": 3.0, "peak_mb": 4.0}
    monkeypatch.setattr(loading, "measured_apart", lambda *_: loaded)  # test_loading.py runs it
    report, text = run(capsys, "--loading", "--peers=none", "--repeats=1", prompt=())
    assert {row["loading"] for row in report["loads"]} == {"ours"}
    pairs = {(row["stored"], row["dtype"]) for row in report["loads"]}
    assert pairs == {("float16", name) for name in ("float16", "bfloat16", "float32")} | {("bfloat16", "bfloat16")}
    assert "prefill" not in report
    assert "beyond torch" in text


def test_ratios_and_sizes_of_a_row_are_those_of_the_one_accounting_and_of_the_real_cache(capsys):
    report, _ = run(capsys, "--peers=none", "--methods=v2drop,v2drop:cut_cache=True", "--json")
    workload = tiny_workload()
    config = workload.decoder.config
    for row in report["prefill"]:
        schedule = DropSchedule({int(layer): ratio for layer, ratio in row["schedule"].items()})
        flops = schedule.prefill_flops(config, 9, 24)
        assert row["flops_ratio"] == DropSchedule({}).prefill_flops(config, 9, 24) / flops
        assert row["achieved_percent"] == pytest.approx(100 * row["speedup"] / row["flops_ratio"])
        assert row["mean_vision_tokens"] == schedule.mean_tokens(24, 6)
        dropper = V2Drop(schedule, cut_cache="cut_cache" in row["prefill"]) if schedule else None
        cache = prefill(workload.decoder, workload.packed, dropper).cache
        assert row["kv_cache_mb"] * 1e6 == pytest.approx(cache.nbytes)


def test_an_int8_cache_runs_beside_a_float_one_on_the_same_weights_and_its_bytes_are_counted(capsys):
    report, _ = run(capsys, "--peers=none", "--json", "--methods=v2drop", "--kv-cache-dtype=auto,int8")
    names = ["dense", "v2drop@16", "v2drop@12"]
    assert [row["decode"] for row in report["decode"]] == [*names, *(f"float32/int8 {name}" for name in names)]
    sizes = {row["prefill"]: row["kv_cache_mb"] * 1e6 for row in report["prefill"]}
    workload = tiny_workload("--kv-cache-dtype=int8")
    head_dim = workload.decoder.config.head_dim
    for name in names:
        assert sizes[f"float32/int8 {name}"] == pytest.approx(sizes[name] * (head_dim + 2) / (4 * head_dim))
    assert sizes["float32/int8 dense"] == pytest.approx(prefill(workload.decoder, workload.packed).cache.nbytes)
    floats, rounded = make_workloads(build_parser().parse_args([*ARGUMENTS, PICTURE, "--kv-cache-dtype=auto,int8"]))
    assert floats.decoder.layers is rounded.decoder.layers
    assert (floats.decoder.kv_cache_dtype, rounded.decoder.kv_cache_dtype) == ("auto", "int8")


@needs_int4
def test_the_products_of_a_token_are_timed_for_each_dtype_of_the_weights(capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], **QUANTISABLE))
    options = ["--methods=v2drop", "--tokens=16", "--dtype=float32,int8,int4", "--kv-cache-dtype=auto,int8", "--peers=none"]
    report, _ = run(capsys, *options, prompt=(PICTURE,))
    rows = report["decode"]
    assert len({row["products_ms"] for row in rows}) == 3
    for row in rows:
        weights = row["decode"].partition(" ")[0].partition("/")[0]
        assert (row["kernel_speedup"] == 1) == (weights not in ("int8", "int4"))
        assert row["of_kernel_percent"] == pytest.approx(100 * row["speedup"] / row["kernel_speedup"])


def test_gemm_products_are_every_matrix_of_the_decoder_once():
    decoder = tiny_workload().decoder
    products = gemm_products(decoder, range(10, 16))
    matrices = [weight for name, weight in decoder.named_parameters() if weight.dim() == 2 and "embed" not in name]
    assert sorted(id(module.weight) for module, _ in products) == sorted(map(id, matrices))
    assert [rows for _, rows in products] == [rows for rows in range(10, 16) for _ in range(7)] + [1]
    gemm_run(products, torch.empty(0))()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_both_kinds_of_weights_are_equally_many(dtype, monkeypatch):
    workload = tiny_workload("--dtype", dtype)
    plain = plain_gemm_run(workload.plain, workload.packed.inputs_embeds)
    met, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *two, out: met.append((*two[1].t().shape, len(two[0]))) or original(*two, out=out))
    plain()
    ours = gemm_products(workload.decoder, [9 + 24] * 6)
    assert sorted(met) == sorted((module.out_features, module.in_features, rows) for module, rows in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny", *VIDEO_MODELS])
def test_transformers_gives_the_same_logits_from_the_same_tensors(model, dtype):
    pytest.importorskip("transformers")
    workload = tiny_workload("--dtype", dtype, "--model", model)
    reference = transformers_contender(workload, "sdpa")
    with torch.inference_mode():
        before = check_logits(workload, reference)
        workload.decoder.norm.weight.mul_(2)  # seen by both only if nothing was copied
        after = check_logits(workload, reference)
    assert after["largest_logit"] == pytest.approx(2 * before["largest_logit"], rel=1e-2)


def test_qwen2s_biases_are_in_the_comparison():
    pytest.importorskip("transformers")
    workload = tiny_workload("--model", "qwen2-vl-tiny")
    reference = transformers_contender(workload, "sdpa")
    workload.decoder.layers[0].self_attn.v_proj.bias = torch.nn.Parameter(torch.zeros(16))  # ours alone
    with torch.inference_mode(), pytest.raises(RuntimeError, match="the two programs do not compute the same"):
        check_logits(workload, reference)


def test_logits_that_differ_stop_the_run():
    with pytest.raises(RuntimeError, match="the two programs do not compute the same"):
        compare_logits(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.9]))
    with pytest.raises(RuntimeError, match="nan"):
        compare_logits(torch.full((4,), torch.nan), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "methods"), [((), ["v2drop", "random", "fastv"]), (("--model=qwen2-vl-tiny", "--frames=8"), ["dycoke"])]
)
def test_decoding_leaves_the_cache_as_it_was(options, methods):
    workload = tiny_workload(*options)
    for contender in our_contenders(workload, methods, {"40%": 0.4 * workload.sizes[2]}):
        cache = (prefilled := contender.prefill()).cache
        seqlens, positions = list(cache.seqlens), cache.position_ids.clone()
        contender.decoding(prefilled)()
        assert cache.seqlens == seqlens
        assert torch.equal(cache.position_ids, positions)


def test_transformers_decoding_leaves_the_cache_as_it_was():
    pytest.importorskip("transformers")
    contender = transformers_contender(tiny_workload(), "sdpa")
    with torch.inference_mode():
        output = contender.prefill()
        contender.decoding(output)()
    assert output.past_key_values.get_seq_length() == 33


@pytest.mark.parametrize("method", ["v2drop", "fastv", "pdrop", "sparsevlm-plus"])
def test_drop_points_alone_keep_as_many_tokens_as_in_prefill(method):
    workload = tiny_workload()
    schedule = DropSchedule({1: 0.5, 3: 0.3, 4: 0.0})
    states = drop_points_run(workload, DROPPERS[method](schedule))()
    tokens = workload.tokens_per_layer(schedule)
    assert [state.seqlens for state in states] == [(tokens[layer],) for layer in schedule]


def test_every_model_that_is_not_shipped_has_a_shape_with_the_published_number_of_weights():
    assert PUBLISHED_WEIGHTS.keys() == {spec.name for spec in MODELS.values() if spec.repository is not None}
    assert PUBLISHED_WEIGHTS.keys() == {name for name in SHAPES if "tiny" not in name}
    for name, published in PUBLISHED_WEIGHTS.items():
        with torch.device("meta"):
            decoder = Decoder(replace(SHAPES[name], num_hidden_layers=1))
        inside = sum(weight.numel() for weight in decoder.layers.parameters()) * SHAPES[name].num_hidden_layers
        assert inside + decoder.norm.weight.numel() == published, name


def test_shapes_differ_from_llama_where_qwen2_does():
    for name, shape in SHAPES.items():
        is_llama = name.startswith(("llava-1.5", "llava-v1.6"))
        if "tiny" not in name and not name.startswith(("smolvlm", "nanovlm", "llava-v1.6-mistral")):
            theta = 5e6 if name.startswith("qwen3") else 1e6
            assert (shape.rope_theta, shape.rms_norm_eps) == ((1e4, 1e-5) if is_llama else (theta, 1e-6)), name
            assert (shape.mrope_section is not None) == name.startswith(("qwen2-vl", "qwen2.5-vl", "qwen3-vl")), name


def test_tied_embeddings_are_one_tensor():
    decoder = tiny_workload("--model=llava-onevision-tiny").decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("model", "frames", "grids"),
    [
        ("llava-onevision-tiny", 3, ((3, 14, 14), (1, 1, 1))),  # 196 tokens a frame and a newline
        ("smolvlm2-tiny", 3, ((3, 8, 8),)),
        ("qwen2-vl-tiny", 3, ((2, 13, 23),)),  # 299 tokens for two frames; the last of three is taken twice
    ],
)
def test_a_video_has_its_familys_tokens(model, frames, grids):
    packed = tiny_workload(f"--model={model}", f"--frames={frames}").packed
    tokens = sum(map(prod, grids))
    assert packed.vision_grids == (grids,)
    assert packed.vision_counts == (tokens,)
    assert packed.vision_mask.tolist() == [False] * 4 + [True] * tokens + [False] * 5


def test_positions_of_qwen2_vl_are_time_row_and_column():
    packed = tiny_workload("--model=qwen2-vl-tiny", "--frames=4").packed
    at = packed.position_ids.T.tolist()
    assert at[3:6] == [[3, 3, 3], [4, 4, 4], [4, 4, 5]]
    assert at[4 + 598 - 1] == [4 + 1, 4 + 12, 4 + 22]
    assert at[4 + 598 :] == [[27 + step] * 3 for step in range(5)]
    assert tiny_workload("--model=llava-onevision-tiny", "--frames=4").packed.position_ids.dim() == 1


@given(st.integers(1, 3000))
def test_a_picture_is_as_square_as_its_tokens_can_be(tokens):
    arguments = build_parser().parse_args(["--vision-tokens", str(tokens)])
    ((frames, rows, columns),) = prompt_grids(arguments)
    assert (frames, rows * columns) == (1, tokens)
    assert all(tokens % between for between in range(rows + 1, columns))


@pytest.mark.parametrize("model", VIDEO_MODELS)
def test_videos_run_with_every_kind_of_method_and_say_what_a_few_layers_leave(capsys, model):
    options = [f"--model={model}", "--methods=v2drop,dycoke,fastv", "--layers=4", "--peers=none"]
    report, text = run(capsys, *options, prompt=("--frames=8", "--retain=0.4"))
    assert [row["prefill"] for row in report["prefill"]] == ["dense", "v2drop@40%", "dycoke@40%", "fastv@40%"]
    tokens, (_, v2drop, dycoke, _) = report["vision_tokens"], report["prefill"]
    assert v2drop["schedule"].keys() == {"1", "2", "3"}
    assert dycoke["mean_vision_tokens"] == pytest.approx(0.4 * tokens, abs=0.5)
    assert len(report["notes"]) == 3
    asked = V2Drop.schedule_for(0.4 * tokens, tokens, 12).mean_tokens(tokens, 12)
    assert f"mean {asked:.1f} and" in report["notes"][0]
    assert f"in all 12 layers; mean {v2drop['mean_vision_tokens']:.1f} in the 4 that run" in report["notes"][0]
    assert report["notes"][0] in text


def test_the_note_on_positions_stands_where_transformers_ran(capsys):
    pytest.importorskip("transformers")
    options = ["--model=qwen2-vl-tiny", "--layers=12", "--methods=v2drop"]
    report, _ = run(capsys, *options)
    assert [note.partition(" ")[0] for note in report["notes"]] == ["transformers"]
    assert report["logits_check"]["max_difference"] < 1e-3
    assert run(capsys, *options, "--peers=none")[0]["notes"] == []


def test_methods_that_hide_a_part_of_the_cache_decode_for_themselves():
    workload, budgets = tiny_workload("--model=qwen2-vl-tiny", "--frames=8"), {"half": 600.0}
    contenders = our_contenders(workload, ["v2drop", "random", "dycoke"], budgets)
    assert [each.name for each in decoding_contenders(contenders)] == ["dense", "v2drop@half", "dycoke@half"]
    dycoke = contenders[-1]
    other = replace(dycoke, name="other", dropper=DROPPERS["random"](dycoke.schedule))
    assert decoding_contenders([other, dycoke]) == [other, dycoke]


def paper_schedule(budget: float, layers: int, *options: str) -> DropSchedule:
    workload = tiny_workload("--model=tiny-of-32-layers", "--layers", str(layers), *options)
    (_, contender) = our_contenders(workload, ["v2drop"], {"": budget})
    return contender.schedule


def test_budgets_of_the_paper_keep_its_ratios_at_any_depth():
    assert paper_schedule(192, 32, "--vision-tokens=576") == PUBLISHED_SCHEDULES["paper-192"]
    assert paper_schedule(64, 4, "--vision-tokens=576") == DropSchedule({1: 0.05, 2: 0.05, 3: 0.0})
    assert paper_schedule(300, 32, "--vision-tokens=576").mean_tokens(576, 32) == pytest.approx(300, abs=0.5)


def test_the_papers_ratios_are_for_its_576_tokens_alone():
    assert paper_schedule(192, 32, "--vision-tokens=1728").mean_tokens(1728, 32) == pytest.approx(192, abs=0.5)


def test_drop_points_that_meet_in_one_layer_act_at_once():
    schedule = at_same_depths(DropSchedule({3: 0.5, 17: 0.4, 22: 0.0}), 32, 4)
    assert schedule == DropSchedule({1: 0.5, 2: 0.4, 3: 0.0})
    assert at_same_depths(DropSchedule({2: 0.5, 3: 0.4, 22: 0.1}), 32, 3) == DropSchedule({1: 0.2, 2: 0.1})
    assert at_same_depths(DropSchedule({0: 0.5}), 32, 3) == DropSchedule({0: 0.5})


@pytest.mark.parametrize(
    ("options", "vision_tokens", "budgets"),
    [
        ([], 576, {"192": 192, "128": 128, "64": 64}),
        (["--frames=4"], 200, {"25%": 50, "20%": 40, "15%": 30}),
        (["--frames=4", "--tokens=12.5"], 200, {"12.5": 12.5}),
        (["--retain=0.5,0.333"], 1000, {"50%": 500, "33.3%": 333}),
    ],
)
def test_budgets_are_numbers_for_pictures_and_shares_for_videos_unless_given(options, vision_tokens, budgets):
    arguments = build_parser().parse_args(options)
    assert budgets_of(arguments, vision_tokens) == pytest.approx(budgets)


def test_every_round_runs_everything_once_in_rotating_order():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = time_rounds(runs, 3, torch.device("cpu"))
    assert "".join(order) == "cababcbcacab"
    assert [len(seconds[name]) for name in "abc"] == [3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt-5"], "unknown model 'gpt-5'; choose one of: llava-1.5-7b, llava-1.5-13b"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--decode-steps", "-1"], "--decode-steps -1 must be at least 1"),
        (["--tokens", "many"], "--tokens 'many' must be numbers with commas between them"),
        (["--tokens", "1"], "out of reach"),
        (["--tokens", "9", "--retain", "0.5"], "not allowed with argument"),
        (["--vision-tokens", "9", "--frames", "8"], "not allowed with argument"),
        (["--frames", "8"], "no video of tiny is known here; give --vision-tokens instead of --frames 8"),
        (["--frames", "0"], "--frames 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--layers", "7"], "tiny has 6 layers, not 7"),
        (["--attention", "flash-attn"], "cannot run"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--peers", "transformers:fast"], "transformers has no choice 'fast'; choose from sdpa"),
        (["--peers", "vllm"], "unknown peer 'vllm'; choose from transformers, llama.cpp, or none"),
        (["--compile", "--dtype", "bfloat16"], "cannot be compiled"),
        (["--cuda-graph"], "--cuda-graph needs --device cuda"),
    ],
)
def test_options_that_cannot_be_are_explained(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
