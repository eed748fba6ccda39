"""A search under way: all of a run that is not about its task. What a candidate means, how new ones are made and which
of them survive is left to the script; here it is a tuple that tells candidates apart.

    search = Search("evo_quant", args, config, defaults)      the run's folder, resumed where an earlier one left off
    search.load()                                             calibration and evaluation text, the model
    search.prepare(set_block, states, ...)                    what measures and evaluates candidates
    search.begin(ranked)                                      generation 0, unless search.resumed
    for generation in search.generations():
        values = search.measure(offspring, search.draw(tokens))
        survivors = search.confirm(survivors)                 with --confirm_tokens
        search.record(survivors)                              log, checkpoint, progress
    search.evaluate(...)
    search.finish(...)                                        picture and summary
"""
import argparse
import math
import random
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np

from utils import distributed
from utils.data import check_minibatches, documents_sha256, draw_minibatch, sequence_length
from utils.errors import RunError
from utils.evaluation import Evaluation, load_evaluation_documents
from utils.fitness import Fitness, Row, mean_of
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.interactions import gram_matrix
from utils.measurements import Candidate, Measurements
from utils.model import default_device, weights_fingerprint
from utils.report import evaluation_rows, format_table, plot_search
from utils.runs import Run, default_folder, open_wandb, rng_state, set_rng_state

CURVE_SHARE = 4              # parents are compared on this fraction of the last selection step's tokens
Ranked = list[tuple[float, Candidate]]       # (fitness, candidate), best first


