"""The calibration pass: every distinct layer input has its Hessian, whatever the family and wherever it lives."""
import pytest
import torch

import families
from database.hessian import Calibration, add_outer_products, sums_half_precision_in_float32
from utils.decoder import Decoder


def make_documents(lengths=(40, 17, 23, 40, 9), vocabulary=families.VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def plain_hessians(model, documents, block):
    """Each nn.Linear's XᵀX / tokens from whole forwards, one document at a time, in float64."""
    layers = {name: layer for name, layer in block.layers.items() if isinstance(layer, torch.nn.Linear)}
    inputs = {name: [] for name in layers}
    hooks = [layer.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0]))
             for name, layer in layers.items()]
    with torch.no_grad():
        for document in documents:
            model(input_ids=document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    inputs = {name: torch.cat([x.flatten(0, -2) for x in parts]).double() for name, parts in inputs.items() if parts}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - {"gpt2"}))      # gpt2 has no nn.Linear
def test_hessians_are_those_of_whole_forwards(family):
    decoder = Decoder(families.build(family))
    documents = make_documents()
    calibration = Calibration(decoder, documents, decoder.device, microbatch_tokens=60)
    for block in decoder.blocks:
        hessians = calibration.measure(block.layers, advance=True)
        assert hessians.keys() == block.layers.keys()
        expected = plain_hessians(decoder.model, documents, block)
        hessians = {name: hessians[name] for name in expected}
        for name, hessian in hessians.items():
            assert hessian.dtype == torch.float32 and torch.equal(hessian, hessian.T)
            assert torch.allclose(hessian.double(), expected[name], rtol=1e-3,
                                  atol=1e-4 * float(expected[name].diagonal().max())), name


def test_layers_with_the_same_input_share_a_hessian():
    decoder = Decoder(families.build("llama"))
    hessians = Calibration(decoder, make_documents(), decoder.device).measure(decoder.blocks[0].layers, advance=False)
    short = {name.rpartition(".")[2]: hessian for name, hessian in hessians.items()}
    assert short["q_proj"] is short["k_proj"] is short["v_proj"] and short["gate_proj"] is short["up_proj"]
    assert len({id(hessian) for hessian in hessians.values()}) == 4


def test_a_layer_that_sees_no_token_has_no_hessian():
    decoder = Decoder(families.build("llama"))
    layers = decoder.blocks[0].layers | {"unused": torch.nn.Linear(4, 4)}
    assert Calibration(decoder, make_documents(), decoder.device).measure(layers, advance=False)["unused"] is None


def test_inputs_that_are_not_finite_are_named():
    decoder = Decoder(families.build("llama"))
    decoder.layers["model.layers.1.mlp.up_proj"].bias.data[3] = torch.nan
    calibration = Calibration(decoder, make_documents(), decoder.device)
    calibration.run()
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: NaN or infinite values in its input"):
        calibration.measure(decoder.blocks[1].layers, advance=True)


def test_outer_products_of_half_precision_are_summed_in_float32():
    x = torch.full((2000, 3), 7.0, dtype=torch.float16)                  # 98,000: more than float16 can hold
    hessian = torch.zeros(3, 3)
    add_outer_products(hessian, x)
    add_outer_products(hessian, x)
    assert torch.equal(hessian.triu(), torch.full((3, 3), 2 * 2000 * 49.0).triu())


@pytest.mark.parametrize("columns", [1, 255, 256, 700])
def test_outer_products_of_any_width(columns):
    x = torch.randn(50, columns)
    hessian = torch.zeros(columns, columns)
    add_outer_products(hessian, x)
    assert torch.allclose(hessian.triu(), (x.T @ x).triu(), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [(False, True), (True, False), (True, True)])
def test_offloading_changes_nothing(offload):
    expected = None
    for modules, activations in ((False, False), offload):
        device = torch.device("cuda")
        decoder = Decoder(families.build("llama").to("cpu" if modules else device), device if modules else None)
        calibration = Calibration(decoder, make_documents(), device, None, activations)
        for block in decoder.blocks[:2]:
            hessians = calibration.measure(block.layers, advance=True)
        assert all(states.is_cuda != activations for states in calibration.hidden_states.chunks)
        measured = [hessian.cpu() for hessian in hessians.values()]
        assert expected is None or all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(expected, measured, strict=True))
        expected = measured


@pytest.mark.parametrize("columns", [1, 255, 700])
def test_products_of_half_precision_with_sums_in_float32_are_those_of_float32(columns, monkeypatch):
    """On a GPU the products themselves; elsewhere with a stand-in for them, which checks what they are given."""
    x = torch.randn(90, columns, device="cuda" if torch.cuda.is_available() else "cpu").bfloat16()
    hessian = torch.zeros(columns, columns, device=x.device)
    if not x.is_cuda:
        assert not sums_half_precision_in_float32(x.device, x.dtype)
        addmm = torch.addmm

        def mixed(into, a, b, out_dtype, out):
            assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == into.dtype == torch.float32 and out is into
            return addmm(into, a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "addmm", mixed)
        monkeypatch.setattr("database.hessian.sums_half_precision_in_float32", lambda *_: True)
    assert sums_half_precision_in_float32(x.device, x.dtype) or not x.is_cuda
    for _ in range(2):
        add_outer_products(hessian, x)
    expected = 2 * x.double().T @ x.double()
    assert torch.allclose(hessian.triu().double(), expected.triu(), rtol=1e-5, atol=1e-4)
