# What the scripts of this folder share; each is one table or figure of the paper. From the environment:
#   MODEL      one or several hub names or folders (default: the paper's models of that table)
#   OUT        where results go; the same command goes on where it was, and finished parts are not run again
#   DATA       calibration text (default: fineweb_edu)        EVAL_DATA  held-out text (default: the paper's three)
#   TASKS      lm-eval tasks, or nothing (default: the paper's five)
#   LEVELS     of the table, e.g. LEVELS="50 70" (default: the paper's)
#   SCALE=64   of every search the 64th part of the paper's tokens (token counts and generations divided by 8 each), of
#              databases the 64th part of the calibration text, of what is measured one by one the 8th; documents of
#              8,192 / 8 tokens, or of the model's context where that is shorter (default: 1, the paper)
#   ESTIMATE=1 print what it would take and stop
#   SMALL=1    the demo model, Python's own library as text and scaled-down counts, without network or GPU: the same
#              code path in minutes, a test of these scripts and no result of the paper
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${PYTHON:-}" ] || PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
SMALL=${SMALL:-} ESTIMATE=${ESTIMATE:-}

llama2=meta-llama/Llama-2-7b-hf
llama3=meta-llama/Meta-Llama-3-8B
llama31=meta-llama/Llama-3.1-8B
mistral=mistralai/Mistral-7B-v0.3
phi3=microsoft/Phi-3-medium-128k-instruct

if [ -z "$SMALL" ]; then
    SCALE=${SCALE:-1}
    # less NUMBER [LEAST]: NUMBER / √SCALE, rounded, at least LEAST
    less() { awk -v n="$1" -v least="${2:-1}" -v scale="$SCALE" \
        'BEGIN { n = int(n / sqrt(scale) + 0.5); print (n > least ? n : least) }'; }
    awk -v scale="$SCALE" 'BEGIN { exit !(scale >= 1 && scale <= 4096) }' ||
        { echo "SCALE=$SCALE: must be a number from 1, the paper's tokens, to 4096" >&2; exit 1; }
    OUT=${OUT:-results/tables}
    DATA=${DATA:-fineweb_edu}
    evaluation=(--eval_datasets ${EVAL_DATA:-wikitext2 c4 fineweb_edu})
    TASKS=${TASKS-arc_challenge,arc_easy,hellaswag,piqa,winogrande}
    tasks=(--tasks "$TASKS" --batch_size auto)
    length=() eval_length=()              # the paper's: the context length, at most 8,192; of Phi-3 4,096
    depth_search=(--calibration_tokens $(less 131072) --offspring 32 --initially_generated 64
                  --initial_tokens $(less 2048) --survivors_per_selection 2 1
                  --tokens_per_selection $(less 2048) $(less 32768))
    sparsity_search=(--calibration_tokens $(less 524288) --generations $(less 400) --offspring 64
                     --survivors_per_selection 8 2 1 --tokens_per_selection $(less 2048) $(less 16384) $(less 65536))
    quant_search=(--calibration_tokens $(less 524288) --generations $(less 150) --offspring 128 --initially_generated 32
                  --initial_tokens $(less 2048) --survivors_per_selection 16 4 1
                  --tokens_per_selection $(less 2048) $(less 16384) $(less 131072))
    superfast_search=(--calibration_tokens $(less 524288) --generations $(less 400) --offspring 16
                      --initially_generated 32 --initial_tokens $(less 2048) --survivors_per_selection 1 1
                      --tokens_per_selection $(less 512 2) $(less 8192))
    baseline=(--calibration_tokens $(less 131072))
    owl_grid=(--calibration_tokens $(less 524288))
    database=(--calibration_tokens $(awk -v scale="$SCALE" 'BEGIN { print int(8388608 / scale) }') --rel_damp 0.01
              --block_size 128 --cpu_offload_activations)
    singles=$(less 16384)                 # on which layers or blocks are measured one by one
    sets=$(less 8192)                     # on which every one of several thousand sets of blocks is measured
    [ "$SCALE" = 1 ] || evaluation+=(--eval_tokens $(less 524288))