class Search:
    """The state of a run: its random numbers, the tokens it has spent, its parents, and what measures candidates."""

    def __init__(self, task: str, args: argparse.Namespace, config, defaults: dict):
        """config: of the model; defaults: the flags', for a run begun before there were some of them. Raises ValueError
        when the folder cannot be written, is damaged, or holds a run with other flags."""
        self.task, self.args, self.config = task, args, config
        self.run = Run(args.output_dir or default_folder(task, vars(args)), vars(args), defaults=defaults)
        self.saved = self.run.state or {}            # what the last checkpoint of an earlier run has
        self.resumed = bool(self.saved)
        self.rng = random.Random(args.seed)
        self.parents: list[Candidate] = []           # best first
        self.tokens = 0                              # of all candidates together
        self.curve: list[tuple[int, float]] = []     # (tokens, fitness of the new best parent on the same documents)
        self.evaluations: dict[str, dict] = {}       # whose -> dataset -> perplexity and KL divergence

    def earlier_summary(self, **checksums: str) -> dict:
        """What a finished run of the same command has found; says so. checksums: as `load` takes them; calibration text
        is not read for it."""
        self.run.check_inputs(**checksums, **self._model_checksum())
        print(f"{self.run.folder}: this search is finished; raise --generations to go on, or give another --output_dir")
        return self.run.summary()

    def _model_checksum(self) -> dict[str, str]:
        fingerprint = weights_fingerprint(self.args.model_name_or_path)
        return {"model_name_or_path": fingerprint} if fingerprint else {}

    def load(self, **checksums: str) -> None:
        """Load calibration and evaluation text and, last, the model. checksums: flag -> of what else the run reads.

        Raises ValueError naming the flag at fault, and RunError where a resumed run was begun on something else.
        """
        args = self.args
        default_device(args.device)              # raises for one that there is not, before text is read
        self.wandb = open_wandb(args.log_wandb, vars(args))
        self.tokenizer = tokenizer_of(args)
        self.documents = documents_of(args, self.config, self.tokenizer)
        check_minibatches(self.documents, [args.initial_tokens, *args.tokens_per_selection, args.confirm_tokens or 2])
        self.run.check_inputs(calibration_data=documents_sha256(self.documents), **checksums, **self._model_checksum())
        self.evaluation_sets = {} if args.no_eval else load_evaluation_documents(
            args.eval_datasets, self.tokenizer, args.eval_tokens,
            sequence_length(args.eval_sequence_length, self.config, "--eval_sequence_length"), args.eval_every,
            args.text_field)
        self.decoder = decoder_of(args)

    def prepare(self, set_block: Callable[[int, Hashable], None], states: Callable[[Candidate], Sequence[Hashable]],
                logged: Callable[[Candidate], dict], divergences: bool = False) -> None:
        """Run the uncompressed model over all texts, and take up the run that is resumed.

        set_block(i, state) puts block i into a state; states(candidate): of every block; logged(candidate): what the
        log has of the best one; divergences: KL divergences are measured even if they are not the fitness.
        """
        args, sizes = self.args, self.saved.get("microbatch_tokens", {})
        self.states, self.logged = states, logged
        self.evaluation = Evaluation(self.decoder, self.evaluation_sets, set_block, args.microbatch_tokens,
                                     sizes.get("evaluation"))
        self.fitness = Fitness(self.decoder, self.documents, set_block, args.fitness_fn != "ppl" or divergences,
                               getattr(args, "kl_topk", 0), args.microbatch_tokens,
                               progress="uncompressed model on calibration data", sizes=sizes.get("fitness"))
        self.measurements = Measurements(self.fitness, states, args.fitness_fn, not args.no_reuse)
        self._shared = draw_minibatch(self.documents, args.confirm_tokens or max(
            2, args.tokens_per_selection[-1] // CURVE_SHARE // 2 * 2), random.Random(args.seed))
        self._confirmed: dict[Candidate, float] = {}     # parents' fitness there, with --confirm_tokens
        if self.resumed:
            saved = self.saved
            set_rng_state(self.rng, saved["rng"])
            self.measurements.restore(saved.get("measurements", []))
            self.generation, self.best, self.tokens = saved["generation"], saved["fitness"], saved["tokens"]
            self.parents, starts = ([tuple(c) for c in saved[key]] for key in ("population", "start"))
            self.start, self.curve = starts[0], saved.get("curve", [])
            self._confirmed = dict(zip(self.parents, saved.get("confirmed", [])))
            print(f"{self.run.folder}: resumed after generation {self.generation}")

    def draw(self, num_tokens: int) -> Row:
        """A minibatch of exactly that many tokens of the calibration text."""
        return draw_minibatch(self.documents, num_tokens, self.rng)

    def measure(self, candidates: list[Candidate], minibatch: Row) -> list[float]:
        """--fitness_fn of every candidate, +inf where it is not finite; counts the tokens."""
        values, spent = self.measurements.measure(candidates, minibatch)
        self.tokens += spent
        return values

    def changes(self, candidates: list[Candidate], minibatch: Row, around: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """(KL divergence of each of the candidates, in nats a token; Gram matrix of what they change of the logits of
        `around`, see `utils.interactions`); counts the tokens."""
        sums, changes = self.fitness.changes([*map(self.states, candidates)], minibatch, self.states(around))
        self.tokens += (len(candidates) + 1) * sum(length for _, length in minibatch)
        values = [mean_of(documents, minibatch, "kl") for documents in sums.T.tolist()]
        return np.array(values), gram_matrix(changes)

    def confirm(self, survivors: Ranked) -> Ranked:
        """With --confirm_tokens, the best of survivors and parents on that much text, the same in all generations: what
        is found is not lost again to the luck of a minibatch. Counts the tokens that are new. Else the survivors."""
        if not self.args.confirm_tokens:
            return survivors
        new = [candidate for _, candidate in survivors if candidate not in self._confirmed]
        if new:
            values = self.fitness.measure([*map(self.states, new)], self._shared, (self.args.fitness_fn,))
            self._confirmed |= {candidate: value for candidate, (value,) in zip(new, values)}
            self.tokens += len(new) * self.args.confirm_tokens
        ranked = sorted((value, candidate) for candidate, value in self._confirmed.items())
        ranked = ranked[:self.args.population_size]
        self._confirmed = {candidate: value for value, candidate in ranked}
        return ranked

    def begin(self, ranked: Ranked, **state) -> None:
        """Generation 0: the best of `ranked` are the first parents. Raises RunError where none is finite. `state`: what
        the script needs besides to go on from here, see `saved`."""
        if not math.isfinite(ranked[0][0]):
            raise RunError(f"--fitness_fn {self.args.fitness_fn}: not finite for any start; use --dtype bfloat16 or "
                           f"float32")
        self.generation, self.start = 0, ranked[0][1]
        self._keep(self.confirm(ranked[:self.args.population_size]))
        self.run.log(self._log_line())
        self._checkpoint(state)

    def generations(self) -> Iterator[int]:
        """Numbers of the generations that are left to do, each of which ends with `record`."""
        self._began, self._searching = time.time(), 0.0
        self._first, self._tokens_before = self.generation + 1, self.tokens
        for generation in range(self._first, self.run.generations + 1):
            self._started = time.time()
            yield generation

    def record(self, survivors: Ranked, **state) -> None:
        """The survivors of a generation are the next parents: log, save and print that. `state`: as for `begin`."""
        args, total = self.args, self.run.generations
        self.generation += 1
        self._keep(survivors)
        self._searching += time.time() - self._started
        line = self._log_line()
        if self.evaluation_sets and args.eval_every and self.generation % args.eval_every == 0:
            line["evaluation"] = self.evaluation(self.states(self.parents[0]))
        seconds = time.time() - self._began
        rate = (self.tokens - self._tokens_before) / self._searching
        left = seconds / (self.generation - self._first + 1) * (total - self.generation)
        self.run.log(line, generation=self.generation, seconds=seconds, tokens_per_second=rate)
        self._checkpoint(state)
        print(f"generation {self.generation}/{total}  {args.fitness_fn} {self.best:.5f}  {self.tokens:,} tokens  "
              f"{rate:,.0f} tokens/s  {left:.0f} s left", flush=True)
        if self.wandb:
            self.wandb.log(line)

    def evaluate(self, start: str) -> None:
        """Print perplexity and KL divergence of the uncompressed model, the first parent, called `start`, and the best
        candidate on the evaluation texts, if there are any."""
        if self.evaluation_sets:
            self.evaluations = {"dense": self.evaluation.dense, start: self.evaluation(self.states(self.start)),
                                "search": self.evaluation(self.states(self.parents[0]))}
            print(format_table(evaluation_rows(self.evaluations)))

    def finish(self, budget: str, values: Sequence[Sequence[float]], row_names: Sequence[str], label: str,
               files: Sequence[Path], **found) -> dict:
        """Draw search.png and write summary.json, which marks the run as finished; returns the summary.

        budget: as met, in words; values: what the best candidate is, [rows, blocks], in units that `label` names;
        files: that have been written; found: what else the summary has.
        """
        args = self.args
        plot_search(self.run.folder / "search.png", self.run.records(), self.curve, sum(n for _, n in self._shared),
                    values, row_names, f"{Path(args.model_name_or_path).name}: {budget}", label, args.fitness_fn)
        summary = {"task": self.task, "model": args.model_name_or_path, "budget": budget, "fitness": self.best,
                   "fitness_fn": args.fitness_fn, "generations": self.run.generations, "tokens": self.tokens,
                   "evaluation": self.evaluations, **found, **self.run.timing(self.tokens)}
        self.run.summarize(summary)
        distributed.report_idle(time.time() - self.run.began)
        more = "" if args.confirm_tokens else (f"search.png: {len(self.curve)} parents on "
                                               f"{sum(n for _, n in self._shared):,} more tokens each\n")
        print(f"budget: {budget}\ntokens: {self.tokens:,} in {summary['seconds']:.0f} s\n{more}"
              f"saved: {' and '.join(map(str, files))}")
        return summary

    def _keep(self, survivors: Ranked) -> None:
        best = self.parents[:1]
        self.best, self.parents = survivors[0][0], [candidate for _, candidate in survivors]
        if self.parents[:1] != best:                 # for the picture alone, so it is not among the search's tokens
            value = self._confirmed.get(self.parents[0])
            if value is None:
                [(value,)] = self.fitness.measure([self.states(self.parents[0])], self._shared, (self.args.fitness_fn,))
            self.curve.append((self.tokens, value))
        self.measurements.keep(self.parents)

    def _log_line(self) -> dict:
        return {"generation": self.generation, "fitness": self.best, "tokens": self.tokens,
                **self.logged(self.parents[0])}

    def _checkpoint(self, state: dict) -> None:
        self.run.checkpoint(generation=self.generation, rng=rng_state(self.rng), population=self.parents,
                            start=[self.start], fitness=self.best, tokens=self.tokens,
                            microbatch_tokens={"fitness": self.fitness.sizes, "evaluation": self.evaluation.sizes},
                            measurements=self.measurements.state, curve=self.curve,
                            confirmed=[*self._confirmed.values()], **state)
