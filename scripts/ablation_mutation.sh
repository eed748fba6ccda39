#!/usr/bin/env bash
# The number of level switches of an offspring, at 70% sparsity: min(U1, U2), or always 1, 3 or 7.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-$llama31}
LEVELS=${LEVELS:-70}

table() {
    local level switches
    for level in $LEVELS; do
        sparse_database "$level"
        search_sparsity "$level" EvoPress "sparse-$level" "${sparsity_search[@]}"
        for switches in 1 3 7; do
            search_sparsity "$level" "always $switches" "sparse-$level-switches-$switches" "${sparsity_search[@]}" \
                --fixed_mutations $switches
        done
    done
    report
}

tables table
