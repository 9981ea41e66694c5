"""The DPO family in its module: on a language that can be enumerated each loss finds the policy it is known to seek.

And, for every loss: how examples are cut into micro-batches changes neither loss nor gradient.

A mutant that a test was seen to kill is named above it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning import LightningDataModule, Trainer
from support.tiny import norms_in_float64, tiny_folder
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_align import DPOModule, Network, PreferenceDataModule, Source
from lit_align.data.loader import Loader
from lit_align.functional.dpo import nll_loss
from lit_align.functional.dpo_losses import REFERENCE_FREE, LossName
from lit_align.functional.kto import ranked_kto_loss
from lit_align.functional.packing import pack
from lit_align.functional.reward import ranked_pairs
from lit_align.modules import Cosine
from lit_align.types import Example, PreferenceBatch, Segment

LETTERS = 2
PROMPT = Segment([1, 0], [False, False])
# No answer begins another, and together they are all there are: their probabilities sum to 1.
ANSWERS = [(1,), (0, 0), (0, 1)]
LENGTHS = torch.tensor([len(answer) for answer in ANSWERS], dtype=torch.float64)
# What the answers are worth, and the share of votes that Bradley and Terry give the first of two for it.
WORTH = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64).log()
LOGISTIC = torch.sigmoid(WORTH[:, None] - WORTH[None, :])
# Another value, for losses that fit the share of votes and not its log-odds.
VALUE = torch.tensor([0.0, 0.4, -0.2], dtype=torch.float64)
LINEAR = 0.5 + 0.5 * (VALUE[:, None] - VALUE[None, :])


class Batches(LightningDataModule):
    def __init__(self, batch: PreferenceBatch, count: int) -> None:
        super().__init__()
        # Of one prompt, all answers to another prompt are its own.
        self.batch, self.count = batch._replace(mismatched=batch.packed), count

    def train_dataloader(self) -> Loader:
        return Loader(lambda _: self.batch, self.count)


def batch_of(rankings: Sequence[tuple[Sequence[int], Sequence[float]]]) -> PreferenceBatch:
    """One example for each list of answers and their ranks."""
    examples = [
        Example(PROMPT, [Segment(ANSWERS[i], [True] * len(ANSWERS[i])) for i in which]) for which, _ in rankings
    ]
    rank_Q = torch.tensor([rank for _, ranks in rankings for rank in ranks])
    return PreferenceBatch(pack(examples, row_tokens=60), rank_Q, torch.zeros_like(rank_Q))


def copies(shares: Sequence[float]) -> tuple[int, list[int]]:
    """The fewest copies of which all shares are whole numbers, and those numbers."""
    for n in range(5, 200):
        counts = [share * n for share in shares]
        if all(abs(count - round(count)) < 1e-9 for count in counts):
            return n, [round(count) for count in counts]
    raise AssertionError("these shares are not of a small number of votes")


def pairs_batch(shares: Tensor) -> PreferenceBatch:
    """Every pair of answers, the first preferred in the given share of its copies: nothing is left to chance."""
    pairs = list(itertools.combinations(range(len(ANSWERS)), 2))
    n, wins = copies([shares[pair].item() for pair in pairs])
    rankings: list[tuple[Sequence[int], Sequence[float]]] = []
    for pair, count in zip(pairs, wins, strict=True):
        rankings += [(pair, (0.0, 1.0))] * count + [(pair, (1.0, 0.0))] * (n - count)
    return batch_of(rankings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Not flat, so that a loss that forgets the reference ends elsewhere.
    return tiny_folder(tmp_path_factory.mktemp("family") / "model", vocab_size=LETTERS, initializer_range=0.05)


def fit(module: DPOModule, batch: PreferenceBatch, steps: int) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Batches(batch, steps))


@torch.no_grad()
def logps(model: Any) -> Tensor:
    batch = batch_of([(range(len(ANSWERS)), [0.0] * len(ANSWERS))]).packed
    return model(batch).sums(batch)


def trained(folder: str, batch: PreferenceBatch, steps: int = 100, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers before and after."""
    network = Network(folder, dtype="float64")
    adam = functools.partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.95))
    module = DPOModule(network, optimizer=adam, schedule=Cosine(), **options)
    before = DPOModule(network)
    before.configure_model()
    fit(module, batch, steps)
    return logps(before.policy), logps(module.policy)


