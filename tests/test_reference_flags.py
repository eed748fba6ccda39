"""Command lines of the paper's implementation run here: its seven programs' flags parse, with the values given."""
import pytest

import evo_drop
import evo_quant
import evo_unstructured
from baselines import drop_scores, owl
from database import gptq, sparsegpt

MODEL = "--model_name_or_path meta-llama/Meta-Llama-3-8B --tokenizer_name meta-llama/Meta-Llama-3-8B --dtype float16"
CALIBRATION = "--calibration_data fineweb_edu --calibration_tokens 524288 --calibration_sequence_length 8192 --seed 0"
EVALUATION = "--eval_datasets fineweb_edu wikitext2 c4 --eval_every 5 --eval_tokens 524288 --eval_sequence_length 8192"
SEARCH = (f"{MODEL} --use_fast_tokenizer --attn_implementation flash_attention_2 {CALIBRATION} {EVALUATION} "
          f"--log_wandb --fitness_fn kl --generations 150 --offspring 128 --survivors_per_selection 16 4 1 "
          f"--tokens_per_selection 2048 16384 131072 ")
DATABASE = (f"{MODEL} --attn_implementation flash_attention_2 {CALIBRATION} --rel_damp 1e-2 --block_size 128 "
            f"--save_dir db --low_cpu_mem_usage --cpu_offload_modules --cpu_offload_activations --verbose --log_wandb "
            f"--pre_block_modules model.embed_tokens --block_modules model.layers "
            f"--post_block_modules model.norm lm_head ")
LAYERS = ".*layers.*((q|k|v|o|gate|up|down)_proj)$"
COMMANDS = {
    "evo_drop": (evo_drop.parse_arguments, SEARCH + (
        "--sparsity 0.25 --population_size 1 --initially_generated 64 --initial_tokens 2048 --max_mutations 3 "
        "--legal_to_drop_path legal.txt --drop_entire_block --drop_two_consecutive --invert_fitness --no_eval "
        "--drop_config_dir configs --save_dir model")),
    "evo_unstructured": (evo_unstructured.parse_arguments, SEARCH + (
        "--sparse_weights_path db --max_level 8 --max_total_deviation 9999 "
        "--configuration_name final_configuration.txt")),
    "evo_quant": (evo_quant.parse_arguments, SEARCH.replace("kl", "sparse_kl") + (
        "--quant_weights_path db --target_bitwidth 3 --group_rule size --step_size 1 --kl_topk 10 "
        "--initially_generated 128 --initial_tokens 2048")),
    "sparsegpt": (sparsegpt.make_parser().parse_args, DATABASE + (
        f"--prunable_modules {LAYERS} --sparsity 0.5 --num_levels 8 --weights_diff 1000000")),
    "gptq": (gptq.make_parser().parse_args, DATABASE + (
        f"--quantizable_modules {LAYERS} --bitwidth_options 2 3 4 5 6 --calibration_bitwidth 3 --group_size 128 "
        f"--perchannel --sym --act_order")),
    "drop_scores": (drop_scores.parse_arguments, f"{MODEL} {CALIBRATION} --save_dir configs " + (
        "--sparsities 0.125 0.25 0.375 0.5 --scoring_method cosine_similarity window_cosine_similarity norm_ratio "
        "perplexity kl_div l2 l2_normalized")),
    "owl": (owl.parse_arguments, f"{MODEL} {CALIBRATION} --save_dir configs " + (
        "--sparse_weights_path db --owl_lambda 0.02 0.05 0.08 0.1 0.2 --owl_m 3 5 7 10")),
}


@pytest.mark.parametrize("program", COMMANDS)
def test_every_flag_of_the_reference_parses(program):
    parse, line = COMMANDS[program]
    given: dict[str, list[str]] = {}
    for word in line.split():
        if word.startswith("--"):
            given[word.removeprefix("--")] = []
        else:
            given[list(given)[-1]].append(word)
    parsed = vars(parse(line.split()))
    for flag, values in given.items():
        found = parsed[flag]
        if not values:
            assert found is True
        else:
            found = found if isinstance(found, list) else [found]
            assert found == [type(value)(word) for value, word in zip(found, values, strict=True)]
