"""What every program starts from, as its flags name it: the tokenizer, calibration documents, the model."""
import argparse

import torch

from utils.data import calibration_documents, sequence_length
from utils.decoder import Decoder
from utils.model import load_decoder, load_tokenizer


def tokenizer_of(args: argparse.Namespace):
    """The tokenizer; raises ValueError naming the flag at fault, as the others here do."""
    return load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.use_fast_tokenizer,
                          args.trust_remote_code)


def documents_of(args: argparse.Namespace, config, tokenizer) -> list[torch.Tensor]:
    """The calibration documents, int64 [length] each, of exactly --calibration_tokens in all."""
    length = sequence_length(args.calibration_sequence_length, config, "--calibration_sequence_length")
    return calibration_documents(args.calibration_data, tokenizer, args.calibration_tokens, length, args.seed,
                                 text_field=args.text_field)


def decoder_of(args: argparse.Namespace) -> Decoder:
    """The model; offloaded and compiled where the program has flags for that and they are given."""
    return load_decoder(args.model_name_or_path, args.dtype, args.device, args.attn_implementation,
                        args.trust_remote_code, getattr(args, "cpu_offload_modules", False),
                        getattr(args, "compile", False))
