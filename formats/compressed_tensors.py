"""Write quantized layers in compressed-tensors' `pack-quantized` format, from their codes and without rounding again.

A layer is scale * (code - zero) with unsigned codes and zeros. The format stores code - 2**(bits-1), so the same codes
and zeros fit any wider asymmetric container, and with zeros of 2**(bits-1) throughout, a symmetric one.
"""
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import nn

# linear layers that vLLM runs as one, so that they must be packed alike (its packed_modules_mapping)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
         ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
EXPERTS = r"re:.*experts\.\d+\..*"     # target of a mixture's experts: transformers knows their scheme by the word


class Quantized(NamedTuple):
    """One layer: scale * (code - zero)."""
    codes: torch.Tensor          # uint8 [out, in], below 2**bits
    scales: torch.Tensor         # float16 [out, groups], or as another tool wrote them
    zeros: torch.Tensor          # uint8 [out, groups]
    bits: int                    # 1 to 8
    group_size: int              # input columns that share a scale; the last group may have fewer

    @property
    def numel(self) -> int:
        return self.codes.numel()

    @property
    def symmetric(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())


def check_loadable(model: nn.Module, names: Collection[str]) -> None:
    """Raise ValueError naming a layer of `names` that transformers would not load packed: it is no plain nn.Linear, or
    the model's class reads its weight while loading."""
    with torch.device("meta"):      # a moment, whatever the size
        skeleton = type(model)(model.config)
    modules = dict(skeleton.named_modules())
    for name in names:
        layer = modules.get(name)                    # None: an expert's
        if layer is not None and type(layer).forward is not nn.Linear.forward:
            raise ValueError(f"--format compressed-tensors: {name} is a {type(layer).__name__} with a forward of its "
                             f"own, which transformers does not unpack; use --format dense")
        if layer is not None:
            del layer.weight
    for module in modules.values():
        try:
            skeleton._init_weights(module)
        except AttributeError as error:
            if "attribute 'weight'" not in str(error):       # a part's own class would know the attribute
                continue
            raise ValueError(f"--format compressed-tensors: {type(model).__name__} does not load with packed layers "
                             f"({error}); use --format dense") from error


class Scheme(NamedTuple):
    """How a layer is packed."""
    bits: int
    symmetric: bool
    group_size: int | None       # None: the whole row


def zero_layer(shape: Iterable[int]) -> Quantized:
    """A layer of zeros [out, in], as small as the format allows in vLLM: 2 bits."""
    out, columns = shape
    return Quantized(torch.full((out, columns), 2, dtype=torch.uint8), torch.ones(out, 1, dtype=torch.float16),
                     torch.full((out, 1), 2, dtype=torch.uint8), 2, columns)


def choose_schemes(layers: Mapping[str, Quantized], promote: bool, experts: Collection[str] = (),
                   widths: Collection[int] = range(1, 9)) -> dict[str, Scheme]:
    """How each layer is packed: in the narrowest of `widths` that holds it; with `promote`, fused layers as the widest
    of them. Neither changes a weight. `experts`: names of those that are an expert's."""
    schemes = {name: Scheme(_narrowest(layer.bits, widths), layer.symmetric, _even_group_size(layer))
               for name, layer in layers.items()}
    for names in fused_layers(layers) if promote else ():
        bits = max(schemes[name].bits for name in names)
        symmetric = all(schemes[name].symmetric for name in names)
        schemes.update({name: Scheme(bits, symmetric, schemes[name].group_size) for name in names})
    if experts:
        schemes.update(dict.fromkeys(experts, experts_scheme([layers[name] for name in experts], widths)))
    return schemes


def _narrowest(bits: int, widths: Collection[int]) -> int:
    """Raises ValueError where none of `widths` is that wide."""
    if bits > max(widths):
        raise ValueError(f"--pack_bits {' '.join(map(str, widths))}: none holds a layer of {bits} bits; add {bits} or "
                         f"more")
    return min(width for width in widths if width >= bits)


def experts_scheme(layers: Collection[Quantized], widths: Collection[int] = range(1, 9)) -> Scheme:
    """How all of a model's experts are packed: transformers reads them by one scheme, and a symmetric one. It is the
    narrowest of `widths` that changes no weight; raises ValueError where there is none, see `check_expert`."""
    bits = max(layer.bits + (not layer.symmetric) for layer in layers)
    sizes = {_even_group_size(layer) for layer in layers}
    group_size = math.gcd(*(_even_group_size(layer) or layer.codes.shape[1] for layer in layers))
    return Scheme(_narrowest(bits, widths), True, None if sizes == {None} else group_size)