def normalised(policy: Callable[[float], Tensor], low: float, high: float) -> Tensor:
    """The policy of the constant that makes its probabilities sum to 1, by bisection; they grow with the constant."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if policy(middle).sum() > 1 else (middle, high)
    return policy(low)


def rankings_batch() -> PreferenceBatch:
    """All rankings of the three answers, as often as Plackett and Luce say."""
    orders = list(itertools.permutations(range(3)))
    _, counts = copies([(WORTH.softmax(0)[a] * LOGISTIC[b, c]).item() for a, b, c in orders])
    rankings: list[tuple[Sequence[int], Sequence[float]]] = []
    for order, count in zip(orders, counts, strict=True):
        rankings += [(order, (0.0, 1.0, 2.0))] * count
    return batch_of(rankings)


def sums(reference: Tensor, gain: Tensor) -> Tensor:
    """pi ~ pi_ref exp(gain)."""
    return (reference + gain).softmax(0)


def means(reference: Tensor, gain: Tensor) -> Tensor:
    """pi = pi_ref exp(length (gain + c)): where a loss averages over tokens, a longer answer gains more."""
    return normalised(lambda c: (reference + LENGTHS * (gain + c)).exp(), -50.0, 50.0)


def divergence(reference: Tensor, ratio: Callable[[Tensor], Tensor], beta: float) -> Tensor:
    """pi = pi_ref u, with f'(u) = (worth + c) / beta and `ratio` the inverse of f'."""
    return normalised(lambda c: reference.exp() * ratio((WORTH + c) / beta), -50.0, 50.0)


def hard(reference: Tensor, beta: float) -> Tensor:
    """SPPO's: log-ratios (win rate - 1/2) / beta as near as a distribution allows, in squares."""
    wins = (LOGISTIC.sum(1) - 0.5) / 2
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = (logits.log_softmax(0) - reference - (wins - 0.5) / beta).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return logits.detach().softmax(0)


# Loss, coefficients, shares of votes, and the policy it is known to seek: a function of the reference's logps.
KNOWN: list[tuple[str, dict[str, Any], Tensor, Callable[[Tensor], Tensor]]] = [
    ("sigmoid", {"beta": 0.5}, LOGISTIC, lambda ref: sums(ref, WORTH / 0.5)),
    # Conservative: believes that one vote in ten is wrong, of votes of which none is.
    (
        "sigmoid",
        {"beta": 0.5, "label_smoothing": 0.1},
        (LOGISTIC - 0.1) / 0.8,
        lambda ref: sums(ref, WORTH / 0.5),
    ),
    # Robust: one vote in five is wrong, and does no harm.
    ("robust", {"beta": 0.5, "label_smoothing": 0.2}, 0.2 + 0.6 * LOGISTIC, lambda ref: sums(ref, WORTH / 0.5)),
    ("ipo", {"beta": 0.5}, LINEAR, lambda ref: means(ref, VALUE)),
    ("sigmoid_norm", {"beta": 0.5}, LOGISTIC, lambda ref: means(ref, WORTH / 0.5)),
    # A token costs 0.3: of what length alone explains nothing is left.
    (
        "r_dpo",
        {"beta": 0.5, "coefficients": {"length_penalty": 0.3}},
        LOGISTIC,
        lambda ref: sums(ref, (WORTH - 0.3 * LENGTHS) / 0.5),
    ),
    # Regression of the log-odds on the votes: log(0.9 / 0.1) for all of them.
    (
        "exo_pair",
        {"beta": 1.5, "label_smoothing": 0.1},
        LINEAR,
        lambda ref: sums(ref, math.log(9.0) * VALUE / 1.5),
    ),
    ("forward_kl", {"beta": 0.8}, LOGISTIC, lambda ref: divergence(ref, forward_kl_ratio, 0.8)),
    ("js_divergence", {"beta": 0.8}, LOGISTIC, lambda ref: divergence(ref, js_ratio, 0.8)),
    (
        "alpha_divergence",
        {"beta": 0.8, "coefficients": {"alpha": 0.3}},
        LOGISTIC,
        lambda ref: divergence(ref, alpha_ratio, 0.8),
    ),
    ("sppo_hard", {"beta": 0.5}, LOGISTIC, lambda ref: hard(ref, 0.5)),
    # Without a reference.
    ("simpo", {"beta": 0.5, "coefficients": {"gamma": 0.0}}, LOGISTIC, lambda _: means(torch.zeros(3), WORTH / 0.5)),
    (
        "simpo",
        {"beta": 0.5, "coefficients": {"gamma": math.log(4.0)}},
        # Where the slopes of both labels meet: sigmoid(gamma - gap) of the one, sigmoid(gamma + gap) of the other.
        (1 + LOGISTIC.logit().exp() / 4) / (2 + LOGISTIC.logit().exp() / 4 + (-LOGISTIC.logit()).exp() / 4),
        lambda _: means(torch.zeros(3), WORTH / 0.5),
    ),
    ("cpo", {"beta": 0.5, "coefficients": {"nll_coef": 0.0}}, LOGISTIC, lambda _: (WORTH / 0.5).softmax(0)),
]


