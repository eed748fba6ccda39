#!/usr/bin/env bash
# Unstructured sparsity at 50, 60 and 70%: the search against uniform and OWL, all on SparseGPT weights.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$mistral $llama2 $llama3 $llama31 $phi3"}
LEVELS=${LEVELS:-${SMALL:+50 70}}

table() {
    local level levels=${LEVELS:-50 60 70}
    [ -n "$LEVELS" ] || [ "${base[1]}" != "$phi3" ] || levels=70    # all that the paper has of it
    measured sparsity 0 Dense dense
    for level in $levels; do
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