else
    OUT=${OUT:-results/tables-small}
    DATA=${DATA:-stdlib}
    MODEL=${MODEL:-demo/model}
    evaluation=(--eval_datasets ${EVAL_DATA:-stdlib} --eval_tokens 4096)
    TASKS=${TASKS-next_line}
    tasks=(--tasks "$TASKS" --include_path "$OUT/small_task" --limit 16)
    length=(--calibration_sequence_length 256) eval_length=(--eval_sequence_length 256)
    singles=1024 sets=512
    SCALE=1
    depth_search=(--calibration_tokens 4096 --generations 6 --offspring 8 --initially_generated 8
                  --initial_tokens 256 --survivors_per_selection 2 1 --tokens_per_selection 256 1024)
    sparsity_search=(--calibration_tokens 4096 --generations 4 --offspring 8
                     --survivors_per_selection 4 2 1 --tokens_per_selection 256 512 1024)
    quant_search=(--calibration_tokens 4096 --generations 4 --offspring 8 --initially_generated 8
                  --initial_tokens 256 --survivors_per_selection 4 2 1 --tokens_per_selection 256 512 1024)
    superfast_search=(--calibration_tokens 4096 --generations 8 --offspring 4 --initially_generated 8
                      --initial_tokens 256 --survivors_per_selection 1 1 --tokens_per_selection 128 512)
    baseline=(--calibration_tokens 2048)
    owl_grid=(--calibration_tokens 2048 --owl_lambda 0.05 0.1 --owl_m 5)
    database=(--calibration_tokens 4096 --rel_damp 0.01 --block_size 128)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
fi
[ -n "$TASKS" ] || tasks=()
quant_levels=(--bitwidth_options 2 3 4 5 6 --calibration_bitwidth 3 --group_size 128 --perchannel)
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

# tables FUNCTION: what it takes for every model of $MODEL, then FUNCTION for every one. FUNCTION runs twice: the first
# time its parts are only written down, and scripts/estimate.py reads from them what they need.
tables() {
    local model plan PLANNING
    plan=$(mktemp)
    PLANNING=$plan
    for model in $MODEL; do
        begin "$model"
        : > "$plan"
        "$1"
        echo "== $model: what the parts that are not finished need"
        $PYTHON scripts/estimate.py "$plan"
    done
    rm "$plan"
    [ -z "$ESTIMATE" ] || exit 0
    PLANNING=
    [ -z "$SMALL" ] || [ -z "$TASKS" ] || part small_task scripts/small_task.py "$OUT/small_task"
    for model in $MODEL; do
        begin "$model"
        "$1"
    done
}

begin() {
    runs=$OUT/$(basename "$1")
    rows=()
    base=(--model_name_or_path "$1")
    if [ "$SCALE" != 1 ]; then            # of a model with a shorter context that
        local tokens
        tokens=$($PYTHON -c "
from transformers import AutoConfig
from utils.data import default_sequence_length
print(min($(less 8192 2), default_sequence_length(AutoConfig.from_pretrained('$1'))))")
        length=(--calibration_sequence_length "$tokens") eval_length=(--eval_sequence_length "$tokens")
    fi
    calibrated=("${base[@]}" --calibration_data "$DATA" "${length[@]}")
    case $(basename "$1") in              # a step of the paper's models; of others, as it relates to their layers
        Llama-2-7b-hf | Meta-Llama-3-8B | Llama-3.1-8B | Mistral-7B-v0.3 | Phi-3-medium-128k-instruct)
            sparse_levels=(--num_levels 8 --weights_diff 1000000) ;;
        *)  sparse_levels=(--num_levels $([ -n "$SMALL" ] && echo 2 || echo 8)) ;;
    esac
    mkdir -p "$runs"
}

