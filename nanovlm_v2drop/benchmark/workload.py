"""The decoders and prompts that are timed: random weights at the official layer shapes, one prompt with pictures or video."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isqrt, prod

import torch
from torch import Tensor, nn

from ..dropping import DropSchedule
from ..loading.device import as_device
from ..loading.precision import Precision, named_precision, pack
from ..models.attention import resolve_backend
from ..models.config import LengthScaling, TextConfig
from ..models.decoder import Decoder
from ..models.kv_cache import check_kv_cache_dtype
from ..models.kv_cache_int8 import SCALE_BYTES
from ..models.linear import PrepackedLinear, QuantisedLinear
from ..models.vision_qwen2 import multimodal_positions
from ..models.vlm import PackedInputs

Linear = nn.Linear | PrepackedLinear | QuantisedLinear
Grids = tuple[tuple[int, int, int], ...]  # frames, rows and columns of vision tokens

VICUNA_7B = TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
VICUNA_13B = replace(
    VICUNA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)
MISTRAL_7B = TextConfig(
    vocab_size=32064,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
)
QWEN2 = partial(TextConfig, vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6, qkv_bias=True)
QWEN2_7B = partial(
    QWEN2,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
QWEN2_72B = partial(
    QWEN2,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
MROPE_SECTION = (16, 24, 24)
SMOLLM2 = partial(TextConfig, vocab_size=49280, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5)
SMOLLM2_135M = SMOLLM2(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
)
SMOLLM2_360M = SMOLLM2(
    hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5
)
SMOLLM2_1_7B = SMOLLM2(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    max_position_embeddings=16384,
    rope_theta=273768.0,
)
QWEN3_VL = partial(
    TextConfig,
    vocab_size=151936,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=262144,
    rope_theta=5e6,
    qk_norm=True,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
)
NANOVLM = partial(replace, vocab_size=49218, tie_word_embeddings=True, rotary_scaling=LengthScaling(beyond=8192))
# Sources: config.json of HuggingFaceTB/SmolVLM*, lusxvr/nanoVLM-*, llava-hf/llava-1.5-*-hf, llava-hf/llava-v1.6-vicuna-*-hf,
# Qwen/Qwen2*-VL-*-Instruct, Qwen/Qwen3-VL-*-Instruct and lmms-lab/llava-onevision-qwen2-*-ov. The conversions by llava-hf have
# the same decoders with a padded vocabulary.
SHAPES = {
    "llava-1.5-7b": VICUNA_7B,
    "llava-1.5-13b": VICUNA_13B,
    "llava-v1.6-vicuna-7b": VICUNA_7B,
    "llava-v1.6-vicuna-13b": VICUNA_13B,
    "llava-v1.6-mistral-7b": MISTRAL_7B,
    "llava-onevision-qwen2-0.5b-ov": QWEN2(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llava-onevision-qwen2-7b-ov": QWEN2_7B(),
    "llava-onevision-qwen2-72b-ov": QWEN2_72B(),
    "llava-video-7b-qwen2": QWEN2_7B(),
    "llava-video-72b-qwen2": QWEN2_72B(),
    "qwen2-vl-2b": QWEN2(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        mrope_section=MROPE_SECTION,
    ),
    "qwen2-vl-7b": QWEN2_7B(mrope_section=MROPE_SECTION),
    "qwen2-vl-72b": QWEN2_72B(mrope_section=MROPE_SECTION),
    "qwen2.5-vl-3b": QWEN2(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=128000,
        tie_word_embeddings=True,
        mrope_section=MROPE_SECTION,
    ),
    "qwen2.5-vl-7b": QWEN2_7B(max_position_embeddings=128000, mrope_section=MROPE_SECTION),
    "qwen2.5-vl-72b": QWEN2_72B(max_position_embeddings=128000, mrope_section=MROPE_SECTION),
    "qwen3-vl-2b": QWEN3_VL(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-vl-4b": QWEN3_VL(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        tie_word_embeddings=True,
    ),
    "qwen3-vl-8b": QWEN3_VL(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36),
    "qwen3-vl-32b": QWEN3_VL(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
    ),
    "smolvlm-256m": SMOLLM2_135M,
    "smolvlm-500m": SMOLLM2_360M,
    "smolvlm-2.2b": SMOLLM2_1_7B,
    "smolvlm2-256m": SMOLLM2_135M,
    "smolvlm2-500m": SMOLLM2_360M,
    "smolvlm2-2.2b": SMOLLM2_1_7B,
    "nanovlm-222m": NANOVLM(SMOLLM2_135M, vocab_size=49152),
    "nanovlm-230m-8k": NANOVLM(SMOLLM2_135M),
    "nanovlm-450m": NANOVLM(SMOLLM2_360M),
}
# Vision tokens of a video, by the beginning of the model's name. LLaVA-OneVision: pooled frames and one newline token.
# LLaVA-Video: averaged frames with a newline token after every row. Qwen-VL: merged patches of pairs of frames of 360 x 640.
# SmolVLM2: one tile a frame.
VIDEO_GRIDS: dict[str, Callable[[int], Grids]] = {
    "llava-onevision": lambda frames: ((frames, 14, 14), (1, 1, 1)),
    "llava-video": lambda frames: ((frames, 13, 14),),
    "qwen2-vl": lambda frames: ((ceil(frames / 2), 13, 23),),
    "qwen2.5-vl": lambda frames: ((ceil(frames / 2), 13, 23),),
    "smolvlm2-2.2b": lambda frames: ((frames, 9, 9),),
    "smolvlm2": lambda frames: ((frames, 8, 8),),
}


@dataclass(frozen=True)
class Workload:
    """One prompt through one decoder, followed by `decode_steps` tokens. The whole model has `model_layers` layers.

    `plain` holds the decoder's tensors by name, in plain order, for transformers. It is None if transformers does not run.
    `prefix` tells several dtypes apart; it is empty for the first.
    """

    decoder: Decoder
    packed: PackedInputs
    decode_steps: int
    model_layers: int
    precision: Precision
    plain: Mapping[str, Tensor] | None = None
    prefix: str = ""

    @property
    def device(self) -> torch.device:
        return self.packed.inputs_embeds.device

    @property
    def sizes(self) -> tuple[TextConfig, int, int]:
        """Config, number of text tokens and number of vision tokens: what DropSchedule computes costs from."""
        vision_tokens = sum(self.packed.vision_counts)
        return self.decoder.config, sum(self.packed.seqlens) - vision_tokens, vision_tokens

    @property
    def frames(self) -> int:
        return max(frames for grids in self.packed.vision_grids for frames, _, _ in grids)

    @property
    def decode_weight_bytes(self) -> int:
        """Bytes of weights that one decoded token reads: everything except the embedding table, of which it reads one row."""
        modules = [module for part in (self.decoder.layers, self.decoder.lm_head) for module in part.modules()]
        matrices = sum(matrix_bytes(module) for module in modules if isinstance(module, Linear))
        vectors = [*self.decoder.layers.parameters(), *self.decoder.norm.parameters()]
        return matrices + sum(vector.nbytes for vector in vectors if vector.dim() == 1)

    def tokens_per_layer(self, schedule: DropSchedule) -> list[int]:
        config, text_tokens, vision_tokens = self.sizes
        counts = schedule.vision_tokens_per_layer(vision_tokens, config.num_hidden_layers)
        return [text_tokens + count for count in counts]

    def cache_bytes(self, schedule: DropSchedule, cut_cache: bool = False, decoded: int = 0) -> int:
        config, text_tokens, vision_tokens = self.sizes
        values = schedule.kv_cache_bytes(config, text_tokens + decoded, vision_tokens, 1, cut_cache=cut_cache)
        if self.decoder.kv_cache_dtype == "int8":
            return values // config.head_dim * (config.head_dim + SCALE_BYTES)
        return values * self.packed.inputs_embeds.element_size()


def matrix_bytes(module: Linear) -> int:
    """The bytes that a product with one row reads of the weight of a linear layer."""
    if isinstance(module, QuantisedLinear):
        return module.read_bytes
    width = torch.bfloat16.itemsize if isinstance(module, PrepackedLinear) else module.weight.element_size()
    return module.in_features * module.out_features * width


def make_workloads(args: argparse.Namespace, keeps_plain: bool = False) -> list[Workload]:
    """The prompt that the options ask for, with the same decoder in every dtype and with every dtype of the cache.

    Only the first keeps its plain tensors. Raises ValueError for an unknown model, device, dtype, back end or number of layers,
    and what Decoder.compile_layers raises.
    """
    shape = shape_of(args.model)
    if args.layers > shape.num_hidden_layers:
        raise ValueError(f"{args.model} has {shape.num_hidden_layers} layers, not {args.layers}; lower --layers")
    config, grids = replace(shape, num_hidden_layers=args.layers), prompt_grids(args)
    device = as_device(args.device)
    precisions = [named_precision(name, device) for name in args.dtype.split(",")]
    original = random_decoder(config, device, precisions[0].dtype, args.attention)
    packed = random_prompt(args.text_tokens, grids, original)
    plain, workloads = original.state_dict(), list[Workload]()
    for precision in precisions:
        decoder = ready_decoder(decoder_of(plain, config, precision.dtype, args.attention), precision, args)
        own = replace(packed, inputs_embeds=packed.inputs_embeds.to(precision.dtype))
        for cache_dtype, cached in decoders_by_cache(decoder, args.kv_cache_dtype.split(",")).items():
            kept, prefix = (None, f"{precision.name}{cache_dtype} ") if workloads else (plain if keeps_plain else None, "")
            workloads.append(Workload(cached, own, args.decode_steps, shape.num_hidden_layers, precision, kept, prefix))
    return workloads


def decoders_by_cache(decoder: Decoder, cache_dtypes: Sequence[str]) -> dict[str, Decoder]:
    """The decoder for each dtype of the cache, in the same memory; by the end of a name, which is empty for the first.

    Raises ValueError for an unknown dtype.
    """
    decoders: dict[str, Decoder] = {}
    for cache_dtype in cache_dtypes:
        check_kv_cache_dtype(cache_dtype)
        own = copy(decoder)
        own.kv_cache_dtype = cache_dtype
        decoders[f"/{cache_dtype}" if decoders else ""] = own
    return decoders


def decoder_of(plain: Mapping[str, Tensor], config: TextConfig, dtype: torch.dtype, attention: str) -> Decoder:
    """A decoder with these tensors, which are copied only into another dtype."""
    with torch.device("meta"):
        decoder = Decoder(config, resolve_backend(attention, plain["norm.weight"].device, dtype))
    decoder.load_state_dict(plain, assign=True)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder.to(dtype).eval().requires_grad_(False)


def ready_decoder(decoder: Decoder, precision: Precision, args: argparse.Namespace) -> Decoder:
    """The decoder with its weights in the form in which they are multiplied. Raises what Decoder.compile_layers raises."""
    decoder.cuda_graph = args.cuda_graph
    pack(decoder, precision, decoder.embed_tokens.weight.device)
    if args.compile:
        decoder.compile_layers()
    return decoder


def shape_of(model: str) -> TextConfig:
    """The decoder of a model by name; raises ValueError for an unknown one."""
    if model not in SHAPES:
        raise ValueError(f"unknown model {model!r}; choose one of: {', '.join(SHAPES)}")
    return SHAPES[model]


def prompt_grids(args: argparse.Namespace) -> Grids:
    """The grid of the video, or of one picture that is as square as possible. Raises ValueError if the model has no video."""
    if args.frames is None:
        rows = next(rows for rows in range(isqrt(args.vision_tokens), 0, -1) if args.vision_tokens % rows == 0)
        return ((1, rows, args.vision_tokens // rows),)
    for family, video_grids in VIDEO_GRIDS.items():
        if args.model.startswith(family):
            return video_grids(args.frames)
    raise ValueError(f"no video of {args.model} is known here; give --vision-tokens instead of --frames {args.frames}")


def random_decoder(config: TextConfig, device: torch.device, dtype: torch.dtype, attention: str) -> Decoder:
    """A decoder of noise. Activations keep a size near one, so that wrong arithmetic shows in the logits."""
    with torch.device("meta"):
        decoder = Decoder(config, resolve_backend(attention, device, dtype))
    decoder = decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    if config.tie_word_embeddings:  # to_empty has given each tensor memory of its own
        decoder.lm_head.weight = decoder.embed_tokens.weight
    for name, weight in decoder.named_parameters():
        is_matrix = weight.dim() == 2
        weight.normal_(*((1.0, 0.1) if "norm" in name else (0.0, weight.shape[-1] ** -0.5 if is_matrix else 1.0)))
    return decoder


def random_prompt(text_tokens: int, grids: Grids, decoder: Decoder) -> PackedInputs:
    """One prompt of noise: text, the vision tokens of `grids`, text, with the position ids that the model would use."""
    like, vision_tokens = decoder.embed_tokens.weight, sum(map(prod, grids))
    inputs_embeds = torch.randn(text_tokens + vision_tokens, like.shape[-1], dtype=like.dtype, device=like.device)
    rows = torch.arange(len(inputs_embeds), device=like.device)
    vision_mask = (rows >= text_tokens // 2) & (rows < text_tokens // 2 + vision_tokens)
    has_places = decoder.config.mrope_section is not None
    position_ids = multimodal_positions(vision_mask.tolist(), grids, {True}).to(like.device) if has_places else rows
    return PackedInputs(inputs_embeds, position_ids, vision_mask, [len(rows)], (vision_tokens,), vision_grids=(grids,))
