"""Which model to use and how: the options that every role (policy, reward, value, reference) shares."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_align.accelerate import KERNELS, Kernel
from lit_align.utils.model_folder import find_model, is_adapter

Head = Literal["own", "torch", "liger"]

# Ways to start adapters that leave the model below as it is, by peft's name.
INITS: dict[str, bool | Literal["gaussian", "orthogonal"]] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}


@dataclass
class Lora:
    """Low-rank adapters in place of full fine-tuning (Hu et al. 2021).

    Attributes:
        r: rank of the update.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: on the adapter's input. Keep 0 for PPO: a policy that drops units is not the policy that sampled.
        targets: names of the layers to adapt, or all-linear for every linear one but the head; `experts` for those of a
            mixture, which are parameters without a layer.
        export: what a run leaves: a whole model with the adapters folded in, which the next stage can start from, or
            the adapter alone, megabytes, which peft and transformers put on the model that it was trained on.
        rslora: multiply the update by alpha / sqrt(r) (Kalajdzievski 2023).
        dora: learn the length of each row of a weight apart from its direction (Liu et al. 2024).
        init: how adapters start, always from no update: default (one matrix from a uniform distribution, the other 0),
            gaussian (from a normal one), orthogonal (two matrices whose product is 0; even ranks).
        modules_to_save: names of modules that are trained whole beside the adapters, as in embed_tokens and lm_head.
            Weights that the model ties stay tied.
        rank_pattern: another rank for some layers, by the end of their name, as in {v_proj: 32}.
        alpha_pattern: another alpha for some layers, likewise.
        adapter: folder of an adapter to go on training, by this program or peft; rank and places are then its own. The
            reference is the model with that adapter.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    export: Literal["merged", "adapter"] = "merged"
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    modules_to_save: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, rank in {
            "r": self.r,
            **{f"rank_pattern.{key}": rank for key, rank in self.rank_pattern.items()},
        }.items():
            if rank < 1:
                raise ValueError(f"lora.{name} must be 1 or more, got {rank}")
        if self.init not in INITS:
            why = " (it changes the model below the adapters, so that the reference would be another model)"
            reason = why if self.init.split("_")[0] in ("pissa", "olora", "corda", "loftq", "eva", "lora") else ""
            raise ValueError(f"lora.init must be one of {', '.join(INITS)}, got {self.init!r}{reason}")
        self.adapter = None if self.adapter is None else find_model(os.fspath(self.adapter))
        both = sorted({*self.modules_to_save} & {*self.targets})
        if both:
            raise ValueError(
                f"lora: {both[0]!r} is in targets and in modules_to_save: an adapter or the whole, not both"
            )


class ModelName(str):
    """The name of a model that was given as an object, and the object: `model`."""

    model: Any

    def __new__(cls, model: Any) -> ModelName:
        """Name a model.

        Raises:
            TypeError: it is none.
        """
        if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
            expected = "expected a Network, or the name or folder of a model"
            raise TypeError(f"{expected}, got {model!r:.80}: it is no model of transformers")
        name = super().__new__(cls, getattr(model, "name_or_path", "") or type(model).__name__)
        name.model = model
        return name


@dataclass
class Network:
    """A model from the hub, from a folder, or with random weights from a configuration.

    Attributes:
        name: hub name or folder, in Hugging Face format. The folder of an adapter means its base model with the adapter
            merged in.
        adapter: folder of an adapter to merge into the model `name`.
        new_tokens: special tokens to add to the tokenizer, such as <|im_start|> and <|im_end|>. Each gets an embedding
            row that starts as the mean of all rows. With `lora`, the embeddings are then trained as a whole.
        weights: pretrained; or random, which takes only the configuration and starts from scratch.
        dtype: dtype of the weights in memory. The default keeps fp32 master weights; the Trainer's `precision` chooses
            the precision of computation.
        dropout: value for every dropout of the model; null keeps those of its configuration.
        lora: train low-rank adapters and freeze the rest.
        attention: attention implementation; null lets transformers choose. flex_attention (GPUs only) skips the masked
            parts of packed rows; sdpa computes them.
        activation_checkpointing: recompute activations in backward to save memory.
        compile: run packed batches through torch.compile, with dynamic shapes and a dense mask; sampling is not
            compiled. On a CPU it needs a C++ compiler. The gain was not measured.
        kernels: kernels of `lit_align.accelerate` that this model uses on a CPU, each only if a probe finds that it
            computes the same; null for all, [] for the model as transformers runs it.
        head: kernel that computes log-probabilities if the logits are too many to keep in memory (few logits are kept).
            own: lit_align's kernel, which recomputes logits in backward. torch: `linear_cross_entropy` of torch 2.13,
            in fp32: less memory, and slower on a CPU. liger: Liger's GPU kernel (extra `liger`). Cases that torch and
            liger do not support (entropies, a nucleus, a head that is more than a product) fall back to own, and the
            log says so. PPO supports only own.
        router_loss: weight of the load-balancing loss of a mixture of experts in SFT, DPO and reward models. null takes
            `router_aux_loss_coef` of the model's configuration if that has `output_router_logits: true`, else 0. PPO
            adds none. If `dropout` is a number, routing noise is off too.
        trust_remote_code: run model code that comes with the weights.
        revision: hub revision.
        shared: only for PPO's value and reward: use adapters and a head on the policy's backbone instead of a separate
            model. `name` is the folder of a reward model's adapter, or the policy's own name for a new value adapter.
    """

    name: str
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    dropout: float | None = 0.0
    lora: Lora | None = None
    attention: Literal["sdpa", "eager", "flex_attention"] | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    kernels: list[Kernel] | None = None
    head: Head = "own"
    router_loss: float | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    shared: bool = False
    adapter: str | None = None
    new_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if wrong := [name for name in self.kernels or () if name not in KERNELS]:
            raise ValueError(f"network.kernels: {wrong[0]!r} is none of {', '.join(KERNELS)}")
        if self.router_loss is not None and not (0 <= self.router_loss < float("inf")):
            raise ValueError(f"network.router_loss must be 0 or more, got {self.router_loss}")
        # In Python, `name` may be a model object or a Path. The folder of a run means the model in it.
        if not isinstance(self.name, (str, os.PathLike)):
            self.name = ModelName(self.name)
        if not isinstance(self.name, ModelName):
            self.name = find_model(os.fspath(self.name))
        elif self.weights == "random":
            raise ValueError('network.weights: "random" takes a name: a model that is given has its weights')
        if self.weights == "random" and self.lora is not None and self.lora.export == "adapter":
            raise ValueError("lora.export: an adapter is nothing without the random weights that it was trained on")
        self.adapter = None if self.adapter is None else find_model(os.fspath(self.adapter))
        below = self.adapter or (self.name if is_adapter(self.name) else None)
        if below and self.lora is not None and (self.lora.export == "adapter" or self.lora.adapter):
            what = "lora.export: adapter" if self.lora.export == "adapter" else "lora.adapter"
            raise ValueError(
                f"{what} needs a whole model below, and {below!r} is an adapter: name that model as network.name and "
                "the adapter as lora.adapter to go on training it, or write lora.export: merged"
            )
        if self.weights == "random" and (below or (self.lora is not None and self.lora.adapter)):
            raise ValueError("weights: random has no weights that the adapter was trained on: write pretrained")


def as_network(given: Network | str | os.PathLike[str]) -> Network:
    """Make a network from a network, or from a name or folder.

    Raises:
        TypeError: the argument is none of these.
    """
    if isinstance(given, Network):
        return given
    return Network(given)  # type: ignore[arg-type]