def inside(x: Tensor, bound: float, ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """f' has an upper bound: beyond it there is no such ratio, and for the bisection it is too large."""
    return torch.where(x < bound, ratio(x.clamp(max=bound)), torch.inf)


def forward_kl_ratio(x: Tensor) -> Tensor:
    """Inverse of -1 / u."""
    return inside(x, 0.0, lambda x: -1.0 / x)


def js_ratio(x: Tensor) -> Tensor:
    """Inverse of log(2 u / (1 + u))."""
    return inside(x, math.log(2.0), lambda x: x.exp() / (2.0 - x.exp()))


def alpha_ratio(x: Tensor) -> Tensor:
    """Inverse of (1 - u^-0.3) / 0.3."""
    return inside(x, 1 / 0.3, lambda x: (1.0 - 0.3 * x) ** (-1 / 0.3))


def assert_reached(policy: Tensor, best: Tensor, before: Tensor) -> None:
    def far(one: Tensor) -> float:
        return 0.5 * (one.exp() - best).abs().sum().item()

    assert best.sum().item() == pytest.approx(1.0)
    assert far(before) > 0.05
    assert far(policy) < 0.005


@pytest.mark.parametrize(("name", "options", "shares", "optimum"), KNOWN)
def test_loss_finds_its_optimum(
    name: str, options: dict[str, Any], shares: Tensor, optimum: Callable[[Tensor], Tensor], folder: str
) -> None:
    before, after = trained(folder, pairs_batch(shares), loss=name, **options)
    assert_reached(after, optimum(before), before)


def test_plackett_luce_finds_the_optimal_policy_from_whole_rankings(folder: str) -> None:
    before, after = trained(folder, rankings_batch(), loss="plackett_luce", beta=0.5)
    assert_reached(after, sums(before, WORTH / 0.5), before)


def test_nca_gives_each_answer_its_share_of_wins(tmp_path: Path) -> None:
    """At beta 1 and pairs drawn from the reference: pi = pi_ref 2 (win rate), and no constant is needed."""
    folder = tiny_folder(tmp_path / "model", vocab_size=LETTERS, initializer_range=0.05)
    flat = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    torch.nn.init.zeros_(flat.lm_head.weight)
    flat.save_pretrained(folder)
    chance = 0.5**LENGTHS
    orders = list(itertools.product(range(3), repeat=2))
    _, counts = copies([(chance[i] * chance[j] * LINEAR[i, j]).item() for i, j in orders])
    rankings: list[tuple[Sequence[int], Sequence[float]]] = []
    for order, count in zip(orders, counts, strict=True):
        rankings += [(order, (0.0, 1.0))] * count
    before, after = trained(folder, batch_of(rankings), loss="nca_pair", beta=1.0)
    assert_close(before.exp(), chance)
    assert_reached(after, 2 * chance * (LINEAR * chance).sum(1), before)


# Losses whose optimum nothing but the end of training keeps from infinity, or that have none in closed form.
OPEN = {
    "hinge": {"beta": 0.5},
    "discopop": {"beta": 0.5, "coefficients": {"tau": 0.5}},
    "bco_pair": {"beta": 0.5},
    "apo_zero": {"beta": 0.5},
    "orpo": {"beta": 0.5},
    "kto": {"beta": 0.5},
}


@pytest.mark.parametrize("name", OPEN)
def test_loss_parts_what_all_agree_on(name: str, folder: str) -> None:
    """Labels without doubt: the second answer is better than the first, and that better than the third."""
    before, after = trained(folder, pairs_batch((LOGISTIC > 0.5).double()), steps=25, loss=name, **OPEN[name])
    gain = after - before
    assert gain[1] > 0.5
    assert gain[1] - gain[2] > 1.0


def test_apo_down_parts_a_pair(folder: str) -> None:
    # Not all three: it would rather lower an answer that always wins than raise it, and the mass has to go somewhere.
    before, after = trained(folder, batch_of([((0, 2), (0.0, 1.0))]), steps=25, loss="apo_down", beta=0.5)
    gain = after - before
    assert gain[0] - gain[2] > 1.0


def test_every_loss_is_trained_here() -> None:
    assert {name for name, *_ in KNOWN} | set(OPEN) | {"plackett_luce", "nca_pair", "apo_down"} == set(
        get_args(LossName)
    )


# How examples are cut into micro-batches.


def ragged_rankings() -> list[tuple[Example, list[float]]]:
    """Prompts and answers of many lengths; two to four answers; a tie; a lone answer, which is no pair."""
    generator = torch.Generator().manual_seed(0)

    def segment(scored: bool) -> Segment:
        n = int(torch.randint(1, 9, (), generator=generator))
        return Segment(torch.randint(20, 200, (n,), generator=generator).tolist(), [scored] * n)

    ranks = [[0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0], [3.0, 1.0, 0.0, 2.0], [0.0]]
    return [(Example(segment(False), [segment(True) for _ in row]), row) for row in ranks]


def whole(examples: Sequence[tuple[Example, list[float]]]) -> PreferenceBatch:
    rank_Q = torch.tensor([rank for _, ranks in examples for rank in ranks])
    return PreferenceBatch(pack([example for example, _ in examples]), rank_Q, torch.zeros_like(rank_Q))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Network]:
    root = tmp_path_factory.mktemp("cut")
    names = tiny_folder(root / "policy"), tiny_folder(root / "reference", seed=1)
    return Network(names[0], dtype="float64"), Network(names[1], dtype="float64")


