#!/usr/bin/env bash
# All three searches on the demo model, without network or GPU: databases, baselines, searches, their results finished,
# one table, three pictures.
# OUT is where results go; a finished part is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-results/demo}
MODEL=demo/model
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

model=(--model_name_or_path "$MODEL" --calibration_data stdlib --calibration_sequence_length 256)
evaluation=(--eval_datasets stdlib --eval_tokens 32768 --eval_sequence_length 256)
search=("${model[@]}" "${evaluation[@]}" --calibration_tokens 32768 --eval_every 0)

echo "== 1/9 depth: ShortGPT ranking, 4 of 16 blocks"
[ -e "$OUT/shortgpt.json" ] || {
    $PYTHON -m baselines.drop_scores "${model[@]}" --calibration_tokens 16384 --scoring_method cosine_similarity \
        --sparsities 0.25 --save_dir "$OUT/shortgpt"
    $PYTHON eval_config.py --model_name_or_path "$MODEL" "${evaluation[@]}" \
        --drop_config "$OUT/shortgpt/cosine_similarity-0.25.txt" --output "$OUT/shortgpt.json"
}
echo "== 2/9 depth: search, 4 of 16 attentions and 4 of 16 MLPs"
$PYTHON evo_drop.py "${search[@]}" --sparsity 0.25 --generations 14 --offspring 24 --survivors_per_selection 2 1 \
    --tokens_per_selection 1024 8192 --initial_tokens 1024 --output_dir "$OUT/drop"

echo "== 3/9 sparsity: database around 60%"
$PYTHON -m database.sparsegpt "${model[@]}" --calibration_tokens 32768 --sparsity 0.6 --num_levels 8 --weights_diff 1024 \
    --save_dir "$OUT/sparse_db"
echo "== 4/9 sparsity: search at 60%"
$PYTHON evo_unstructured.py "${search[@]}" --sparse_weights_path "$OUT/sparse_db" --generations 10 --offspring 24 \
    --survivors_per_selection 4 2 1 --tokens_per_selection 512 2048 4096 --output_dir "$OUT/sparse"

echo "== 5/9 bits: database of 2 to 6 bits"
$PYTHON -m database.gptq "${model[@]}" --calibration_tokens 32768 --bitwidth_options 2 3 4 5 6 --calibration_bitwidth 3 \
    --group_size 128 --perchannel --save_dir "$OUT/quant_db"
echo "== 6/9 bits: search at 2.5 bits"
$PYTHON evo_quant.py "${search[@]}" --quant_weights_path "$OUT/quant_db" --target_bitwidth 2.5 --generations 10 \
    --offspring 24 --survivors_per_selection 4 2 1 --tokens_per_selection 512 2048 4096 --output_dir "$OUT/quant"

finish() { # NAME, flags of the configuration: train it in its own mixture
    $PYTHON finish.py "${model[@]}" --calibration_tokens 131072 --batch_size 4 --steps 50 --save_dir "$OUT/$1_finished" \
        "${@:2}"
}
evaluate() { # NAME, flags
    [ -e "$OUT/$1_finished.json" ] || $PYTHON eval_config.py --model_name_or_path "$MODEL" "${evaluation[@]}" "${@:2}" \
        --output "$OUT/$1_finished.json"
}
echo "== 7/9 depth: finish what the search found"
finish drop --drop_config "$OUT/drop/layer_drop_config.txt"
evaluate drop --checkpoint "$OUT/drop_finished"
echo "== 8/9 sparsity: finish what the search found"
found=(--sparse_config_path "$OUT/sparse/final_configuration.txt")
finish sparse --sparse_weights_path "$OUT/sparse_db" "${found[@]}"
evaluate sparse --sparse_weights_path "$OUT/sparse_finished" "${found[@]}"
echo "== 9/9 bits: finish what the search found"
found=(--quant_config_path "$OUT/quant/evo-kl-configuration-2.5.txt")
finish quant --quant_weights_path "$OUT/quant_db" "${found[@]}"
evaluate quant --quant_weights_path "$OUT/quant_finished" "${found[@]}"

$PYTHON demo/table.py "$OUT"
