"""What a depth export is worth: blocks left by regrouping and by zeroing, and tokens/s dense, skipping and exported.

    python benchmarks/export.py --model_name_or_path MODEL --sparsity 0.25 0.5

Skipping is the model as it is searched: dropped attentions and MLPs return zeros, their blocks' norms still run.
Exported is the folder that export.py wrote, loaded by plain transformers. Configurations are random; rounds of the
three alternate, so that other load on the machine meets all of them, and medians are reported. With one thread on a
CPU, seconds are the process's own.
"""
import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path[0] = str(Path(__file__).resolve().parents[1])      # and not benchmarks/, which has a database.py of its own
import export
from formats.regroup import own_pairs, pair_up
from utils.configs import write_drop_config
from utils.decoder import Decoder
from utils.model import load_decoder
from utils.report import format_table


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="demo/model")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5], help="share of each type to drop")
    parser.add_argument("--configurations", type=int, default=1000, help="random ones whose blocks are counted")
    parser.add_argument("--prompt_tokens", type=int, default=256, help="of a prefill")
    parser.add_argument("--new_tokens", type=int, default=64, help="generated one by one, with a KV cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", help="of all three models")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def random_configuration(num_blocks: int, sparsity: float, rng: random.Random) -> list[tuple[bool, bool]]:
    """⌊sparsity · blocks⌋ attentions and as many MLPs dropped, as the depth search does."""
    count = int(sparsity * num_blocks + 1e-9)
    attn, mlp = (set(rng.sample(range(num_blocks), count)) for _ in range(2))
    return [(index in attn, index in mlp) for index in range(num_blocks)]


def skip(decoder: Decoder, dropped: list[tuple[bool, bool]]) -> torch.nn.Module:
    """The searched model: its dropped sub-blocks return zeros."""
    for block, state in zip(decoder.blocks, dropped):
        block.drop(*state)
    return decoder.model


@torch.no_grad()
def speeds(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens/s of one prefill of `prompt` [1, length], and of generating `new_tokens` after it."""
    def clock() -> float:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()               # without what other processes take of the core
        return time.perf_counter()

    began = clock()
    output = model(input_ids=prompt, use_cache=True)
    filled = clock()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    ended = clock()
    return prompt.shape[1] / (filled - began), new_tokens / (ended - filled)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    decoder = load_decoder(args.model_name_or_path, args.dtype, args.device)
    num_blocks, vocabulary = len(decoder.blocks), decoder.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(args.seed)).to(
        decoder.device)

    blocks = [["sparsity", "blocks, dense", "zeroing, mean", "exported, mean", "exported fewer", "exported more"]]
    rates = [["", "blocks", "prefill tokens/s", "of dense", "generation tokens/s", "of dense"]]
    for sparsity in args.sparsity:
        drawn = [random_configuration(num_blocks, sparsity, rng) for _ in range(args.configurations)]
        counts = [(len(own_pairs(dropped, remove=True)), len(pair_up(dropped))) for dropped in drawn]
        zeroing, exported = zip(*counts)
        blocks.append([f"{sparsity:.1%}", str(num_blocks), statistics.mean(zeroing), statistics.mean(exported),
                       f"{sum(new < old for old, new in counts) / len(counts):.1%}",
                       f"{sum(new > old for old, new in counts) / len(counts):.1%}"])
        dropped = drawn[0]
        with tempfile.TemporaryDirectory() as folder:
            write_drop_config(f"{folder}/drop.txt", dropped)
            export.main(["--model_name_or_path", args.model_name_or_path, "--drop_config", f"{folder}/drop.txt",
                         "--save_dir", f"{folder}/exported", "--dtype", args.dtype, "--device", str(decoder.device)])
            models = {"dense": load_decoder(args.model_name_or_path, args.dtype, args.device).model,
                      "skipping": skip(load_decoder(args.model_name_or_path, args.dtype, args.device), dropped),
                      "exported": AutoModelForCausalLM.from_pretrained(f"{folder}/exported").to(decoder.device).eval()}
        measured = {name: [] for name in models}
        for turn in range(args.rounds + 1):
            for name, model in models.items():
                result = speeds(model, prompt, args.new_tokens)
                if turn:                             # the first round warms up
                    measured[name].append(result)
        medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in measured.items()}
        for name, (prefill, generation) in medians.items():
            size = models[name].config.get_text_config(decoder=True).num_hidden_layers
            rates.append([f"{sparsity:.1%} dropped, {name}", str(size), f"{prefill:,.0f}",
                          f"{prefill / medians['dense'][0]:.2f}x", f"{generation:,.1f}",
                          f"{generation / medians['dense'][1]:.2f}x"])
    print(f"\n{args.configurations} random configurations a sparsity, blocks that are left:\n{format_table(blocks)}")
    print(f"\n{args.model_name_or_path}, {args.dtype} on {decoder.device.type}, {args.threads} thread(s), prompt of "
          f"{args.prompt_tokens}, {args.new_tokens} generated, median of {args.rounds}:\n{format_table(rates)}")


if __name__ == "__main__":
    main()
