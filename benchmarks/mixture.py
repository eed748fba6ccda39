"""Mixtures of experts: a small one, trained here, searched at 3 bits against uniform; a block of a large one, timed;
and how many tokens an expert needs.

    python benchmarks/mixture.py --out results/mixture --write_readme

The small one (Qwen3-MoE's class, 4 blocks of 8 experts of which a token takes 2, the demo's tokenizer and text) is
trained for --steps, and searched with --seeds on one database; all are evaluated on the same held-out text. The block
has the shapes of Qwen3-30B-A3B (hidden 2048, experts of 768), random weights and --experts of its 128, whose time and
memory are extrapolated: to 128 of them, and to its 48 blocks. Finished parts are not run again.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from benchmarks.programs import claim, run, write_readme
from database.gptq import quantize
from database.sparsegpt import prune
from utils.data import calibration_documents, stdlib_texts
from utils.model import load_decoder, load_tokenizer
from utils.report import format_table

CONTEXT = 256
BATCH, LENGTH = 8, 128           # rows of a training step, and their tokens
LEARNING_RATE = 4e-3
TARGET = 3                       # bits
SEARCH = ["--group_rule", "none", "--init", "measured", "--screen", 4, "--generations", 10, "--offspring", 16,
          "--tokens_per_selection", 512, 2048, 4096, "--survivors_per_selection", 4, 2, 1, "--initial_tokens", 1024]
LARGE = {"experts": 128, "blocks": 48, "hidden": 2048, "inside": 768}         # Qwen3-30B-A3B
FEW_LAYERS, FEW_TOKENS = ("up_proj", "down_proj"), (1 / 8, 1 / 2, 1, 2, 4, 16)
BLOCK_TOKENS = 8192              # with 8 of them a token, an expert sees half of these


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mixture"))
    parser.add_argument("--steps", type=int, default=1200, help="of training (default: 1200)")
    parser.add_argument("--seeds", type=int, default=5, help="of the search (default: 5)")
    parser.add_argument("--experts", type=int, default=16, help="in the large model's block (default: 16)")
    parser.add_argument("--write_readme", nargs="?", const="mixture", metavar="NAME",
                        help="put tables between the <!-- NAME --> marks of benchmarks/README.md (default: mixture)")
    return parser.parse_args()


def train(folder: Path, steps: int) -> None:
    """Train the small mixture on the demo's text, as demo/train.py trains the demo model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    tokens = torch.cat([torch.tensor(ids) for ids in tokenizer(stdlib_texts("train"), verbose=False)["input_ids"]])
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=CONTEXT,
        norm_topk_prob=True, router_aux_loss_coef=0.01, output_router_logits=True, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1))
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)]
    running = None
    for step in range(steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start:start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"training: step {step + 1} of {steps}, loss {running:.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def search(out: Path, seeds: int) -> str:
    """Table of the searches against uniform bits."""
    model = ["--model_name_or_path", out / "model", "--calibration_data", "stdlib", "--calibration_sequence_length",
             CONTEXT]
    evaluation = ["--eval_datasets", "stdlib", "--eval_tokens", 16384, "--eval_sequence_length", CONTEXT]
    weights = ["--quant_weights_path", out / "quant"]
    missing = [seed for seed in range(seeds) if not (out / f"seed-{seed}" / "summary.json").exists()]
    if missing:
        run(["-m", "database.gptq", *model, "--calibration_tokens", 32768, "--bitwidth_options", 2, 3, 4, 5, 6,
             "--calibration_bitwidth", TARGET, "--group_size", 64, "--perchannel", "--save_dir", weights[1]],
            out / "logs" / "quant.log")
    for seed in missing:
        run(["evo_quant.py", *model, *evaluation, "--calibration_tokens", 16384, "--eval_every", 0, *weights,
             "--target_bitwidth", TARGET, *SEARCH, "--seed", seed, "--output_dir", out / f"seed-{seed}",
             "--configuration_name", f"seed-{seed}.txt"], out / "logs" / f"seed-{seed}.log")
        print(f"search {seed + 1} of {seeds} done", flush=True)
    uniform = out / "uniform.json"
    if not uniform.exists():
        run(["eval_config.py", *model[:2], *evaluation, *weights, "--quant_config_path", TARGET, "--output", uniform],
            out / "logs" / "uniform.log")
    summaries = [json.loads((out / f"seed-{seed}" / "summary.json").read_text()) for seed in range(seeds)]
    measured = json.loads(uniform.read_text())
    found = [summary["evaluation"]["search"]["stdlib"] for summary in summaries]
    base, dense = (measured[name]["stdlib"] for name in ("compressed", "dense"))
    table = format_table([
        ["3 bits, small mixture", "KL, held out", "range", "perplexity"],
        ["dense", 0.0, None, dense["ppl"]],
        ["uniform", base["kl"], None, base["ppl"]],
        [f"search, median of {seeds} seeds", statistics.median(value["kl"] for value in found),
         f"{min(value['kl'] for value in found):.4f}–{max(value['kl'] for value in found):.4f}",
         statistics.median(value["ppl"] for value in found)]])
    better = sum(value["kl"] < base["kl"] for value in found)
    return (f"{table}\n\nThe search is below uniform in {better} of {seeds} seeds. Whole model: "
            f"{summaries[0]['whole_model']}.")


def block(out: Path, experts: int) -> str:
    """Table of what a block's database takes, on one thread of a CPU."""
    folder, result = out / f"block-{experts}", out / f"block-{experts}.json"
    if not result.exists():
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=LARGE["hidden"], moe_intermediate_size=LARGE["inside"],
            num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=experts,
            num_experts_per_tok=8)).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        command = [sys.executable, "-m", "database.gptq", "--model_name_or_path", folder, "--calibration_data",
                   "stdlib", "--calibration_tokens", BLOCK_TOKENS, "--calibration_sequence_length", 512,
                   "--microbatch_tokens", 2048, "--group_size", 128, "--perchannel",
                   "--save_dir", out / f"block-{experts}-database"]
        done = subprocess.run([sys.executable, "-c", _MEASURE, *map(str, command)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))
        if done.returncode:
            raise SystemExit(done.stdout)
        measured = json.loads(done.stdout.splitlines()[-1])
        files = [file.stat().st_size for file in (out / f"block-{experts}-database").glob("*experts*.safetensors")]
        result.write_text(json.dumps({"disk": sum(files), **measured}))
    found, scale = json.loads(result.read_text()), LARGE["experts"] / experts
    hessians = 2 * 4 * (LARGE["hidden"]**2 + LARGE["inside"]**2) * LARGE["experts"]
    return format_table([
        ["Qwen3-30B-A3B's block, five bitwidths, one CPU thread", f"{experts} experts, measured", "128 experts",
         "48 blocks"],
        ["CPU time of the build, minutes", found["cpu"] / 60, found["cpu"] * scale / 60,
         found["cpu"] * scale * LARGE["blocks"] / 60],
        ["memory of Hessians, GB", hessians / scale / 1e9, hessians / 1e9, hessians / 1e9],
        ["peak memory of the process, GB", found["peak"] / 1e9, None, None],
        ["experts' levels on disk, GB", found["disk"] / 1e9, found["disk"] * scale / 1e9,
         found["disk"] * scale * LARGE["blocks"] / 1e9]])


