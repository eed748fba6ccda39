"""Experts that are slices of 3-D parameters, as linear layers: one for every matrix of every expert.

Which parameters hold experts, and how they lie in them, is not known from the family but seen in use: a product whose
second factor is a whole slice of a 3-D parameter tells the slice, the orientation and the input. Layers are named as in
checkpoints (`mlp.experts.7.up_proj`) where transformers knows how to merge theirs, else alike.
"""
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

# products whose second factor is a weight [in, out], as the weight [out, in] of functional.linear is not
MATMUL = {torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm,
          torch.Tensor.__matmul__}


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One matrix of one expert: of a 3-D parameter, what there is of an nn.Linear's weight."""
    parameter: nn.Parameter          # [experts, out, in], or [experts, in, out]
    transposed: bool                 # the latter
    expert: int
    outputs: slice                   # of all its outputs: gate and up in one parameter are two layers
    separate: bool                   # in checkpoints it is a matrix of its own, which transformers merges

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], a view: what is written to it is written to the parameter."""
        matrix = self.parameter.data[self.expert]
        return (matrix.T if self.transposed else matrix)[self.outputs]

    @property
    def in_features(self) -> int:
        return self.parameter.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        return len(range(*self.outputs.indices(self.parameter.shape[2 if self.transposed else 1])))


Layer = nn.Linear | ExpertLayer


class Products(TorchFunctionMode):
    """While it is active, calls see(parameter, transposed, {expert: its input [tokens, in]}) for every product with
    whole slices of some 3-D parameters; transposed: the parameter is [experts, in, out]."""

    def __init__(self, parameters: Iterable[nn.Parameter],
                 see: Callable[[nn.Parameter, bool, dict[int, torch.Tensor]], None]):
        super().__init__()
        self._parameters, self._see = list(parameters), see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is functional.linear or func in MATMUL:
            self._look(*(*args, *kwargs.values())[:2], func is functional.linear)
        return func(*args, **kwargs)

    def _look(self, x: torch.Tensor, weight: torch.Tensor, linear: bool) -> None:
        for parameter in self._parameters:
            data = parameter.data
            offset = (weight.data_ptr() - data.data_ptr()) // data.element_size()
            if not data.is_contiguous() or weight.dtype != data.dtype or not 0 <= offset < data.numel():
                continue                                         # offloaded, or another tensor
            flipped = weight.stride()[-2:] != data.stride()[-2:]
            shape = (weight.mT if flipped else weight).shape
            if shape == data.shape[1:]:
                self._see(parameter, linear == flipped, {offset // data.stride(0): x})
            elif shape == data.shape and x.dim() == 3:           # all experts at once, with zeros for who is not routed
                self._see(parameter, linear == flipped, {expert: rows[rows.any(-1)] for expert, rows in enumerate(x)})


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Have a model run expert by expert, as the classes of transformers are written: its kernels show no slices."""
    configs = {id(module.config): module.config for module in model.modules()
               if hasattr(getattr(module, "config", None), "_experts_implementation_internal")}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


@contextmanager
def orientations(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[dict[nn.Parameter, bool]]:
    """The 3-D parameters in `modules` whose slices are seen in products inside the context, and for each whether it is
    [experts, in, out]."""
    found: dict[nn.Parameter, bool] = {}
    parameters = {parameter for module in modules for parameter in module.parameters() if parameter.dim() == 3}
    if not parameters:
        yield found
        return
    with eager(model), Products(parameters, lambda parameter, transposed, _: found.setdefault(parameter, transposed)):
        yield found


def merged_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Pattern of a parameter's name -> what checkpoints call the matrices of each expert that transformers merges into
    it, in their order: ("gate_proj", "up_proj")."""
    converters = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    return {pattern: tuple(source.split(".")[-2] for source in converter.source_patterns)
            for converter in converters if isinstance(converter, WeightConverter)
            and any(isinstance(operation, MergeModulelist) for operation in converter.operations)
            for pattern in converter.target_patterns}


def expert_layers(name: str, module: nn.Module, transposed: Mapping[nn.Parameter, bool],
                  merged: Mapping[str, tuple[str, ...]]) -> dict[str, ExpertLayer]:
    """Full name -> layer of the experts in a module's own parameters, expert by expert. name: of the module;
    transposed: see `orientations`; merged: see `merged_names`."""
    parent, _, last = name.rpartition(".")
    folder = name if "experts" in last else f"{name}.experts"
    parts: list[tuple[str, nn.Parameter, slice, bool]] = []      # of an expert
    for own, parameter in module.named_parameters(recurse=False):
        if parameter not in transposed:
            continue
        roles = next((names for pattern, names in merged.items() if re.search(f"{pattern}$", f"{name}.{own}")), None)
        separate = roles is not None
        if not roles and own == "weight":                        # then the module has the name that tells it apart
            folder, roles = parent if "experts" in parent else f"{parent}.experts", (last,)
        elif not roles:
            roles = tuple(own.replace("gate_up", role) for role in ("gate", "up")) if "gate_up" in own else (own,)
        size = parameter.shape[2 if transposed[parameter] else 1]
        taking_turns = len(roles) > 1 and not getattr(module, "is_concatenated", True)
        for i, role in enumerate(roles):
            share = size // len(roles)
            parts.append((role, parameter, slice(i, size, len(roles)) if taking_turns
                          else slice(i * share, (i + 1) * share), separate))
    return {f"{folder}.{expert}.{role}": ExpertLayer(parameter, transposed[parameter], expert, outputs, separate)
            for expert in range(len(parts[0][1]) if parts else 0) for role, parameter, outputs, separate in parts}


@contextmanager
def inputs_seen(layers: Mapping[str, Layer], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within, see(name, input [tokens, in]) is called for each of `layers` that is an expert's when it is used."""
    names: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLayer):
            names.setdefault((id(layer.parameter), layer.expert), []).append(name)

    def used(parameter: nn.Parameter, _: bool, inputs: dict[int, torch.Tensor]) -> None:
        for expert, x in inputs.items():
            for name in names.get((id(parameter), expert), ()) if len(x) else ():
                see(name, x)

    if not names:
        yield
        return
    with Products({layer.parameter for layer in layers.values() if isinstance(layer, ExpertLayer)}, used):
        yield