def loss_and_gradient(module: DPOModule, batch: PreferenceBatch) -> tuple[Tensor, list[Tensor]]:
    pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
    loss = module.loss_sum(batch, pairs, *module.pair_logps(batch, pairs))
    return loss.detach(), list(torch.autograd.grad(loss, list(module.policy.parameters())))


# Kills: a mean over pairs, prompts or answers of the micro-batch; KTO's reference point from the micro-batch.
@pytest.mark.parametrize("name", get_args(LossName))
def test_loss_of_a_batch_is_the_sum_over_its_examples(name: LossName, folders: tuple[Network, Network]) -> None:
    # A beta as small as the log-ratios of two strangers are large: no sigmoid saturates, no exponential is capped.
    module = DPOModule(folders[0], loss=name, beta=0.01, nll_coef=0.3, reference=folders[1])
    module.configure_model()
    examples = ragged_rankings()
    with norms_in_float64():
        loss, gradient = loss_and_gradient(module, whole(examples))
        parts = [loss_and_gradient(module, whole([example])) for example in examples]
    assert abs(loss) > 0.1
    assert_close(loss, torch.stack([part for part, _ in parts]).sum(), rtol=1e-10, atol=1e-10)
    for i, weight in enumerate(gradient):
        total = torch.stack([part[i] for _, part in parts]).sum(0)
        assert_close(weight, total, rtol=1e-9, atol=1e-10 * max(1.0, weight.abs().max().item()))


