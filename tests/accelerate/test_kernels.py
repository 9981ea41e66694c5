"""One option chooses the kernels of a model, and puts them on that model alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_folder
from transformers import AttentionInterface, PreTrainedModel

from lit_align.accelerate import KERNELS
from lit_align.functional.packing import pack
from lit_align.models import LanguageModel, Network, load_causal_lm
from lit_align.types import Example, Segment

BATCH = pack(
    [
        Example(Segment([5, 6, 7], [False] * 3), [Segment([8, 9], [True] * 2), Segment([10], [True])]),
        Example(Segment([11, 12, 13, 14], [False, False, True, True])),
    ]
)


def changed(model: PreTrainedModel) -> set[str]:
    """Kinds of layers whose forward is the instance's own."""
    return {type(module).__name__.removeprefix("Llama") for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("kernels", [None, [], *([name] for name in KERNELS)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_alone_and_none_give_the_same(architecture: str, kernels: list | None, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, architecture)
    plain = load_causal_lm(Network(folder, dtype="float64", kernels=[]))
    assert changed(plain) == set()
    chosen = load_causal_lm(Network(folder, dtype="float64", kernels=kernels))
    models = [LanguageModel(hf).eval() for hf in (plain, chosen)]
    assert not models[0].thrifty
    assert not models[0].by_tree
    if architecture == "llama":
        use = set(KERNELS if kernels is None else kernels)
        assert changed(chosen) == {kind for kind, name in (("RMSNorm", "norm"), ("Attention", "rotary")) if name in use}
        assert (models[1].thrifty, models[1].by_tree) == ("last_layer" in use, "tree_attention" in use)
    expected, got = (model(BATCH).logps_S for model in models)
    # transformers' norms round to fp32.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# Kills: a class or a function of transformers replaced when a model is loaded.
def test_nothing_of_transformers_changes(tmp_path: Path) -> None:
    def state() -> dict[tuple[str, str], object]:
        modeling = [module for name, module in sys.modules.items() if name.startswith("transformers.models.llama")]
        held = {(m.__name__, name): value for m in modeling for name, value in vars(m).items()}
        kinds = {value for value in held.values() if isinstance(value, type)}
        return held | {(f"{k.__module__}.{k.__name__}", name): v for k in kinds for name, v in vars(k).items()}

    before, attention = (
        load_causal_lm(Network(tiny_folder(tmp_path), kernels=[])) and state(),
        set(AttentionInterface()),
    )
    load_causal_lm(Network(tiny_folder(tmp_path)))
    after = state()
    assert {key for key in before if before[key] is not after[key]} == set()
    # Registered under a name of its own, as transformers offers.
    assert set(AttentionInterface()) - attention <= {"lit_align_trees"}


def test_an_unknown_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network\.kernels: 'norms' is none of norm, rotary"):
        Network("x", kernels=["norms"])  # type: ignore[list-item]


BENCH = Path(__file__).parents[2] / "experiments" / "bench"


# Kills: a figure that was written by hand; a kernel that gains too little.
def test_each_kernel_says_what_was_measured_and_gains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import kernels

    results = json.loads((BENCH / "results" / kernels.FILE).read_text())["results"]
    for kernel, name in kernels.FILES.items():
        text = (BENCH.parents[1] / "lit_align" / name).read_text()
        assert f"{kernels.BEGIN}{kernels.gains(results, kernel)}.\n" in text, f"{name}: run kernels.py --beside"
    assert set(KERNELS) == set(kernels.KERNELS)
    for kernel in KERNELS:
        assert any(kernel in m and m[kernel]["cpu_gain"] >= kernels.LEAST for m in results.values()), kernel
