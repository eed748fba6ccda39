#!/usr/bin/env bash
# Unstructured sparsity at 50, 60 and 70%: the search against uniform and OWL, all on SparseGPT weights.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$mistral $llama2 $llama3 $llama31 $phi3"}     # the paper has Phi-3 at 70% only
LEVELS=${LEVELS:-${SMALL:+50 70}}
LEVELS=${LEVELS:-50 60 70}

table() {
    local level
    measured sparsity 0 Dense dense
    for level in $LEVELS; do
        sparse_database "$level"
        part "owl-$level" -m baselines.owl "${calibrated[@]}" "${owl_grid[@]}" --select_by ppl \
            --sparse_weights_path "$runs/databases/sparse-$level" --save_dir "$runs/owl-$level"
        measured sparsity "$level" Uniform "sparse-$level-uniform" \
            --sparse_weights_path "$runs/databases/sparse-$level" --sparse_config_path 0
        measured sparsity "$level" OWL "sparse-$level-owl" \
            --sparse_weights_path "$runs/databases/sparse-$level" --sparse_config_path "$runs/owl-$level/owl.txt"
        search_sparsity "$level" EvoPress "sparse-$level" "${sparsity_search[@]}"
    done
    report
}

tables table