def check_expert(name: str, bits: int, symmetric: bool) -> None:
    """Raise ValueError for an expert's layer that no scheme of `experts_scheme` holds."""
    if bits + (not symmetric) > 8:
        raise ValueError(f"--format compressed-tensors: {name} has asymmetric integers of {bits} bits, which need "
                         f"{bits + 1} as the symmetric ones from which transformers reads experts, and it reads up to "
                         f"8; use --format dense, or search with --bounds '*.experts.*=2:7', or on a database built "
                         f"with --sym")


def fused_layers(names: Iterable[str]) -> list[list[str]]:
    """The sets of two or more layers among `names` that vLLM runs as one."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        for members in FUSED:
            if child in members:
                found.setdefault((parent, members), []).append(name)
    return [layers for layers in found.values() if len(layers) > 1]


def unevenly_packed(linear: Iterable[str], schemes: Mapping[str, Scheme]) -> list[list[str]]:
    """The sets of fused layers, among all `linear` ones of the model, that are not packed alike: vLLM refuses them."""
    return [names for names in fused_layers(linear) if len({schemes.get(name) for name in names}) > 1]


def layout(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of the tensors of a layer [out, in] with half-precision scales, packed by itself."""
    out, columns = shape
    groups = 1 if group_size >= columns else columns // math.gcd(group_size, columns)
    parts = {"weight_packed": ("I32", [out, -(-columns * bits // 32)]), "weight_scale": ("F16", [out, groups]),
             "weight_shape": ("I64", [2])}
    return parts if symmetric else parts | {"weight_zero_point": ("I32", [-(-out * bits // 32), groups])}


def pack(name: str, layer: Quantized, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The layer's tensors, by the names they have in the checkpoint."""
    codes, scales, zeros = layer.codes.short(), layer.scales, layer.zeros.short()
    if scheme.symmetric:
        codes = codes + (1 << (scheme.bits - 1)) - zeros[:, torch.arange(codes.shape[1]) // layer.group_size]
    if scheme.group_size is not None:
        columns = torch.arange(0, codes.shape[1], scheme.group_size) // layer.group_size
        scales, zeros = scales[:, columns], zeros[:, columns]
    offset = 1 << (scheme.bits - 1)
    tensors = {"weight_packed": pack_to_int32((codes - offset).to(torch.int8), scheme.bits),
               "weight_scale": scales.contiguous(), "weight_shape": torch.tensor(codes.shape)}
    if not scheme.symmetric:
        packed = pack_to_int32((zeros - offset).to(torch.int8), scheme.bits, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def quantization_config(schemes: Mapping[str, Scheme], ignore: list[str], experts: Collection[str] = ()) -> dict:
    """The `quantization_config` of config.json; `ignore`: linear layers that are not quantized; `experts`: names of
    those that are an expert's."""
    groups: dict[tuple[Scheme, bool], list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((scheme, name in experts), []).append(name)
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ignore, "config_groups": {f"group_{number}": {
                "targets": [EXPERTS] if of_experts else names,
                **({"format": "pack-quantized"} if of_experts else {}),          # vLLM asks for it here, too
                "weights": {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False,
                            **({"strategy": "channel"} if scheme.group_size is None else
                               {"strategy": "group", "group_size": scheme.group_size})},
            } for number, ((scheme, of_experts), names) in enumerate(groups.items())}}


def bits_a_weight(layers: Iterable, stored: int) -> dict:
    """What to report: bits of a weight as searched, and of all `stored` bytes of these layers."""
    weights = codes = 0
    for layer in layers:
        weights += layer.numel
        codes += layer.numel * layer.bits
    return {"bits_a_weight": {"codes": codes / weights, "stored": 8 * stored / weights}}


def _even_group_size(layer: Quantized) -> int | None:
    """The format takes no shorter last group: then every group is split into equal ones, with the scale repeated."""
    columns = layer.codes.shape[1]
    return None if layer.scales.shape[1] == 1 else math.gcd(layer.group_size, columns)