# Kills: `nll_coef` ignored or not weighed by prompt.
def test_likelihood_of_the_better_answer_is_added_by_prompt(folders: tuple[Network, Network]) -> None:
    losses = []
    batch = whole(ragged_rankings())
    for coefficient in (0.0, 0.5):
        module = DPOModule(folders[0], nll_coef=coefficient, reference=folders[1])
        module.configure_model()
        losses.append(loss_and_gradient(module, batch)[0])
    pairs = ranked_pairs(batch.rank_Q, batch.packed.example_Q)
    with torch.no_grad():
        nll_P = nll_loss(module.pair_logps(batch, pairs)[0])
    by_prompt = [nll_P[pairs.example_P == e].sum() * w for e, w in enumerate((1.0, 1 / 3, 1 / 3, 1.0, 1 / 6))]
    assert_close(losses[1] - losses[0], 0.5 * torch.stack(by_prompt).sum().double(), rtol=1e-6, atol=1e-6)


def kto(folders: tuple[Network, Network]) -> DPOModule:
    # The stranger is trained, so that the mean log-ratio is above 0.
    policy, reference = folders[::-1]
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
    return DPOModule(policy, loss="kto", beta=0.01, reference=reference, optimizer=sgd)


def with_mismatched(first: int, size: int) -> PreferenceBatch:
    """Some of the examples, and beside each its prompt with the answers of the next."""
    examples = ragged_rankings()
    chosen = range(first, first + size)
    others = [Example(examples[i][0].trunk, examples[(i + 1) % 6][0].branches) for i in chosen]
    return whole([examples[i] for i in chosen])._replace(mismatched=pack(others))


