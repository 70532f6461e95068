"""The weights of a quantised copy: for each matrix its integers and scales, under our own names.

`save_quantised` in saving.py writes such a folder and `load` reads it. The parts of a matrix are those of Int8Linear and
Int4Linear. Everything else is stored in the dtype that the original model computed in. `config.json` names the
quantisation OWN_QUANTISATION. transformers only warns of an unknown quantisation, so the index has a name of its own too, and
other programs find no weights.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.config import VLMConfig
from ..models.linear import PrepackedLinear, QuantisedLinear, replace_linears
from ..models.linear_int4 import DECODER_LAYERS, GROUP, LARGEST_MULTIPLE, Int4Linear, check_shape
from ..models.linear_int8 import Int8Linear, quantisable
from ..models.model_classes import MODEL_CLASSES
from ..models.vlm import VLM
from .checkpoint import STORED_DTYPES, check_depth, check_finite, check_materialised, converted
from .files import (
    OWN_INDEX,
    OWN_QUANTISATION,
    CheckpointError,
    StoredTensor,
    list_tensors,
    listed,
    open_safetensors,
    own_quantisation,
    write_safetensors,
)
from .precision import OBSTACLES, Precision, named_precision, pack_floats
from .uninitialised import Uninitialised

FILE_BYTES = 2**30  # of tensors in a file; they are collected in memory before they are written
INT8_PARTS, INT4_PARTS = ("q", "scale"), ("nibbles", "multiples", "scale")
CPU = torch.device("cpu")
Form = tuple[tuple[int, ...], tuple[str, ...]]  # shape and possible dtypes of a stored tensor


def saved_precision(folder: Path, asked: Precision | None, device: torch.device) -> Precision | None:
    """The precision of a quantised copy; None for every other folder.

    Raises ValueError where another one is asked for or where it cannot run, and CheckpointError for a copy with an
    unknown dtype or for other kernels.
    """
    settings = own_quantisation(folder)
    if settings is None:
        return None
    name, layout = settings.get("dtype"), settings.get("layout")
    if name not in ("int8", "int4"):
        raise CheckpointError(f"{folder} is a quantised copy with the unknown dtype {name!r}; write it again")
    if asked is not None and asked.name != name:
        raise ValueError(f"{folder} holds {name} weights, not {asked}; leave the dtype out, or load the original checkpoint")
    if (reason := OBSTACLES[name](device)) is not None:
        raise ValueError(f"{folder} holds {name} weights, which cannot run: {reason}; load the original checkpoint")
    found = named_precision(name, device)
    if layout != layout_of(name):
        raise CheckpointError(f"{folder} was written for the kernels of {layout}, not {layout_of(name)}; write it again here")
    return replace(found, reason=f"the folder holds {name} weights") if asked is None else found


def layout_of(name: str) -> str | None:
    """The order of 4-bit numbers is that of torch's kernel for this processor; int8 has a plain order."""
    return torch.backends.cpu.get_cpu_capability() if name == "int4" else None


def quantisation_settings(precision: Precision) -> dict[str, str | None]:
    """What config.json says about a copy."""
    return {"quant_method": OWN_QUANTISATION, "dtype": precision.name, "layout": layout_of(precision.name)}


def write_weights(model: VLM, folder: Path) -> None:
    """Write a model with quantised layers in files of about FILE_BYTES, and the index that names them; raises OSError."""
    files: list[list[str]] = []
    waiting, size = dict[str, Tensor](), 0
    for name, tensor in chain(stored_tensors(model), [(None, torch.empty(0))]):
        if waiting and (name is None or size + tensor.nbytes > FILE_BYTES):
            write_safetensors(waiting, folder / file_name(len(files)))
            files.append(list(waiting))
            waiting, size = {}, 0
        if name is not None:
            waiting[name], size = tensor.contiguous(), size + tensor.nbytes
    places = {name: file_name(number) for number, names in enumerate(files) for name in names}
    (folder / OWN_INDEX).write_text(json.dumps({"weight_map": places}, indent=2) + "\n", encoding="utf-8")
    for number in range(len(files)):  # safetensors makes files that nobody but their owner may read
        shutil.copymode(folder / OWN_INDEX, folder / file_name(number))


def file_name(number: int) -> str:
    return f"quantised-{number + 1:05d}.safetensors"


