"""Perplexity, and KL divergence from the uncompressed model, on held-out text."""
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from utils.data import evaluation_documents
from utils.decoder import Decoder
from utils.fitness import Candidate, Fitness


def load_evaluation_documents(names: list[str], tokenizer, num_tokens: int, sequence_length: int,
                              every: int = 0, text_field: str = "text") -> dict[str, list[torch.Tensor]]:
    """Documents of each dataset, by its name; prints how many tokens there are of each, and that they are evaluated
    every so many generations. `text_field`: of local rows."""
    documents = {}
    for name in names:
        documents[name] = evaluation_documents(name, tokenizer, num_tokens, sequence_length, text_field)
        print(f"evaluation on {name}: {sum(map(len, documents[name])):,} tokens (of at most {num_tokens:,}) in "
              f"{len(documents[name])} documents", flush=True)
    if every:
        print(f"all of it {'in every generation' if every == 1 else f'every {every} generations'}; --eval_every 0 is "
              f"faster and leaves it to the end", flush=True)
    return documents


class Evaluation:
    """Held-out datasets with the uncompressed model's hidden states, kept so that candidates can be compared to it
    after its weights have been replaced. Create it while the model is uncompressed."""

    def __init__(self, decoder: Decoder, documents: dict[str, list[torch.Tensor]],
                 set_block: Callable[[int, Hashable], None], microbatch_tokens: int | None = None,
                 sizes: Mapping[str, Sequence[int]] | None = None):
        """`sizes`, of a run that is resumed: its `sizes`."""
        self.decoder = decoder
        self.sets = {name: Fitness(decoder, texts, set_block, microbatch_tokens=microbatch_tokens,
                                   progress=f"uncompressed model on {name}", sizes=(sizes or {}).get(name))
                     for name, texts in documents.items()}
        self.dense = {name: {"ppl": fitness.teacher_perplexity(), "kl": 0.0} for name, fitness in self.sets.items()}

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Each dataset's `Fitness.sizes`."""
        return {name: fitness.sizes for name, fitness in self.sets.items()}

    def __call__(self, candidate: Candidate) -> dict[str, dict[str, float]]:
        """{dataset: {"ppl": perplexity, "kl": nats a token}} of one candidate."""
        results = {}
        for name, fitness in self.sets.items():
            perplexity, divergence = fitness.measure([candidate], kinds=("ppl", "kl"))[0]
            results[name] = {"ppl": perplexity, "kl": divergence}
        return results

    def of(self, other: Decoder) -> dict[str, dict[str, float]]:
        """The same of another model as it is, while this one is uncompressed. Raises ValueError where its vocabulary is
        not of the same size."""
        sizes = [decoder.config.get_text_config(decoder=True).vocab_size for decoder in (self.decoder, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"its vocabulary has {sizes[1]} words and the model's {sizes[0]}; give a checkpoint that "
                             f"was made from this model")
        results = {}
        for name, fitness in self.sets.items():
            own = Fitness(other, fitness.documents, fitness.set_block, microbatch_tokens=fitness.microbatch_tokens)
            results[name] = {"ppl": own.teacher_perplexity(), "kl": fitness.divergence_of(own)}
        return results
