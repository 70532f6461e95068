"""What is timed side by side: our dense model, our methods at every budget, and transformers on the same tensors.

llama.cpp is in llama_cpp.py.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dropping import PUBLISHED_SCHEDULES, DropSchedule, TokenDropper
from ..dropping.schedule import PAPER_DEPTHS, PAPER_VISION_TOKENS, layers_at_depths
from ..evaluation.plans import DENSE, find_methods
from ..inference import Prefilled, decode_steps, prefill
from ..models.decoder import Decoder
from .workload import Workload

Run = Callable[[], Any]
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")  # names of transformers


@dataclass(frozen=True, eq=False)
class Contender:
    """One program that is timed with the prompt of `workload`. A decoded token reads `weight_bytes` of weights.

    `decoding` takes the result of `prefill` and returns the function that is timed. That function decodes and then rewinds the
    cache, so that every round starts from the same cache. `model_schedule` is the schedule of the whole model; the dropper has
    the part of it that fits the layers that run.
    """

    name: str
    workload: Workload
    prefill: Run
    decoding: Callable[[Any], Run]
    weight_bytes: int
    dropper: TokenDropper | None = None
    model_schedule: DropSchedule | None = None

    @property
    def schedule(self) -> DropSchedule:
        return DropSchedule({}) if self.dropper is None else self.dropper.schedule

    def cache_bytes(self, decoded: int = 0) -> int:
        """Size of its cache when so many tokens are decoded."""
        cut_cache = self.dropper is not None and self.dropper.cut_cache
        return self.workload.cache_bytes(self.schedule, cut_cache, decoded)


def model_schedule(method: type[TokenDropper], budget: float, workload: Workload) -> DropSchedule:
    """The schedule of the whole model: the paper's ratios if the paper has this budget, otherwise the solver's schedule.

    Raises ValueError if the method cannot reach the budget.
    """
    _, _, vision_tokens = workload.sizes
    published = PUBLISHED_SCHEDULES.get(f"paper-{budget:g}") if vision_tokens == PAPER_VISION_TOKENS else None
    if published is not None and method.depths == PAPER_DEPTHS:
        return published.mapped(workload.model_layers, vision_tokens)
    return method.schedule_for(budget, vision_tokens, workload.model_layers, workload.frames)


def at_same_depths(schedule: DropSchedule, model_layers: int, layers: int) -> DropSchedule:
    """The schedule of a model of `model_layers`, moved to `layers`. Drop points that fall on one layer are merged into one."""
    shares: dict[int, float] = {}
    for layer, share in schedule.items():
        (place,) = layers_at_depths(layers, [layer / model_layers])
        shares[place] = shares.get(place, 1.0) * share
    return schedule.with_values(shares, 1.0) if layers < model_layers else schedule


def our_contenders(workload: Workload, methods: Sequence[str], budgets: Mapping[str, float]) -> list[Contender]:
    """Dense, then every method at every budget. Raises ValueError for an unknown method or a budget that it cannot reach.

    The names of a second or later dtype begin with it.
    """
    run = partial(prefill, workload.decoder, workload.packed, max_new_tokens=workload.decode_steps)
    decoding = partial(decode_and_rewind, workload.decoder, workload.decode_steps)
    weight_bytes = workload.decode_weight_bytes
    contenders = [Contender(workload.prefix + DENSE, workload, run, decoding, weight_bytes)]
    for label, budget in budgets.items():
        for method in filter(None, find_methods(methods)):
            name = f"{workload.prefix}{method.name}@{label}"
            try:
                dropper, whole = dropper_at(method, budget, workload)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            contenders.append(Contender(name, workload, partial(run, dropper), decoding, weight_bytes, dropper, whole))
    return contenders


def dropper_at(method: type[TokenDropper], budget: float, workload: Workload) -> tuple[TokenDropper, DropSchedule]:
    """The method for the layers that run, and its schedule in the whole model.

    Raises ValueError if the method cannot reach the budget, or cannot act in so few layers.
    """
    whole, layers = model_schedule(method, budget, workload), workload.decoder.config.num_hidden_layers
    dropper = method(at_same_depths(whole, workload.model_layers, layers))
    dropper.schedule.check(layers, method.earliest_layer, method.latest_layer)
    return dropper, whole


def decode_and_rewind(decoder: Decoder, num_tokens: int, prefilled: Prefilled) -> Run:
    """What decodes so many tokens from a prefilled cache, and then rewinds the cache."""
    cache, token_ids = prefilled.cache, prefilled.logits.argmax(-1)
    step = decode_steps(decoder, cache)

    def run() -> None:
        for _ in range(num_tokens):
            step(token_ids)
        cache.crop(num_tokens)

    return run


def transformers_decode_and_rewind(model: Any, num_tokens: int, output: Any) -> Run:
    """The same with a model of transformers, from the output of its prefill."""
    token_ids = output.logits.argmax(-1, keepdim=True)

    def run() -> None:
        for _ in range(num_tokens):
            model(input_ids=token_ids, past_key_values=output.past_key_values, use_cache=True)
        output.past_key_values.crop(-num_tokens)

    return run


def transformers_contenders(workload: Workload, attentions: Sequence[str]) -> list[Contender]:
    """transformers with these attentions, without flash-attn if that cannot run."""
    has_flash = workload.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return [transformers_contender(workload, name) for name in attentions if has_flash or name != "flash_attention_2"]


def transformers_contender(workload: Workload, attention: str) -> Contender:
    """Its decoder of the same arithmetic, such as LlamaForCausalLM, with the decoder's own tensors. Nothing is copied."""
    import transformers

    assert workload.plain is not None
    settings: dict[str, Any] = {**asdict(workload.decoder.config), "attn_implementation": attention}
    kind = "Qwen3" if settings["qk_norm"] else "Qwen2" if settings["qkv_bias"] else "Llama"
    config: Any = getattr(transformers, f"{kind}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    plain = {name: workload.plain[name.removeprefix("model.")] for name in model.state_dict()}
    model.load_state_dict(plain, assign=True)
    # The state dict does not hold the rotary frequencies, so they are still on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(workload.device)
    inputs_embeds = workload.packed.inputs_embeds[None]

    def run() -> Any:
        output = model.model(inputs_embeds=inputs_embeds, past_key_values=transformers.DynamicCache(), use_cache=True)
        # logits_to_keep=1 would slice (1, T, D), and the bfloat16 product of that slice is very slow on CPUs. We avoid it,
        # because it would make transformers look slower than it is.
        output.logits = model.lm_head(output.last_hidden_state[:, -1])
        return output

    decoding = partial(transformers_decode_and_rewind, model, workload.decode_steps)
    weight_bytes = sum(tensor.nbytes for name, tensor in workload.plain.items() if "embed" not in name)
    return Contender(f"transformers {attention}", workload, run, decoding, weight_bytes)


def check_logits(workload: Workload, reference: Contender) -> dict[str, float]:
    """Compare our dense logits with the reference's, at positions 0, 1, 2 and so on. Raises what `compare_logits` raises."""
    rows = torch.arange(len(workload.packed.inputs_embeds), device=workload.device)
    ours = prefill(workload.decoder, replace(workload.packed, position_ids=rows)).logits[0]
    return compare_logits(ours, reference.prefill().logits[0])


def compare_logits(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """The difference of two contenders' last logits (V,). Raises RuntimeError if rounding cannot explain it."""
    difference, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
    if not difference <= torch.finfo(ours.dtype).eps ** 0.5 * largest:
        raise RuntimeError(
            f"our dense logits differ from those of transformers by {difference:.3g}, and the largest logit is {largest:.3g}: "
            "the two programs do not compute the same"
        )
    return {"max_difference": difference, "largest_logit": largest}


def decoding_contenders(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders whose decoding differs: one per cache shape, and every method that hides a part of its cache."""

    def kind(contender: Contender) -> str:
        dropper = contender.dropper
        alone = dropper is None or dropper.prunes_while_decoding()
        return contender.name if alone else f"{contender.workload.prefix}{contender.schedule}"

    firsts = {kind(contender): contender.name for contender in reversed(contenders)}
    return [contender for contender in contenders if contender.name in firsts.values()]
