"""What SFT has beside its loss: the loss of each source, DFT, NEFTune, and a mixture that a run goes through."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.runs import write_rows
from support.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from lit_align import InstructionDataModule, Network, SFTModule, Source
from lit_align.cli.entry import main
from lit_align.functional.sft import dft_loss, sft_loss
from lit_align.models import LanguageModel
from lit_align.modules import base, neftune
from lit_align.modules.neftune import noisy_embeddings
from lit_align.report.read import read_curves

SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    (tmp_path / "text.txt").write_text("a bee sees\na dee hears\n")
    tiny_folder(tmp_path / "model")
    return tmp_path


def data(place: Path, **options: Any) -> InstructionDataModule:
    sources = [Source(str(place / "demos.json")), Source(str(place / "text.txt"))]
    return InstructionDataModule(str(place / "model"), sources, **{"cache_dir": "none", "batch_size": 4, **options})


def module(place: Path, **options: Any) -> SFTModule:
    return SFTModule(Network(str(place / "model")), **{"optimizer": SGD, **options})


def trainer(**options: Any) -> Trainer:
    options = {"max_epochs": 1, "enable_checkpointing": False, "enable_model_summary": False, **options}
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **options)


def mean_loss(place: Path, source: Source) -> tuple[float, int]:
    """Of a source alone, one example at a time."""
    alone = InstructionDataModule(str(place / "model"), [source], val_fraction=0.0, batch_size=1, cache_dir="none")
    alone.setup("fit")
    made = module(place)
    made.configure_model()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in alone.train_dataloader():
            loss, tokens = sft_loss(made.policy(batch).logps_S)
            total, count = total + loss.item(), count + tokens
    return total / count, count


# Kills: gradients scaled where the loss was divided; a factor of DeepSpeed's that is left from an earlier step.
@pytest.mark.parametrize(
    ("options", "accumulate", "divided"), [({}, 1, True), ({"micro_batch_tokens": 100}, 1, False), ({}, 2, False)]
)
def test_a_step_of_one_micro_batch_divides_its_loss(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: dict, accumulate: int, divided: bool
) -> None:
    scales = []
    monkeypatch.setattr(base, "scale_gradients", lambda strategy, optimizer, scale: scales.append(scale))
    sources = {"train": [Source(str(place / "demos.json"))], "val_fraction": 0.0}
    held = InstructionDataModule(str(place / "model"), **sources, batch_size=4, cache_dir="none", **options)
    trainer(accumulate_grad_batches=accumulate).fit(module(place), held)
    assert len(scales) == len(held.train_dataloader()) // accumulate
    assert all((scale == 1.0) == divided for scale in scales)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_the_loss_of_each_source_is_a_mean_over_its_own_tokens(place: Path, size: int) -> None:
    sources = [Source(str(place / "demos.json")), Source(str(place / "text.txt"), label="prose")]
    held = data(place, val=sources, val_batch_size=size)
    (metrics,) = trainer().validate(module(place), held, verbose=False)
    (demos, tokens), (prose, others) = (mean_loss(place, source) for source in sources)
    assert metrics["val/loss/demos"] == pytest.approx(demos, rel=1e-5)
    assert metrics["val/loss/prose"] == pytest.approx(prose, rel=1e-5)
    assert metrics["val/loss"] == pytest.approx((demos * tokens + prose * others) / (tokens + others), rel=1e-5)


def test_the_loss_of_each_source_of_a_share_held_out_and_of_tests(place: Path) -> None:
    both = {"loss/demos", "loss/text"}
    fitted = trainer()
    fitted.fit(module(place), data(place, val_fraction=0.5))
    assert {f"val/{name}" for name in both} < set(fitted.callback_metrics)
    (metrics,) = trainer().test(module(place), data(place, test=[Source(str(place / "text.txt"))]), verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity", "test/token_accuracy"}, (
        "of one source there is nothing more to say"
    )
    two = [Source(str(place / "text.txt")), Source(str(place / "text.txt"))]
    (metrics,) = trainer().test(module(place), data(place, test=two), verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity", "test/token_accuracy", "test/loss/text", "test/loss/text-2"}
    assert metrics["test/loss/text"] == pytest.approx(metrics["test/loss"], rel=1e-6)


def test_dft_is_trained_on_and_plain_likelihood_validated(place: Path) -> None:
    runs = {}
    for loss in ("nll", "dft"):
        made = module(place, loss=loss)
        runs[loss] = trainer(max_steps=1, max_epochs=-1)
        runs[loss].fit(made, data(place, val_fraction=0.0, batch_size=10))
    plain = module(place)
    plain.configure_model()
    (batch,) = data_batches(place)
    with torch.no_grad():
        (total, count), (nll, _) = (f(plain.policy(batch).logps_S) for f in (dft_loss, sft_loss))
    assert runs["dft"].callback_metrics["train/loss"] == pytest.approx(total.item() / count, rel=1e-4)
    assert runs["nll"].callback_metrics["train/loss"] == pytest.approx(nll.item() / count, rel=1e-4)
    validated = [trainer().validate(module(place, loss=loss), data(place), verbose=False) for loss in ("nll", "dft")]
    assert validated[0] == validated[1]


def data_batches(place: Path) -> list[Any]:
    made = data(place, val_fraction=0.0, batch_size=10)
    made.setup("fit")
    return list(made.train_dataloader())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["by tree", "by mask", "unpacked"])
def test_noise_is_each_examples_own(
    architecture: str, way: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each way to lay a batch out, embeddings move by alpha / sqrt(L H) at most, L the example's length."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = neftune.neftune_noise
    monkeypatch.setattr(
        neftune, "neftune_noise", lambda like, *rest: seen.append((like, plain(like, *rest))) or seen[-1][1]
    )
    policy = LanguageModel(load(tiny_folder(tmp_path / architecture, architecture)))
    policy.by_tree, policy.packs = policy.by_tree and way == "by tree", way != "unpacked"
    (batch,) = data_batches(place)
    lengths = torch.bincount(batch.tree_RN[batch.tree_RN >= 0]).tolist()
    embedded: list[torch.Tensor] = []
    plainly = policy.hf.get_input_embeddings().weight
    with torch.no_grad(), noisy_embeddings(policy, batch, 5.0, seed=1):
        handle = policy.hf.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
        noisy = policy(batch).logps_S
        handle.remove()
    assert [len(like) for like, _ in seen] == lengths
    width = plainly.shape[1]
    for length, (_, noise) in zip(lengths, seen, strict=True):
        edge = 5.0 / (length * width) ** 0.5
        assert 0.8 * edge < noise.abs().max() <= edge
    # Each token moved by its own example's noise, and padding not at all.
    total = sum(noise.abs().sum() for _, noise in seen)
    ids = {"by tree": batch.tokens_RN[batch.tree_RN >= 0][None], "by mask": batch.tokens_RN}
    if way in ids and (way != "by tree" or policy.by_tree):
        moved = (embedded[0] - plainly[ids[way]]).abs().sum().item()
        assert moved == pytest.approx(total.item(), rel=1e-4)
    again = LanguageModel(policy.hf)
    with torch.no_grad(), noisy_embeddings(again, batch, 5.0, seed=1):
        assert torch.allclose(again(batch).logps_S, noisy, atol=1e-4), "the same, however it is laid out"
    with torch.no_grad(), noisy_embeddings(again, batch, 5.0, seed=2):
        assert not torch.allclose(again(batch).logps_S, noisy, atol=1e-2)
    with torch.no_grad():
        assert not torch.allclose(policy(batch).logps_S, noisy, atol=1e-2), "the hook is gone, and so is the noise"


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_noise_is_for_training_alone_and_new_at_every_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    noisy = noisy_embeddings
    monkeypatch.setattr(
        "lit_align.modules.sft.noisy_embeddings", lambda *a, seed: seeds.append(seed) or noisy(*a, seed=seed)
    )
    options = {"val_fraction": 0.3, "batch_size": 1}
    trainer(max_steps=3, max_epochs=-1, accumulate_grad_batches=2, val_check_interval=2).fit(
        module(place, neftune_alpha=5.0), data(place, **options)
    )
    assert seeds == [0, 0, 1, 1, 2, 2], "one noise a step; none in validation"
    validated = [
        trainer().validate(module(place, neftune_alpha=alpha), data(place), verbose=False) for alpha in (None, 5.0)
    ]
    assert validated[0] == validated[1]
    seeds.clear()
    trainer(max_steps=1, max_epochs=-1).fit(module(place, neftune_alpha=None), data(place))
    assert not seeds
    with pytest.raises(ValueError, match="neftune_alpha must not be negative"):
        module(place, neftune_alpha=-1.0)
    with pytest.raises(ValueError, match="does not reach compiled code"):
        SFTModule(Network(str(place / "model"), compile=True), neftune_alpha=5.0)
    SFTModule(Network(str(place / "model"), compile=True), neftune_alpha=0.0)


def test_a_run_goes_through_its_phases(place: Path) -> None:
    """With shares of training, of epochs and of steps; what is trained on is what the mixture says."""
    sources = [Source(str(place / "demos.json"), weight=1.0), Source(str(place / "text.txt"), weight=[(0.5, 1.0)])]
    seen: list[list[bool]] = []

    class Watched(SFTModule):
        def micro_step(self, batch: Any) -> torch.Tensor:
            first = batch.tokens_RN.flatten()[batch.source_S]
            text = [bool((batch.sequence_S == q).sum() > 1) and int(first[batch.sequence_S == q][0]) == 1
                    for q in range(batch.num_sequences)]  # a text is scored from its first token on  # fmt: skip
            seen.append(text)
            return super().micro_step(batch)

    for length in ({"max_epochs": 4}, {"max_steps": 10, "max_epochs": -1}):
        seen.clear()
        made = Watched(Network(str(place / "model")), optimizer=SGD)
        mixed = InstructionDataModule(str(place / "model"), copy.deepcopy(sources), batch_size=4, val_fraction=0.0)
        run = trainer(**length)
        run.fit(made, mixed)
        half = len(seen) // 2
        assert not any(map(any, seen[:half]))
        assert sum(map(sum, seen[half:])) == pytest.approx(2 * half, abs=1)


@pytest.mark.slow
def test_midtraining_learns_instructions_as_it_decays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped experiment, shrunken: instructions are learnt in the phase that shows them, and text is not lost."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    file = Path(__file__).parents[2] / "experiments" / "midtraining" / "pipeline.yaml"
    main(["pipeline", str(file), "--out", str(tmp_path / "run"), "--quick"])
    curves = read_curves(tmp_path / "run" / "midtrain" / "metrics.csv")
    instructions, text = (curves[f"val/loss/{name}"][1] for name in ("instructions", "text"))
    # Validated at steps 4, 8, 12, 16, 20; decay and instructions begin at step 16.
    assert len(instructions) == len(text) == 5
    before, after = (instructions[i] - instructions[i + 1] for i in (2, 3))
    assert after > before > 0, "faster, now that they are shown, though the rate falls"
    assert text[4] < text[3]
