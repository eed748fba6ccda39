"""Configurations in the paper's formats survive reading and writing; a file that does not fit is refused by line."""
import pytest

from utils.configs import check_level_config, read_drop_config, read_level_config, write_drop_config, write_level_config

# The layout in which the paper's depth configurations are published: 32 blocks, a quarter of each type dropped.
PUBLISHED_DROP = "none\n" * 9 + ("mlp\nnone\nattn+mlp\nnone\nattn\nattn\nmlp\nnone\nmlp\nattn\nattn+mlp\nattn+mlp\n"
                                 "attn\nnone\nmlp\nmlp\nattn\nnone\nnone\nnone\nnone\nnone\nnone\n")
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PUBLISHED_LEVELS = "".join(f"model.layers.{block}.{layer}: {(7 * block + 3 * i) % 9 - 4}\n"
                           for block in range(32) for i, layer in enumerate(LAYERS))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ---- depth -----------------------------------------------------------------------------------------------------------


def test_published_drop_configuration_is_written_back_to_the_byte(tmp_path):
    source = write(tmp_path / "layer_drop_config.txt", PUBLISHED_DROP)
    dropped = read_drop_config(source, num_blocks=32)
    assert [len(dropped), sum(attn for attn, _ in dropped), sum(mlp for _, mlp in dropped)] == [32, 8, 8]
    assert dropped[8:12] == [(False, False), (False, True), (False, False), (True, True)]
    assert dropped[13] == (True, False)
    write_drop_config(tmp_path / "back.txt", dropped)
    assert (tmp_path / "back.txt").read_bytes() == source.read_bytes()


def test_line_ends_of_other_systems_and_a_missing_last_one_are_read(tmp_path):
    expected = read_drop_config(write(tmp_path / "a.txt", PUBLISHED_DROP))
    (tmp_path / "b.txt").write_bytes(PUBLISHED_DROP.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert read_drop_config(tmp_path / "b.txt", 32) == expected
    assert read_drop_config(write(tmp_path / "c.txt", PUBLISHED_DROP.rstrip()), 32) == expected


@pytest.mark.parametrize("text, message", [
    ("none\n" * 31, "31 lines, but the model has 32 blocks; one line a block"),
    ("none\n" * 33, "33 lines, but the model has 32 blocks"),
    ("none\n" * 20 + "atn\n" + "none\n" * 11, "line 21: 'atn'; every line is one of none, attn, mlp, attn\\+mlp"),
    ("none\n" * 20 + "Attn\n" + "none\n" * 11, "line 21: 'Attn'"),
    ("none\n" * 20 + "mlp+attn\n" + "none\n" * 11, "line 21: 'mlp\\+attn'"),
    ("none\n" * 20 + "\n" + "none\n" * 11, "line 21: ''"),
    ("", "is empty"),
    ("\n\n", "is empty"),
])
def test_drop_configuration_that_does_not_fit_is_refused_naming_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "drop.txt", text)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        read_drop_config(path, num_blocks=32)


@pytest.mark.parametrize("read", [read_drop_config, read_level_config])
def test_configuration_that_cannot_be_read_is_refused_naming_the_file(tmp_path, read):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00none")
    for path in (tmp_path / "missing.txt", tmp_path, tmp_path / "binary"):
        with pytest.raises(ValueError, match=rf"{path}: cannot be read"):
            read(path)


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_published_level_configuration_is_written_back_to_the_byte(tmp_path):
    source = write(tmp_path / "levels.txt", PUBLISHED_LEVELS)
    levels = read_level_config(source)
    assert len(levels) == 224
    assert list(levels)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert levels["model.layers.0.self_attn.q_proj"] == -4
    assert levels["model.layers.31.mlp.down_proj"] == (217 + 18) % 9 - 4
    write_level_config(tmp_path / "back.txt", levels)
    assert (tmp_path / "back.txt").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("line, message", [
    ("model.layers.0.q_proj 3", "is not `layer.name: level`"),
    ("model.layers.0.q_proj: three", "with a number"),
    ("model.layers.0.q_proj: nan", "with a number"),
    ("model.layers.0.q_proj:", "is not"),
    (": 3", "is not"),
    ("", "is not"),
    ("model.layers.0.mlp.up_proj: 2", "model.layers.0.mlp.up_proj is there twice"),
])
def test_level_configuration_that_is_misspelt_is_refused_naming_file_and_line(tmp_path, line, message):
    lines = PUBLISHED_LEVELS.splitlines()
    lines[99] = line
    path = write(tmp_path / "levels.txt", "\n".join(lines))
    with pytest.raises(ValueError, match=rf"{path}: line 100: .*{message}"):
        read_level_config(path)


def test_empty_level_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="levels.txt: is empty"):
        read_level_config(write(tmp_path / "levels.txt", "\n"))


def test_levels_that_do_not_fit_the_database_are_named(tmp_path):
    path = write(tmp_path / "levels.txt", PUBLISHED_LEVELS)
    levels = read_level_config(path)
    available = {name: range(-4, 5) for name in levels}
    check_level_config(path, levels, available)
    first = next(iter(levels))
    without_first = {name: available[name] for name in list(levels)[1:]}
    for wrong, message in ((without_first, rf"{first}: -4 \(no such layer\)"),
                           (available | {first: range(5)}, rf"{first}: -4 \(no such level\)"),
                           (available | {"layers.32.up_proj": range(3)}, r"layers.32.up_proj \(missing\)")):
        with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
            check_level_config(path, levels, wrong)
