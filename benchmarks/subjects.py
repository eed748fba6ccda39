"""What the speed of a search is measured on: a model, its calibration documents, a database of its layers' levels."""
import math
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from database import gptq, sparsegpt
from database.packing import Packed, pack_quantized
from database.store import FORMAT, Database, config_sha256, layer_file, write_layer, write_manifest
from utils import model as models
from utils.data import calibration_documents
from utils.decoder import Decoder
from utils.model import load_decoder, load_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
SHAPES = {   # Llamas of random weights
    "100m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                 vocab_size=32000, num_key_value_heads=12, max_position_embeddings=512, tie_word_embeddings=True),
    "llama-3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0),
    # a few of its 80 blocks, and a head that takes no time beside them
    "llama-3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64,
                        vocab_size=4096, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=512,
                 num_key_value_heads=2, max_position_embeddings=128),
}
LEVEL_FLAGS = {   # of the demo's databases, and of the paper's
    "gptq": "--bitwidth_options 2 3 4 5 6 --group_size 128 --perchannel",
    "sparsegpt": "--sparsity 0.6 --num_levels 8"}


def load(model: str, device: torch.device, num_tokens: int, dtype: str) -> tuple[Decoder, list[torch.Tensor]]:
    """(decoder, documents of `num_tokens` tokens in all): the demo model on Python source, else a shape of SHAPES with
    random weights on random tokens. `dtype`: one of `utils.model.DTYPES`."""
    if model == "demo":
        decoder = load_decoder(str(DEMO), dtype, device)
        return decoder, calibration_documents("stdlib", load_tokenizer(str(DEMO)), num_tokens, 256)
    models.tune_process(device)                      # as load_decoder does
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[model], use_cache=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):         # where drawing takes no time
        llama = AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[dtype]).to(device)
    decoder = Decoder(llama, by_document=device.type == "cuda")
    for block in decoder.blocks[1:]:                 # one block's levels are then the levels of all
        block.module.load_state_dict(decoder.blocks[0].module.state_dict())
    return decoder, random_documents(config, num_tokens)


def random_documents(config: LlamaConfig, num_tokens: int) -> list[torch.Tensor]:
    """Half of them as long as a document may be, as pieces of long texts are; the others of any length."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    longest = min(config.max_position_embeddings, 4096)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(longest if rng.random() < 0.5 else rng.randint(2, longest))
    return [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]


def build_database(decoder: Decoder, method: str, folder: Path, one_block: bool, drawn: bool = False) -> Database:
    """A database of all layers of the blocks, rounded or pruned without calibration data, or `drawn_levels`; with
    `one_block`, the first block's levels serve for every block (its files are linked, not copied)."""
    module = {"gptq": gptq, "sparsegpt": sparsegpt}[method]
    args = module.make_parser().parse_args([*LEVEL_FLAGS[method].split(), "--model_name_or_path", "-", "--save_dir",
                                            str(folder)])
    module.resolve(args, decoder.config)
    folder.mkdir(parents=True)
    manifest = {"format": FORMAT, "method": method, "model": "benchmark", "weights_sha256": "",
                "calibration_sha256": "", "config_sha256": config_sha256(decoder.config), "layers": {},
                "flags": {key: value for key, value in vars(args).items() if key != "save_dir"}}
    for block in decoder.blocks:
        for (name, layer), first in zip(block.layers.items(), decoder.blocks[0].layers):
            if one_block and block.index:
                os.link(layer_file(folder, first), layer_file(folder, name))
                manifest["layers"][name] = manifest["layers"][first]
            else:
                if drawn:
                    levels = drawn_levels(tuple(layer.weight.shape), args.group_size, decoder.device)
                else:
                    identity = torch.eye(layer.in_features, device=layer.weight.device)
                    levels, _ = module.solve_layer(name, layer.weight, identity, args)
                manifest["layers"][name] = write_layer(folder, name, tuple(layer.weight.shape), levels)
    write_manifest(folder, manifest)
    return Database.open(folder)


def drawn_levels(shape: tuple[int, int], group_size: int, device: torch.device) -> dict[int, tuple[Packed, dict]]:
    """2 and 3 bits of a layer [out, in], of random codes: as `gptq.solve_layer` gives them, in no time."""
    levels, grids = {}, (shape[0], -(-shape[1] // group_size))
    for bits in (2, 3):
        packed = pack_quantized(torch.randint(2**bits, shape, dtype=torch.uint8, device=device),
                                torch.full(grids, 0.01, dtype=torch.float16, device=device),
                                torch.full(grids, 2**(bits - 1), dtype=torch.uint8, device=device), bits)
        levels[bits] = packed, {"bits": math.prod(shape) * bits, "overhead_bits": 24 * math.prod(grids), "error": 0.0}
    return levels


class DenseFiles:
    """Levels as the reference keeps them: a file with the dense weight for every layer and level, read at a switch."""

    def __init__(self, decoder: Decoder, database: Database, folder: Path):
        """Writes the files, in the model's dtype; layers whose levels are one file in the database share theirs."""
        self.layers, self.loaded, self.folder = decoder.layers, {}, folder
        self.names = [[name for name in block.layers if name in database.layers] for block in decoder.blocks]
        folder.mkdir(parents=True)
        written: dict[tuple[str, int], Path] = {}
        for name in database.layers:
            for level in database.levels(name):
                key, file = (database.manifest["layers"][name]["sha256"], level), self._file(name, level)
                if key in written:
                    os.link(written[key], file)
                else:
                    save_file({"weight": database.weight(name, level, dtype=decoder.dtype)}, file)
                    written[key] = file

    def set_block(self, index: int, levels: tuple[int, ...]) -> None:
        for name, level in zip(self.names[index], levels, strict=True):
            if self.loaded.get(name) != level:
                weight = self.layers[name].weight
                weight.data.copy_(load_file(self._file(name, level), device=str(weight.device))["weight"])
                self.loaded[name] = level

    def _file(self, name: str, level: int) -> Path:
        return self.folder / f"{name}.{level}.safetensors"