class Cut(LightningDataModule):
    """Two optimizer steps of six examples each, in micro-batches of a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> Loader:
        per_step = 6 // self.size
        return Loader(lambda n: with_mismatched(n % per_step * self.size, self.size), 2 * per_step)


def steps_of(module: DPOModule, size: int, **options: Any) -> DPOModule:
    torch.manual_seed(0)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    resume, data = options.pop("resume", None), options.pop("data", Cut(size))
    trainer = Trainer(
        accelerator="cpu", precision="64-true", accumulate_grad_batches=6 // size, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    with norms_in_float64():
        trainer.fit(module, data, ckpt_path=resume)
    return module


# Kills: of the answers that are trained on; not clamped; a mean over micro-batches or prompts; one rank's; sums not
# reset; not in the checkpoint, or not in full precision.
def test_reference_point_of_kto(folders: tuple[Network, Network], tmp_path: Path) -> None:
    """It is that of mismatched answers in the step before, whatever the micro-batches, and survives a checkpoint."""
    start = kto(folders)
    start.configure_model()
    batch = with_mismatched(0, 6)
    assert start.reference_point.item() == 0.0
    other = whole(ragged_rankings())._replace(packed=batch.mismatched)
    with torch.no_grad(), norms_in_float64():
        own = start.pair_logps(batch, ranked_pairs(batch.rank_Q, batch.packed.example_Q))[1].mean()
        expected = start.pair_logps(other, ranked_pairs(batch.rank_Q, batch.packed.example_Q))[1].mean()
    assert expected > 1.0
    assert (own - expected).abs() > 0.01

    first = steps_of(kto(folders), 6, max_steps=1)
    assert_close(first.reference_point, expected, rtol=1e-10, atol=1e-10)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")  # of the whole of an epoch: the second step is another's

    once = steps_of(kto(folders), 6)
    assert once.reference_point != first.reference_point
    for size in (1, 2):
        other = steps_of(kto(folders), size)
        assert_close(other.reference_point, once.reference_point, rtol=1e-10, atol=1e-10)
        assert_close(list(other.policy.parameters()), list(once.policy.parameters()), rtol=1e-10, atol=1e-10)

    resumed = steps_of(kto(folders), 6, max_epochs=2, max_steps=2, resume=tmp_path / "first.ckpt")
    assert torch.equal(resumed.reference_point, once.reference_point)
    assert all(map(torch.equal, resumed.policy.parameters(), once.policy.parameters()))

    # Another rank, as large, whose log-ratios are twice as large.
    both = kto(folders)
    alone = both.sum_over_ranks
    both.sum_over_ranks = lambda values: (alone(values).reshape(-1, 2) * torch.tensor([3.0, 2.0])).flatten()  # type: ignore[method-assign]
    assert_close(steps_of(both, 2, max_steps=1).reference_point, 1.5 * expected, rtol=1e-10, atol=1e-10)

    # Below the reference on average: no KL divergence is negative.
    low = DPOModule(folders[0], loss="kto", reference=folders[1], optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    assert steps_of(low, 6).reference_point.item() == 0.0


class Matched(Cut):
    def train_dataloader(self) -> Loader:
        return Loader(lambda _: whole(ragged_rankings()), 1)


def test_kto_without_what_it_needs(folders: tuple[Network, Network]) -> None:
    with pytest.raises(ValueError, match="loss: kto needs batches with `mismatched`"):
        steps_of(kto(folders), 6, data=Matched(6))
    with pytest.raises(ValueError, match=r"loss: kto .* unset model\.cache_reference"):
        DPOModule(folders[0], loss="kto", cache_reference=True)


# Kills: the reference point left out.
def test_kto_measures_from_the_reference_point(folders: tuple[Network, Network]) -> None:
    module = kto(folders)
    module.configure_model()
    batch = whole(ragged_rankings())
    with torch.no_grad():
        log_ratio_Q = module.pair_logps(batch, ranked_pairs(batch.rank_Q, batch.packed.example_Q))[1]
    module.reference_point.fill_(20.0)
    loss, _ = loss_and_gradient(module, batch)
    expected_E = ranked_kto_loss(log_ratio_Q, batch.rank_Q, batch.packed.example_Q, 6, 20.0, beta=0.01)
    assert_close(loss, expected_E.sum(), rtol=1e-6, atol=1e-6)


def test_coefficients_are_taken_or_refused() -> None:
    network = Network("nowhere")
    assert DPOModule(network, loss="simpo").beta == 2.0
    module = DPOModule(network, loss="simpo", beta=2.5, coefficients={"gamma": 1.4})
    assert module.loss_options == {"beta": 2.5, "label_smoothing": 0.0, "gamma": 1.4}
    with pytest.raises(ValueError, match="the sigmoid loss has no gamma"):
        DPOModule(network, coefficients={"gamma": 1.4})
    with pytest.raises(ValueError, match="the hinge loss has no label_smoothing"):
        DPOModule(network, loss="hinge", label_smoothing=0.1)


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_losses_load_no_reference(name: LossName, folders: tuple[Network, Network]) -> None:
    module = DPOModule(folders[0], loss=name)
    module.configure_model()
    assert module.reference is None
    loss, _ = loss_and_gradient(module, whole(ragged_rankings()))
    assert loss.isfinite()


# Kills: the label read the wrong way round; single answers left out; a lone answer judged by a rank among others.
def test_kto_learns_from_answers_that_were_judged_one_by_one(folders: tuple[Network, Network], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {word}", "completion": word * (1 + i % 3), "label": i % 2 == 0}
        for i, word in enumerate("a bee sea dee eh eff gee aitch".split())
    ]
    (tmp_path / "judged.json").write_text(json.dumps(rows))
    sgd = functools.partial(torch.optim.SGD, lr=0.3)
    module = DPOModule(folders[0], loss="kto", beta=0.1, reference=folders[0], optimizer=sgd)
    sources = [Source(str(tmp_path / "judged.json"))]
    options = {"val_fraction": 0.0, "batch_size": 8, "cache_dir": "none"}
    data = PreferenceDataModule(folders[0].name, sources, **options)
    trainer = Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        log_ratio_Q = module.pair_logps(batch, ranked_pairs(batch.rank_Q, batch.packed.example_Q))[1]
    assert len(log_ratio_Q) == 8
    assert log_ratio_Q[batch.rank_Q == 0].mean() > log_ratio_Q[batch.rank_Q == 1].mean() + 0.1
    assert trainer.callback_metrics["train/loss"] < 0.49  # 0.5 at the start
    with pytest.raises(
        ValueError, match="8 of 8 examples are one answer with a label, and DPOModule with loss: ipo compare"
    ):
        trainer.fit(DPOModule(folders[0], loss="ipo"), PreferenceDataModule(folders[0].name, sources, **options))
