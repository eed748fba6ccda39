#!/usr/bin/env bash
# Bitwidths at 2.25, 2.5, 3 and 4 bits, on GPTQ weights: the search against uniform, or the best of 32 random ones.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$mistral $llama2 $llama3 $llama31"}
LEVELS=${LEVELS:-${SMALL:+2.5 3}}
LEVELS=${LEVELS:-2.25 2.5 3 4}

table() {
    local level
    measured quant 0 Dense dense
    quant_database
    for level in $LEVELS; do
        case $level in
            *.*) # a search of no generations is its start, the best of the random allocations
                search_bits "$level" BestOf32 "bits-$level-random" "${quant_search[@]}" --generations 0 ;;
            *)
                measured quant "$level" Uniform "bits-$level-uniform" \
                    --quant_weights_path "$runs/databases/quant" --quant_config_path "$level" ;;
        esac
        search_bits "$level" EvoPress "bits-$level" "${quant_search[@]}"
    done
    report
}

tables table
