#!/usr/bin/env bash
# Everything that a GPU has to show, without network or hub: parts of at most eight minutes, the most valuable first.
#     bash benchmarks/gpu.sh               all parts that are not finished, then the tables
#     bash benchmarks/gpu.sh --report      the tables of what is finished, into README.md and benchmarks/README.md
#     TINY=1 bash benchmarks/gpu.sh        the same parts on a CPU, in some three minutes: they work, and mean nothing
# OUT is where results go, a JSON file a part. A part that fails does not stop the next; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
tiny=${TINY:+--tiny}
OUT=${OUT:-results/gpu${TINY:+-tiny}}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

[ "${1:-}" != --report ] || exec $PYTHON benchmarks/gpu.py --write_readme --out "$OUT"

failed=()
for part in $($PYTHON benchmarks/gpu.py --list); do
    if [ -e "$OUT/$part.json" ]; then
        echo "== $part: finished"
        continue
    fi
    echo "== $part"
    timeout --kill-after=10 480 $PYTHON benchmarks/gpu.py "$part" --out "$OUT" $tiny 2>&1 | tee "$OUT/$part.log" \
        || failed+=("$part")
done
$PYTHON benchmarks/gpu.py --report --out "$OUT" || failed+=(report)
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}; run the same command again for these parts alone"; exit 1; }
