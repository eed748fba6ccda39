"""Where results run: searched to a size, exported, and loaded by the runtime itself; its size and its divergence.

    python benchmarks/runtimes.py --write_readme

Every row is a search with --count_everything at so many bits a parameter of the whole file, and its export, which the
runtime loads: transformers, mlx-lm or llama.cpp, all on a CPU. Embeddings are searched, too, where the format holds
them quantized. "KL, searched" is of the model as the search has it, "KL, loaded" of what the runtime computes, on the
same held-out text. Needs the packages of requirements-gguf.txt and requirements-mlx.txt (make test-runtimes puts them
into .venv/runtimes). K-quants need rows of 256: where the model has others, llama.cpp's fallback types stand in.
"""
import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
from benchmarks.finish import Bench
from benchmarks.programs import claim, group_size, write_readme
from database.store import Database
from test_formats_gguf import LlamaCpp
from utils.configs import read_level_config
from utils.data import evaluation_documents
from utils.files import write_atomic
from utils.model import load_tokenizer
from utils.report import format_table

SEARCH = ["--init", "measured", "--initial_tokens", 128, "--generations", 4, "--offspring", 8, "--no_eval",
          "--survivors_per_selection", 2, 1, "--tokens_per_selection", 256, 1024]
LOADERS = {"compressed-tensors": "transformers", "mlx": "mlx-lm", "mlx-float16": "mlx-lm", "gguf": "llama.cpp"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration and evaluation text")
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--search_flags", type=shlex.split, default=[], metavar="'FLAGS'",
                        help="of evo_quant.py, instead of those of SEARCH: '--init random --generations 2', say")
    parser.add_argument("--eval_tokens", type=int, default=512, help="default: 512")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4, 5, 6], metavar="BITS",
                        help="of the databases; of K-quants 8, too (default: 2 3 4 5 6)")
    parser.add_argument("--embedding_bitwidths", type=int, nargs="+", default=[4, 6, 8], metavar="BITS",
                        help="of MLX's and GGUF's databases (default: 4 6 8)")
    parser.add_argument("--bits", nargs="+", metavar="FORMAT=BITS,BITS",
                        default=["compressed-tensors=2.9,3.5", "mlx=2.8,3.5", "mlx-float16=2.5,3", "gguf=4.7,5.1"],
                        help="a parameter, everything counted (default: what the demo model's levels allow)")
    parser.add_argument("--out", type=Path, default=Path("results/runtimes"))
    parser.add_argument("--write_readme", nargs="?", const="runtimes", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: "
                             "runtimes)")
    return parser.parse_args()


class Runtimes(Bench):
    def database(self, format: str) -> Path:
        build = ["-m", "database.gptq", *self.text, "--bitwidth_options", *self.args.levels]
        embeddings = ["--embedding_bitwidths", *self.args.embedding_bitwidths]
        if format == "gguf":
            return self.once("k-quants", [*build, 8, *embeddings, "--grid", "k-quant"])
        build += ["--group_size", group_size(self.args.model_name_or_path), "--perchannel", "--mse"]
        return self.once("linear", build) if format == "compressed-tensors" else self.once("all", build + embeddings)

    def row(self, format: str, target: str) -> list:
        """Of the table; a row that is finished is read."""
        name = f"{format}-{target}"
        kept = self.out / f"{name}.json"
        if not kept.exists():
            write_atomic(kept, json.dumps(self.measured(name, format, target)))
        return json.loads(kept.read_text())

    def measured(self, name: str, format: str, target: str) -> list:
        database = self.database(format)
        budget = ["--quant_weights_path", database]
        found = self.once(f"search-{name}", [
            "evo_quant.py", *self.text, *SEARCH, *self.args.search_flags, *budget, "--for_format", format,
            "--count_everything", "--target_bitwidth", target, "--group_rule", "none", "--configuration_name",
            f"{name}.txt"]) / f"{name}.txt"
        folder = self.once(name, ["export.py", *self.model, *budget, "--quant_config_path", found, "--format", format])
        report = json.loads((folder / "export.json").read_text())
        weights = searched_weights(Database.open(database), found)
        bits, size = report["bits_a_weight"], report["bytes"]["exported"]
        return [format, float(target), bits["codes"], bits["stored"], 8 * size / report["parameters"]["dense"],
                f"{size:,}",
                self.divergence(torch_logits(self.args.model_name_or_path, self.documents, weights)), LOADERS[format],
                self.divergence(LOADED[format](folder, self.documents))]

    def measure(self) -> list[list]:
        tokenizer = load_tokenizer(self.args.model_name_or_path)
        self.documents = evaluation_documents(self.args.data, tokenizer, self.args.eval_tokens,
                                              self.args.sequence_length)
        self.dense = torch_logits(self.args.model_name_or_path, self.documents)
        return [["", "bits asked for", "of a code", "with scales", "of the file", "bytes", "KL, searched",
                 "loaded by", "KL, loaded"]] + [
            self.row(format, target) for item in self.args.bits
            for format, _, targets in [item.partition("=")] for target in targets.split(",")]

    def divergence(self, logits: list[torch.Tensor]) -> float:
        """From the uncompressed model, nats a token."""
        pairs = [(p.double().log_softmax(-1), q.double().log_softmax(-1))
                 for p, q in zip(self.dense, logits, strict=True)]
        return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def searched_weights(database: Database, configuration: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": database.weight(name, level) for name, level in read_level_config(configuration).items()}


@torch.no_grad()
def torch_logits(folder: Path | str, documents: list[torch.Tensor], weights: dict | None = None) -> list[torch.Tensor]:
    """[length, vocabulary] of every document, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.load_state_dict(weights or {}, strict=False)
    return [model(document[None]).logits[0] for document in documents]


def mlx_logits(folder: Path, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Computed in float32, which holds what is in the file; in float16 a CPU takes forty times as long."""
    import mlx.core as mx
    from mlx_lm.utils import load_model
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return [torch.from_numpy(np.array(model(mx.array(document.numpy())[None])[0].astype(mx.float32)))
            for document in documents]


def llama_cpp_logits(folder: Path, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    import gguf
    [embedding] = [t for t in gguf.GGUFReader(folder / "model.gguf").tensors if t.name == "token_embd.weight"]
    runtime, vocabulary = LlamaCpp(folder / "model.gguf"), int(embedding.shape[1])
    return [torch.stack([runtime.logprobs(document[:end].tolist(), vocabulary, cache=True)
                         for end in range(1, len(document) + 1)]) for document in documents]


LOADED = {"compressed-tensors": torch_logits, "mlx": mlx_logits, "mlx-float16": mlx_logits, "gguf": llama_cpp_logits}


def main() -> None:
    args = parse_arguments()
    claim(args.out, args, ("model_name_or_path", "data", "calibration_tokens", "sequence_length", "levels",
                           "embedding_bitwidths", "eval_tokens"))
    torch.set_num_threads(1)
    table = format_table(Runtimes(args).measure())
    print(table)
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
