"""Imports flow one way, as CONTRIBUTING.md has it: a room can be read without those above it."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["evo_drop", "evo_unstructured", "evo_quant", "finish", "eval_config", "export"]
ROOMS = ["utils", "database", "formats", "baselines", "scripts", "benchmarks", "demo"]
MAY_IMPORT = {"utils": {"utils"}, "database": {"utils", "formats", "database"}, "formats": {"utils", "formats"},
              "baselines": {"utils", "database", "baselines"},
              **{script: {"utils", "database", "formats"} for script in SCRIPTS}}


def imported(file: Path) -> set[str]:
    """The rooms and scripts that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names & {*ROOMS, *SCRIPTS}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(room):
    files = [ROOT / f"{room}.py"] if room in SCRIPTS else sorted((ROOT / room).glob("*.py"))
    found = {file.name: imported(file) for file in files}
    assert any(found.values()), "no import seen at all"
    assert {name: names - MAY_IMPORT[room] for name, names in found.items() if names - MAY_IMPORT[room]} == {}


def test_the_run_knows_nothing_of_levels_mutation_or_selection():
    source = (ROOT / "utils" / "search.py").read_text()
    below = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not below & {"utils.units", "utils.allocation", "utils.screening", "utils.configs"}
    assert not {"level", "mutate", "switch", "offload", "sparsity", "bitwidth"} & {
        node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
