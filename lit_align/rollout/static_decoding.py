"""Decoding for GPUs: a step is captured once as a CUDA graph and replayed, on tensors that stay where they are.

A step of a small model is a thousand kernels of microseconds, and launching them from Python takes longer than running
them; a replay launches all at once. What a graph asks for is a cache of fixed size, no shape that depends on data, and
no look at a value on the way. So a sequence that has stopped stays until half of them have, and then a graph of half
the size is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_align.models.language import LanguageModel
from lit_align.rollout.cache import RoomyLayer, cache_argument, roomy_cache, static_cache
from lit_align.rollout.decoding import Decoding
from lit_align.types import Completion

LOOK = 16  # steps between two looks at who has stopped: at each, the host waits for the device


class StaticDecoding(Decoding):
    """Greedy answers are those of `Decoding`; what is drawn has the same distribution, and comes in another order."""

    def decode(self, logits_BV: Tensor) -> list[Completion]:
        """Answer, from the logits of the first tokens on."""
        limit, total = self.sampling.max_new_tokens, len(logits_BV)
        answers = _Answers(total, limit, self.stops)
        step = self._first_step(answers, logits_BV)
        run: Callable[[], None] = step
        for count in range(1, limit + 1):
            step.take(*self.draw(step.logits_BV))
            if count == limit:
                step.record()
                break
            run()
            if count % LOOK == 0:
                alive = torch.nonzero(~answers.finished[step.running_B])[:, 0]
                if not len(alive):
                    break
                if len(alive) <= len(step.running_B) // 2:
                    run = step = step.only(alive)
                    continue
            if run is step:
                # What ran once has everything set up that is set up at first use; capturing runs nothing.
                run = captured(step, logits_BV.device)
        return self.completions(answers.tokens, answers.logps, answers.length, answers.finished)

    def _first_step(self, answers: _Answers, logits_BV: Tensor) -> _Step:
        every = torch.arange(len(logits_BV), device=logits_BV.device)
        states = [(layer.keys, layer.values) for layer in self.cache.layers]
        # They are copied, and nobody is to hold on to the first ones.
        self.cache.layers.clear()
        return _Step(self.policy, answers, every, self.mask_BT, self.sampling.max_new_tokens, states, logits_BV)


def decodes_statically(policy: LanguageModel) -> bool:
    """Whether a model can: all layers keep all keys and values, and attention takes a boolean mask."""
    config = policy.hf.config
    layers = roomy_cache(config).layers
    return bool(layers) and all(type(x) is RoomyLayer for x in layers) and config._attn_implementation != "eager"


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function of no arguments as a graph that does what it did; away from CUDA the function itself."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Answers:
    """What has been sampled: a row for each sequence, those that have stopped among them."""

    def __init__(self, total: int, limit: int, stops: Tensor) -> None:
        self.stops = stops
        self.tokens = torch.zeros(total, limit, dtype=torch.long, device=stops.device)
        self.logps = torch.zeros(total, limit, dtype=torch.float64, device=stops.device)
        self.length = torch.zeros(total, dtype=torch.long, device=stops.device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=stops.device)

    def record(self, running_B: Tensor, column_1: Tensor, token_B: Tensor, logp_B: Tensor) -> None:
        """A token of each sequence that is still in the batch; what follows a stop token is not counted."""
        at = running_B, column_1.expand(len(running_B))
        self.tokens.index_put_(at, token_B)
        self.logps.index_put_(at, logp_B)
        ended_B = self.finished[running_B]
        self.length.index_add_(0, running_B, (~ended_B).long())
        self.finished.index_copy_(0, running_B, ended_B | (token_B[:, None] == self.stops).any(1))


class _Step:
    """A token recorded and the next logits computed, in place. B sequences, L columns of the cache."""

    def __init__(
        self,
        policy: LanguageModel,
        answers: _Answers,
        running_B: Tensor,
        mask_BT: Tensor,
        room: int,
        states: list[tuple[Any, Any]],
        logits_BV: Tensor,
    ) -> None:
        filled = mask_BT.shape[1]
        self.policy, self.answers, self.running_B = policy, answers, running_B
        self.logits_BV = logits_BV.clone()
        self.token_B = torch.zeros_like(running_B)
        self.logp_B = torch.zeros(len(running_B), dtype=torch.float64, device=running_B.device)
        self.position_B = mask_BT.long().sum(1)
        self.mask_BL = torch.nn.functional.pad(mask_BT, (0, room), value=False)
        self.column_1 = torch.tensor([filled], device=running_B.device)
        self.count_1 = torch.zeros_like(self.column_1)
        self.cache = static_cache(policy.hf.config, states, filled + room)
        self.cache_argument = cache_argument(policy.backbone)

    def take(self, token_B: Tensor, logp_B: Tensor) -> None:
        """Tokens that were drawn."""
        self.token_B.copy_(token_B)
        self.logp_B.copy_(logp_B)

    def record(self) -> None:
        """Keep them."""
        self.answers.record(self.running_B, self.count_1, self.token_B, self.logp_B)

    def __call__(self) -> None:
        """Keep them, and compute the logits of the next."""
        self.record()
        self.mask_BL.index_fill_(1, self.column_1, True)
        output = self.policy.backbone(
            input_ids=self.token_B[:, None],
            attention_mask=self.mask_BL[:, None, None],
            position_ids=self.position_B[:, None],
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        self.logits_BV.copy_(self.policy.logits(output.last_hidden_state[:, -1]))
        for counter in (self.position_B, self.column_1, self.count_1):
            counter += 1

    def only(self, alive: Tensor) -> _Step:
        """The same for some of the sequences."""
        filled, columns = int(self.column_1), self.mask_BL.shape[1]
        states = [(layer.keys[alive, :, :filled], layer.values[alive, :, :filled]) for layer in self.cache.layers]
        smaller = _Step(
            self.policy,
            self.answers,
            self.running_B[alive],
            self.mask_BL[alive, :filled],
            columns - filled,
            states,
            self.logits_BV[alive],
        )
        smaller.count_1.copy_(self.count_1)
        return smaller
