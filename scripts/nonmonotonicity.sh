#!/usr/bin/env bash
# Dropping more can lose less: of all sets of up to three blocks, A and B = A and one block more, such that dropping B
# has the smallest share of A's KL divergence. Found on calibration text, shown on held-out text.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-"$llama3 $llama2 $mistral"}
most=(--most $([ -n "$SMALL" ] && echo 2 || echo 3) --calibration_tokens "$sets")

table() {
    part nonmonotonicity scripts/nonmonotonicity.py "${calibrated[@]}" "${most[@]}" --save_dir "$runs/nonmonotonicity"
    measured depth 0 Dense dense
    measured depth fewer A nonmonotonicity-fewer --drop_config "$runs/nonmonotonicity/fewer.txt"
    measured depth more "A and one block" nonmonotonicity-more --drop_config "$runs/nonmonotonicity/more.txt"
    report
}

tables table
