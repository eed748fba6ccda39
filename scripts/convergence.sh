#!/usr/bin/env bash
# Does the search find the optimum? Six of sixteen pairs of consecutive blocks are dropped (8,008 ways for 32 blocks);
# every way is measured, and the best candidate of each generation is ranked among them.
TASKS=${TASKS-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-$llama3}
budget=(--sparsity 0.375)
all=(--brute_force_tokens "$sets")
[ -z "$SMALL" ] || all=(--brute_force_tokens 1024)

table() {
    part convergence-search evo_drop.py "${calibrated[@]}" "${depth_search[@]}" "${budget[@]}" --no_eval \
        --drop_entire_block --drop_two_consecutive --output_dir "$runs/convergence-search"
    part convergence scripts/convergence.py "${calibrated[@]}" "${depth_search[@]:0:2}" "${budget[@]}" "${all[@]}" \
        --search "$runs/convergence-search" --output "$runs/convergence.json"
    measured depth 0 Dense dense
    measured depth 37.5 "EvoPress(pairs of blocks)" convergence-search \
        --drop_config "$runs/convergence-search/layer_drop_config.txt"
    measured depth 37.5 "optimum by brute force" convergence-optimum --drop_config "$runs/convergence-optimum.txt"
    report
}

tables table
