"""Documentation: its command lines are understood by the programs that they name; nothing is left to fill in."""
import re
import shlex
import sys
from pathlib import Path

import pytest

import export
import finish
from database import import_levels

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
import estimate

PARSERS = estimate.PARSERS | {"export.py": export.parse_arguments, "finish.py": finish.parse_arguments,
                              "database.import_levels": lambda argv: import_levels.make_parser().parse_args(argv)}
PAGES = ["README.md", "benchmarks/README.md"]


def commands() -> list[list[str]]:
    """Words of the command lines in README.md's blocks, without what follows a #."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [words for block in blocks for line in block.replace("\\\n", " ").splitlines()
            if (words := shlex.split(line, comments=True))]


def test_every_python_command_is_understood_by_its_program():
    seen = []
    for words in commands():
        launched = words[0] == "torchrun"
        words = words[3:] if launched else words[1:] if words[0] == "python" else []
        if not words:
            continue
        program, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        if launched:
            assert arguments.pop() == "..."                  # as above, but for what follows
            assert f"python {'-m ' * (words[0] == '-m')}{program}" in (ROOT / "README.md").read_text()
        else:
            PARSERS[program](arguments)
        seen.append(program)
    assert set(seen) == {"evo_drop.py", "evo_unstructured.py", "evo_quant.py", "database.sparsegpt", "database.gptq",
                         "database.import_levels", "eval_config.py", "export.py", "finish.py"}


def test_every_make_target_and_script_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [words for words in commands() if words[0] == "make" or "bash" in words]
    assert len(named) > 3
    for words in named:
        if words[0] == "make":
            assert words[1] in targets
        else:
            assert (ROOT / words[words.index("bash") + 1]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_named_is_one_of_some_program(page):
    sources = "".join(path.read_text() for path in ROOT.glob("**/*.py") if ".venv" not in path.parts
                      and "tests" not in path.parts)
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", (ROOT / page).read_text()))
    assert len(named) > 10
    put_together = {f"{kind}_{what}" for kind in ("drop", "sparse", "quant")
                    for what in ("weights_path", "config_path", "budget")}
    of_others = {"help", "nproc_per_node"}
    assert {flag for flag in named if f'"--{flag}"' not in sources} <= put_together | of_others


def test_every_file_that_contributors_are_sent_to_exists_and_has_what_is_named():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = re.findall(r"`([\w/]+(?:\.(?:py|toml)|/))`", text)
    assert len(rooms) > 20
    for room in rooms:
        assert any((folder / room).exists() for folder in (ROOT, ROOT / "database")), room
    scripts = (ROOT / "evo_quant.py").read_text()
    assert all(f"def {name}(" in scripts for name in ("switch", "mutate", "first_candidates", "select", "make_parser"))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_nothing_is_left_to_fill_in_and_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text()
    assert not re.search(r"@@|TODO|TBD|XXX", text)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = ((ROOT / page).parent / file) if file else ROOT / page
            assert path.exists(), target
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, target
