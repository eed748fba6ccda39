"""Put a model's layers at the levels of a database: what the searches, baselines and evaluations switch with."""
from collections.abc import Hashable, Mapping

from database.store import Database, LevelCache
from utils.model import Decoder

GIGABYTE = 10**9


class LevelSwitcher:
    """The levels a decoder's layers are at, switched one by one: unpacking a changed layer is all a switch costs."""

    def __init__(self, decoder: Decoder, database: Database, cache_gb: float):
        """Raises ValueError when the database was built for another model, or for layers this one does not have."""
        database.check_model(decoder.config)
        unknown = [name for name in database.layers if name not in decoder.layers]
        if unknown:
            raise ValueError(f"{database.path}: has {unknown[0]}, which is not a linear layer of the model's blocks; "
                             f"build a database for this model")
        for name in database.layers:
            shape = tuple(decoder.layers[name].weight.shape)
            if shape != database.shape(name):
                raise ValueError(f"{database.path}: {name} is {database.shape(name)}, but {shape} in the model; build a "
                                 f"database for this model")
        stored = set(database.layers)
        self.names = [[name for name in block.layers if name in stored] for block in decoder.blocks]
        self.loaded: dict[str, int] = {}
        self.switches = 0
        self._layers = decoder.layers
        self._cache = LevelCache(database, decoder.device, decoder.dtype, int(cache_gb * GIGABYTE))

    def set_block(self, index: int, levels: Hashable) -> None:
        """Put the layers of block `index` at `levels`, a tuple in the order of `names[index]`."""
        for name, level in zip(self.names[index], levels, strict=True):
            if self.loaded.get(name) != level:
                self._cache.copy_(self._layers[name].weight, name, level)
                self.loaded[name] = level
                self.switches += 1

    def states(self, levels: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Level by layer name as a candidate of the fitness walk: a tuple of levels for every block."""
        return tuple(tuple(levels[name] for name in names) for names in self.names)
