#!/usr/bin/env bash
# The paper's Super-Fast search, 16 offspring and 1@512 1@8192 for 400 generations, against the full one: at 70%
# sparsity and at 3 bits.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$llama31 $mistral"}
LEVELS=${LEVELS:-70 3}                    # below 10: bits

table() {
    local level
    for level in $LEVELS; do
        if in_bits "$level"; then
            quant_database
            search_bits "$level" EvoPress "bits-$level" "${quant_search[@]}"
            search_bits "$level" Super-Fast "bits-$level-superfast" "${superfast_search[@]}"
        else
            sparse_database "$level"
            search_sparsity "$level" EvoPress "sparse-$level" "${sparsity_search[@]}"
            search_sparsity "$level" Super-Fast "sparse-$level-superfast" "${superfast_search[@]}"
        fi
    done
    report
}

tables table
