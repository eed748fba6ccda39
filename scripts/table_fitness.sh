#!/usr/bin/env bash
# What the search minimises, at 3 bits: KL divergence, perplexity, or KL over the 10 largest logits.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$llama3 $llama2 $mistral"}
LEVELS=${LEVELS:-3}

table() {
    local level
    quant_database
    for level in $LEVELS; do
        search_bits "$level" EvoPress "bits-$level" "${quant_search[@]}"
        search_bits "$level" "EvoPress(PPL)" "bits-$level-ppl" "${quant_search[@]}" --fitness_fn ppl
        search_bits "$level" "EvoPress(sparse KL)" "bits-$level-sparse_kl" "${quant_search[@]}" --fitness_fn sparse_kl
    done
    report
}

tables table
