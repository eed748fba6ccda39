"""What the baselines start from: calibration tokens and the model."""
import argparse

import torch

from utils.data import calibration_documents, check_dataset, sequence_length
from utils.decoder import Decoder
from utils.model import load_decoder, load_tokenizer


def check_calibration_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for model and calibration flags that no model and no data could satisfy."""
    for flag, least in (("calibration_tokens", 2), ("calibration_sequence_length", 2), ("microbatch_tokens", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} {value}: must be at least {least}")
    check_dataset(args.calibration_data, "--calibration_data")


def load_inputs(args: argparse.Namespace, config) -> tuple[Decoder, list[torch.Tensor]]:
    """The model, and its calibration documents, int64 [length] each. Raises ValueError naming the flag at fault."""
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path, args.use_fast_tokenizer,
                               args.trust_remote_code)
    documents = calibration_documents(args.calibration_data, tokenizer, args.calibration_tokens,
                                      sequence_length(args.calibration_sequence_length, config,
                                                      "--calibration_sequence_length"), args.seed)
    decoder = load_decoder(args.model_name_or_path, args.dtype, args.device, args.attn_implementation,
                           args.trust_remote_code)
    return decoder, documents