# depth_generations LEVEL: the flag for the scaled part of the paper's k(n-k)/1.5, which is evo_drop.py's default
depth_generations() {
    [ "$SCALE" = 1 ] || echo --generations $(less "$($PYTHON -c "
from transformers import AutoConfig
blocks = AutoConfig.from_pretrained('${base[1]}').get_text_config(decoder=True).num_hidden_layers
dropped = int($1 / 100 * blocks)
print(dropped * (blocks - dropped) / 1.5)")")
}

# part NAME COMMAND...: run a Python program once; its output also goes to NAME.log. A finished part is known by
# NAME.done, which holds its command, so a part with other flags is not taken for it.
part() {
    local name=$1 file=$runs/$1
    shift
    if [ "$(cat "$file.done" 2>/dev/null)" = "$*" ]; then
        [ -n "$PLANNING" ] || echo "== $name: finished"
        return
    fi
    if [ -n "$PLANNING" ]; then
        printf '%q ' "$@" >> "$PLANNING"
        echo >> "$PLANNING"
        return
    fi
    echo "== $name"
    mkdir -p "$(dirname "$file")"
    $PYTHON "$@" 2>&1 | tee "$file.log"
    echo "$*" > "$file.done"
}

# measured TABLE LEVEL METHOD NAME FLAGS...: evaluate a configuration, and make it a row of the report; the first three
# are the key of the paper's figures in paper_tables.csv
measured() {
    local table=$1 level=$2 method=$3 name=eval${TASKS:+-tasks}/$4
    shift 4
    part "$name" eval_config.py "${base[@]}" "${evaluation[@]}" "${eval_length[@]}" "${tasks[@]}" "$@" \
        --output "$runs/$name.json"
    rows+=(--row "$table" "$level" "$method" "$runs/$name.json")
}

# the rows so far beside the paper's; fails where one is empty
report() {
    [ -n "$PLANNING" ] || $PYTHON scripts/report.py "${base[1]}" "${rows[@]}"
}

sparse_database() {                       # LEVEL, in percent
    part "databases/sparse-$1" -m database.sparsegpt "${calibrated[@]}" "${database[@]}" "${sparse_levels[@]}" \
        --sparsity "$(fraction "$1")" --save_dir "$runs/databases/sparse-$1"
}

quant_database() {
    part databases/quant -m database.gptq "${calibrated[@]}" "${database[@]}" "${quant_levels[@]}" \
        --save_dir "$runs/databases/quant"
}

# search_sparsity LEVEL METHOD NAME FLAGS...: search on the level's database and evaluate the result
search_sparsity() {
    local level=$1 method=$2 name=$3 folder=$runs/databases/sparse-$1
    shift 3
    part "$name" evo_unstructured.py "${calibrated[@]}" --sparse_weights_path "$folder" --no_eval \
        --configuration_name "$name.txt" --output_dir "$runs/$name" "$@"
    measured sparsity "$level" "$method" "$name" --sparse_weights_path "$folder" \
        --sparse_config_path "$runs/$name/$name.txt"
}

# search_bits LEVEL METHOD NAME FLAGS...: search at an average of LEVEL bits and evaluate the result
search_bits() {
    local level=$1 method=$2 name=$3 folder=$runs/databases/quant
    shift 3
    part "$name" evo_quant.py "${calibrated[@]}" --quant_weights_path "$folder" --target_bitwidth "$level" --no_eval \
        --configuration_name "$name.txt" --output_dir "$runs/$name" "$@"
    measured quant "$level" "$method" "$name" --quant_weights_path "$folder" --quant_config_path "$runs/$name/$name.txt"
}

fraction() { awk "BEGIN { print $1 / 100 }"; }

in_bits() { awk "BEGIN { exit !($1 < 10) }"; }   # in tables that have both, a level below 10 is bits, above percent
