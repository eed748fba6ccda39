#!/usr/bin/env bash
# Depth pruning at 12.5 to 50%: the search against ShortGPT, sliding-window cosine, weight subcloning, Shortened Llama.
TASKS=${TASKS-}                           # the paper's depth tables have perplexities only
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$mistral $llama2 $llama3 $llama31"}
LEVELS=${LEVELS:-${SMALL:+25 50}}
LEVELS=${LEVELS:-12.5 25 37.5 50}
declare -A scores=([ShortGPT]=cosine_similarity [CosineWindow]=window_cosine_similarity
                   [WeightSubcloning]=norm_ratio [ShortenedLlama]=perplexity)

table() {
    local shares level method name
    shares=$(for level in $LEVELS; do fraction "$level"; done)
    measured depth 0 Dense dense
    part drop_scores -m baselines.drop_scores "${calibrated[@]}" "${baseline[@]}" --scoring_method "${scores[@]}" \
        --sparsities $shares --save_dir "$runs/drop_scores"
    for level in $LEVELS; do
        for name in "" blocks; do
            part "drop-$level$name" evo_drop.py "${calibrated[@]}" "${depth_search[@]}" --no_eval \
                --sparsity "$(fraction "$level")" $(depth_generations "$level") ${name:+--drop_entire_block} \
                --output_dir "$runs/drop-$level$name"
            measured depth "$level" "EvoPress${name:+(attn+mlp)}" "drop-$level$name" \
                --drop_config "$runs/drop-$level$name/layer_drop_config.txt"
        done
        for method in ShortGPT CosineWindow WeightSubcloning ShortenedLlama; do
            measured depth "$level" "$method" "drop-$level-$method" \
                --drop_config "$runs/drop_scores/${scores[$method]}-$(fraction "$level").txt"
        done
    done
    report
}

tables table