@torch.no_grad()
def few_tokens() -> str:
    """Table of a layer's relative error on other tokens, over the number of tokens that its Hessian is from."""
    decoder = load_decoder(str(ROOT / "demo" / "model"), "float32", "cpu")
    documents = calibration_documents("stdlib", load_tokenizer(str(ROOT / "demo" / "model")), 16384, CONTEXT)
    ways = [f"{layer}, {way}" for layer in FEW_LAYERS for way in ("GPTQ 3 bits", "SparseGPT 50%")]
    rows: list[list] = [["tokens an input", *ways]]
    rows += [[label] for label in ("nearest, by magnitude", *map("{:g}".format, FEW_TOKENS))]
    for name in FEW_LAYERS:
        layer, inputs = decoder.layers[f"model.layers.5.mlp.{name}"], []
        hook = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0][0]))
        for document in documents:
            decoder.model(input_ids=document[None], use_cache=False)
        hook.remove()
        x = torch.cat(inputs)[torch.randperm(16384, generator=torch.Generator().manual_seed(0))]
        weight, others = layer.weight.data, x[8192:]
        seen = [x[:int(tokens * x.shape[1])] for tokens in FEW_TOKENS]
        for row, hessian in zip(rows[1:], [torch.eye(x.shape[1]), *(part.T @ part / len(part) for part in seen)]):
            for level in (quantize(weight, hessian, [3], 128)[1], prune(weight, hessian, [weight.numel() // 2])[0]):
                row.append(float(((level.T - weight) @ others.T).square().sum() / (weight @ others.T).square().sum()))
    return format_table(rows)


_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"peak": 1024 * usage.ru_maxrss, "cpu": usage.ru_utime + usage.ru_stime}))
sys.exit(code)
"""


def main() -> None:
    args = parse_arguments()
    out = args.out.resolve()
    claim(out, args, ("steps",))
    if not (out / "model" / "config.json").exists():
        train(out / "model", args.steps)
    tables = f"{search(out, args.seeds)}\n\n{block(out, args.experts)}\n\n{few_tokens()}"
    print(tables)
    if args.write_readme:
        write_readme(args.write_readme, tables)


if __name__ == "__main__":
    main()
