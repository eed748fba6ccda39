"""Checkpoints of several modalities: the text model that was searched goes back into the class that the checkpoint is
of, beside its vision or audio tower, or is taken out of it."""
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from formats.regroup import Regrouped
from utils.decoder import find_blocks
from utils.model import load_whole

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def is_wrapped(config) -> bool:
    """Whether a text model is only a part of what this configuration describes."""
    return config.get_text_config(decoder=True) is not config


def text_class(config) -> type[nn.Module] | None:
    """The class of the text model alone; None where transformers has none."""
    return AutoModelForCausalLM._model_mapping.get(type(config.get_text_config(decoder=True)), None)


def with_tower(regrouped: Regrouped, name: str | Path, config) -> Regrouped:
    """The same in the checkpoint's own class, with what the class of the searched model has no place for: the tower.
    `name`, `config`: of the checkpoint."""
    own = getattr(transformers, (config.architectures or [""])[0], None)
    if not is_wrapped(config) or own is None or isinstance(regrouped.model, own):
        return regrouped
    return _transplanted(regrouped, load_whole(own, name, regrouped.model.dtype).to(regrouped.model.device))


def copy_processors(name: str | Path, folder: Path, config) -> None:
    """What prepares images and sound goes along with a checkpoint, of configuration `config`, that has a tower. `name`:
    of the one it was made from."""
    for file in PROCESSORS if is_wrapped(config) else ():
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path:
            shutil.copy(path, folder / file)


def without_tower(regrouped: Regrouped) -> Regrouped:
    """The same as a text model, without its tower."""
    config = regrouped.model.config
    if not is_wrapped(config):
        return regrouped
    with torch.device("meta"):
        target = text_class(config)(config.get_text_config(decoder=True))
    return _transplanted(regrouped, target)


def _transplanted(regrouped: Regrouped, target: nn.Module) -> Regrouped:
    """`target` with the searched model's decoder and head in the place of its own."""
    model = regrouped.model
    body, _ = find_blocks(model)
    before, after = (next(name for name, module in whole.named_modules() if type(module) is type(body))
                     for whole in (model, target))       # get_decoder() of Llama 4 is the text model with its head
    target.set_submodule(after, body)
    target.set_output_embeddings(model.get_output_embeddings())
    text_config = model.config.get_text_config(decoder=True)
    if is_wrapped(target.config):
        target.config.text_config = text_config
    else:
        target.config = text_config
        target.config.tie_word_embeddings = model.config.tie_word_embeddings     # what counts is the outer one's
    target.generation_config = model.generation_config

    def renamed(names: Mapping[str, str] | set[str]) -> dict[str, str]:
        return {name: after + name.removeprefix(before) if name.startswith(f"{before}.") else name for name in names}

    present = target.state_dict()
    places = {name: new for name, new in renamed(regrouped.sources).items() if new in present}
    return replace(regrouped, model=target.eval(), sources={new: regrouped.sources[name] for name, new in
                                                            places.items()},
                   zeroed={places[name] for name in regrouped.zeroed})
