"""Train the demo model: a 16-block Llama and its byte-level BPE tokenizer, on Python's own standard library.

Only the train side of the `stdlib` dataset is ever read (see utils/data.py), so every evaluation on `stdlib` is on
text the model has not seen. The committed model came from two legs on a busy two-core CPU, 7 million tokens in all:
  python demo/train.py --save_dir first        (stopped after 800 steps)
  python demo/train.py --init_from first --minutes 42 --learning_rate 2e-3 --seed 1
"""
import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.data import stdlib_texts

CONTEXT = 512


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every document starts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                             special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   model_max_length=CONTEXT)


def build_model(vocab_size: int, width: int = 1, blocks: int = 16) -> LlamaForCausalLM:
    """3.5 million weights; every size a multiple of 128, with `width` 2 of 256, so that quantization in groups, or in
    K-quants' blocks, takes it as it is."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=128 * width, intermediate_size=384 * width, num_hidden_layers=blocks,
        num_attention_heads=4 * width, num_key_value_heads=4 * width, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1, attention_bias=False,
        initializer_range=0.02))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--minutes", type=float, default=75, help="length of the schedule, wall-clock")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1, help="times the demo model's")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--init_from", help="folder of a model saved here, to train on with its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    texts = stdlib_texts("train", with_tests=True)
    rng.shuffle(texts)
    tokenizer = (PreTrainedTokenizerFast.from_pretrained(args.init_from) if args.init_from
                 else train_tokenizer(texts, args.vocab_size))
    tokens = torch.cat([torch.tensor(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
    model = build_model(len(tokenizer), args.width, args.blocks)
    if args.init_from:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init_from, dtype=torch.float32).state_dict())
    print(f"{len(texts)} files, {len(tokens):,} tokens, {sum(p.numel() for p in model.parameters()):,} weights",
          flush=True)

    # Muon for the layers' matrices: it needs fewer tokens than AdamW for the same loss
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    start, step, running = time.time(), 0, None
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        warmup = min(1.0, (step + 1) / 100)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        # short windows are cheaper in attention; the last quarter of the schedule sees the full context
        length = CONTEXT // 2 if progress < 0.75 else CONTEXT
        starts = torch.randint(len(tokens) - length, (args.batch_tokens // length,)).tolist()
        batch = torch.stack([tokens[s:s + length] for s in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            rate = step * args.batch_tokens / (time.time() - start)
            print(f"step {step}  {progress:.1%}  loss {running:.4f}  {rate:,.0f} tokens/s", flush=True)
        if step % 200 == 0:
            save(model, tokenizer, args.save_dir)
    save(model, tokenizer, args.save_dir)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, save_dir: str) -> None:
    """Half precision on disk; training goes on in float32."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(save_dir)
    tokenizer.save_pretrained(save_dir)


if __name__ == "__main__":
    main()