def stored_tensors(model: VLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a copy with its name, one after the other: the plain order of a matrix is made when it is its turn."""
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            parts = INT4_PARTS if isinstance(module, Int4Linear) else INT8_PARTS
            yield from ((f"{name}.{part}", getattr(module, part)) for part in parts)
            if (bias := getattr(module, "bias", None)) is not None:
                yield f"{name}.bias", bias
        elif isinstance(module, PrepackedLinear):
            yield f"{name}.weight", module.weight
    yield from model.state_dict().items()  # quantised layers hold their tensors as plain attributes, which are not in it


def load_quantised(folder: Path, config: VLMConfig, precision: Precision, attention: str) -> VLM:
    """Read a quantised copy into a model that is ready for inference, one matrix after the other.

    Raises CheckpointError where the files do not hold exactly the tensors of the model, and ValueError where the model has
    matrices of a shape that cannot have 4-bit weights.
    """
    stored = list_tensors(folder)
    check_depth(stored, config, folder)
    with torch.device("meta"), Uninitialised():
        model = MODEL_CLASSES[type(config)](config, attention)
    linears = quantisable(model)
    check_forms(stored, expected_forms(model, linears, precision), folder)
    reader = Reader(stored)
    others = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in linears}
    state = {name: converted(reader.finite(name), CPU, precision.dtype).clone() for name in others}
    model.load_state_dict(state, strict=False, assign=True)
    for name in list(linears):
        linear = linears.pop(name)
        made = read_linear(reader, name, linear, precision)
        replace_linears(model, {name: linear}, lambda _, made=made: made)  # type: ignore[misc]
    pack_floats(model, precision, CPU)
    check_materialised(model)
    return model.eval().requires_grad_(False)


def is_int4(name: str, precision: Precision) -> bool:
    """Whether a layer has 4-bit weights; see precision.quantise."""
    return precision.name == "int4" and DECODER_LAYERS.search(name) is not None


def expected_forms(model: VLM, linears: Mapping[str, nn.Linear], precision: Precision) -> dict[str, Form]:
    """Shape and dtypes of every tensor that a copy of this model has; raises ValueError as `check_shape`."""
    forms: dict[str, Form] = {
        name: (tuple(tensor.shape), tuple(STORED_DTYPES))
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in linears
    }
    for name, linear in linears.items():
        rows, columns = linear.out_features, linear.in_features
        forms[f"{name}.scale"] = (rows,), ("F32",)
        if is_int4(name, precision):
            check_shape(linear)
            forms[f"{name}.nibbles"] = (rows, columns // 2), ("U8",)
            forms[f"{name}.multiples"] = (columns // GROUP, rows), ("I8",)
        else:
            forms[f"{name}.q"] = (rows, columns), ("I8",)
    return forms


def check_forms(stored: Sequence[StoredTensor], forms: Mapping[str, Form], folder: Path) -> None:
    """Raise CheckpointError unless exactly these tensors are stored, each once."""
    names = Counter(tensor.name for tensor in stored)
    if missing := sorted(forms.keys() - names.keys()):
        raise CheckpointError(f"{folder} lacks tensors of the quantised copy: {listed(missing)}; write it again")
    if unexpected := [str(tensor) for tensor in stored if tensor.name not in forms or names[tensor.name] > 1]:
        raise CheckpointError(f"{folder} stores tensors that the model has no place for: {listed(unexpected)}")
    wrong = [
        f"{tensor} is {tensor.shape} in {tensor.dtype}"
        for tensor in stored
        if tensor.shape != forms[tensor.name][0] or tensor.dtype not in forms[tensor.name][1]
    ]
    if wrong:
        raise CheckpointError(f"config.json and the quantised tensors disagree: {listed(wrong)}; write the copy again")


class Reader:
    """The values of stored tensors by name. The files stay mapped while this lives."""

    def __init__(self, stored: Sequence[StoredTensor]) -> None:
        self.sources = {tensor.name: tensor for tensor in stored}
        self.opened: dict[Path, Any] = {file: open_safetensors(file) for file in {tensor.file for tensor in stored}}

    def whole(self, name: str) -> Tensor:
        return self.opened[self.sources[name].file].get_tensor(name)

    def finite(self, name: str) -> Tensor:
        """Floating values; raises CheckpointError where one is not finite."""
        values = self.whole(name)
        check_finite(values, self.sources[name], values.dtype)
        return values


def read_linear(reader: Reader, name: str, linear: nn.Linear, precision: Precision) -> QuantisedLinear:
    """A quantised layer in memory of its own; raises CheckpointError for scales that are impossible."""
    scale, bias = reader.finite(f"{name}.scale").clone(), linear.bias
    if scale.min() < 0:
        raise CheckpointError(f"{reader.sources[f'{name}.scale']} has negative scales; write the copy again")
    if not is_int4(name, precision):
        return Int8Linear(reader.whole(f"{name}.q"), scale, bias, precision.dtype)
    nibbles, multiples = (reader.whole(f"{name}.{part}").clone() for part in INT4_PARTS[:2])
    if not 1 <= multiples.min() <= multiples.max() <= LARGEST_MULTIPLE:
        raise CheckpointError(f"{reader.sources[f'{name}.multiples']} has values beyond 1 ... {LARGEST_MULTIPLE}")
    return Int4Linear(nibbles, multiples, scale, bias, precision.dtype)
