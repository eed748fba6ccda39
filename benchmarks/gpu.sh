#!/usr/bin/env bash
# Everything that a GPU has to show, without network or hub: parts of at most eight minutes, the most valuable first.
#     bash benchmarks/gpu.sh               all parts that are not finished, then the tables
#     bash benchmarks/gpu.sh --report      the tables of what is finished, into README.md and benchmarks/README.md
#     TINY=1 bash benchmarks/gpu.sh        the same parts on a CPU, in one process of two minutes: they work, that is all
# OUT is where results go, a JSON file a part. A part that fails does not stop the next; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
tiny=${TINY:+--tiny}
OUT=${OUT:-results/gpu${TINY:+-tiny}}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

[ "${1:-}" != --report ] || exec $PYTHON benchmarks/gpu.py --write_readme --out "$OUT"

run() {      # parts, in a process
    timeout --kill-after=10 $((480 * $#)) $PYTHON benchmarks/gpu.py "$@" --out "$OUT" $tiny 2>&1 | tee "$OUT/$1.log" || failed=1
}
failed=
parts=()
for part in $($PYTHON benchmarks/gpu.py --list); do
    if [ -e "$OUT/$part.json" ]; then echo "== $part: finished"; else parts+=("$part"); fi
done
if [ -z "$tiny" ]; then
    for part in "${parts[@]}"; do run "$part"; done
elif [ ${#parts[@]} -gt 0 ]; then
    run "${parts[@]}"
fi
$PYTHON benchmarks/gpu.py --report --out "$OUT" || failed=1
[ -z "$failed" ] || { echo "what has failed is run again, alone, by the same command"; exit 1; }
