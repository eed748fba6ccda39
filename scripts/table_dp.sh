#!/usr/bin/env bash
# The search against dynamic programming, which takes the errors of layers to add up: those of their outputs, or the
# model's KL divergence with one layer at a time compressed. At 70% sparsity and at 2.5 bits.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$llama31 $mistral"}
LEVELS=${LEVELS:-70 2.5}                  # below 10: bits
single_layers=(--errors kl --calibration_tokens "$singles")

table() {
    local level errors kind table weights budget grid
    for level in $LEVELS; do
        if in_bits "$level"; then
            kind=quant table=quant weights=$runs/databases/quant budget=(--target_bitwidth "$level") grid=(2 3 4 6)
            quant_database
        else
            kind=sparse table=sparsity weights=$runs/databases/sparse-$level budget=() grid=(-8 -4 0 4 8)
            sparse_database "$level"
        fi
        part "dp-$level" -m baselines.dp "${base[@]}" --${kind}_weights_path "$weights" "${budget[@]}" \
            --save_dir "$runs/dp-$level/manifest"
        part "dp-kl-$level" -m baselines.dp "${calibrated[@]}" --${kind}_weights_path "$weights" "${budget[@]}" \
            "${single_layers[@]}" --measured_levels "${grid[@]}" --save_dir "$runs/dp-$level/kl"
        for errors in manifest kl; do
            measured $table "$level" "DP($errors errors)" "dp-$level-$errors" --${kind}_weights_path "$weights" \
                --${kind}_config_path "$(echo "$runs/dp-$level/$errors"/dp-*.txt)"
        done
        if in_bits "$level"; then
            search_bits "$level" EvoPress "bits-$level" "${quant_search[@]}"
        else
            search_sparsity "$level" EvoPress "sparse-$level" "${sparsity_search[@]}"
        fi
    done
    report
}

tables table
