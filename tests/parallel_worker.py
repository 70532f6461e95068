"""What each of two processes does with a shared decoder for tests/test_parallel.py: parallel_worker.py OUTPUT FOLDER..."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import pack_together, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.inference import decode_one_token, prefill
from nanovlm_v2drop.loading import checkpoint
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.parallel import leave_processes

Outcome = dict[str, Any]


def outcomes(decoder: Decoder) -> dict[str, Outcome]:
    """Kept tokens, all logits and the bytes of the cache, by method; None means no dropping. Two have a cache in int8."""
    packed = pack_together(tiny_prompts(hidden_size=decoder.config.hidden_size))
    found = {}
    for name, decoder.kv_cache_dtype in [*((name, "auto") for name in (None, *DROPPERS)), (None, "int8"), ("v2drop", "int8")]:
        method = None if name is None else DROPPERS[name]
        layers = (0,) if method is not None and method.latest_layer == 0 else (2, 4)
        dropper = None if method is None else method(DropSchedule(dict.fromkeys(layers, 0.5)))
        prefilled = prefill(decoder, packed, dropper, max_new_tokens=4)
        logits, nbytes = [prefilled.logits], prefilled.cache.nbytes
        for _ in range(4):
            logits.append(decode_one_token(decoder, logits[-1].argmax(-1), prefilled.cache))
        kept = [[rows.tolist() for rows in sequences] for _, sequences in prefilled.survivors]
        key = str(name) if decoder.kv_cache_dtype == "auto" else f"{name} with an int8 cache"
        found[key] = {"kept": kept, "logits": torch.stack(logits), "nbytes": nbytes}
    return found


class Watched:
    """A safetensors file that notes which tensors are read whole."""

    def __init__(self, opened: Any, whole: list[str]) -> None:
        self.opened, self.whole = opened, whole

    def __enter__(self) -> "Watched":
        self.opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.whole.append(name)
        return self.opened.get_tensor(name)


def main(output: Path, *folders: str) -> None:
    torch.set_num_threads(1)
    whole: list[str] = []
    open_safetensors = checkpoint.open_safetensors
    checkpoint.open_safetensors = lambda file: Watched(open_safetensors(file), whole)
    results = {}
    for folder in folders:
        whole.clear()
        model = load(folder, tensor_parallel=2).model
        results[folder] = {
            "outcomes": outcomes(model.language_model),
            "state": model.state_dict(),
            "read_whole": list(whole),
        }
    torch.save(results, output / f"rank-{dist.get_rank()}.pt")
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
