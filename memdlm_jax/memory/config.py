"""All settings of the Parametric Memory in one validated place."""

import dataclasses
import math
import typing
from typing import Literal

from memdlm_jax import registry

FFN_MODULES = ("mlp",)

_NAMED_PARTS = {
    "masking": registry.MASKING_STRATEGIES,
    "loss": registry.INNER_LOSSES,
    "optimizer": registry.INNER_OPTIMIZERS,
    "meta_gradient": registry.META_GRADIENTS,
}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Settings of fast weights, trajectory, inner loop and meta-gradient (paper, section 4).

    Four fields name a part of the method: ``masking``, ``loss``, ``optimizer`` and
    ``meta_gradient``. Each takes a registered name or ``"my_module:my_part"`` (see
    ``memdlm_jax.registry``). A model folder stores these names, so that everything that writes
    memory later uses the parts that were trained with.

    Attributes:
        masking: strategy that draws the states the inner loop learns from, see
            ``memory.trajectory``: ``pmc`` (from a pre-anchor state to the anchor; the paper),
            ``pre_only``, ``no_progressive``, ``progressive_memory``; ``cover`` writes a whole text:
            every token is a target exactly once per pass.
        steps: K, number of states of ``pmc`` and ``progressive_memory``, or of one pass of
            ``cover``. With ``pmc``, 1 stops before the anchor, 2 is the paper's default, more put
            K - 2 states in between.
        passes: of ``cover`` over the text, each with fresh masks.
        deal: how ``cover`` shares the tokens out: at ``random``, or ``spread``, so that
            neighbours are not masked together.
        epochs: times the trajectory is walked; phi is kept from one to the next.
        unroll: differentiate only the last so many inner steps exactly; what the earlier ones read
            is a constant, as in ``first_order``. 0 for all.
        pre_anchor_scale: s >= 1; the pre-anchor state masks min(M, floor(s n)) of M maskable
            positions where the anchor masks n.
        prompt_mask_ratio: in (0, 1]; anchor mask ratio when a prompt is written into memory, and
            the last ratio of ``progressive_memory``.
        prompt_chunk: longest piece, in tokens, that a prompt is written in; 0 writes it whole, so
            that it must fit the model.
        pieces: pieces of a prompt and segments of a text are written one after the other
            (``sequence``), or together (``parallel``): each inner step adds up their gradients.
        adapt_every: blocks between further inner steps on prompt and committed text while
            decoding; 0 for none, as in the paper, which names it as future work.
        padding: supervised padding (``Batch.padding``) is learnt by the inner loop like a response
            (``none``) or stays visible there (``inner``). For the outer loss, with and without
            memory, see ``LossConfig.padding``.
        loss: inner loss, see ``memory.inner_loop``: ``ce`` on the clean tokens, or a distance to
            the prediction of the same, frozen model on the next, more revealed state: ``distill``
            (KL from teacher to student), ``distill_reverse`` (from student to teacher),
            ``distill_hidden`` (last hidden states).
        hidden_distance: ``mse`` or ``cosine``, of ``distill_hidden``.
        temperature: divides both logits of ``distill`` and ``distill_reverse``.
        supervise: positions in an inner loss: all masked ones (``student_masked``) or those that
            the next state reveals (``newly_revealed``; a last state has none and keeps all).
        weighting: of the rows in an inner loss: ``scheduler``, w(mask ratio), or ``uniform``.
        normalisation: divide a group's inner loss by its supervised tokens (``token``) or rows
            (``batch``), or each row's by its supervised tokens, times rows (``sequence``: the
            public code has this factor; with one row in a group it equals ``token``), or by
            nothing (``sum``: each token is written as strongly in a long text as in a short one).
        optimizer: inner optimiser, see ``memory.inner_loop``: ``sgd``, clipped as below.
        learning_rate: eta of the inner SGD.
        clip: of the inner gradient: ``local`` bounds the norm of every matrix of every layer,
            ``global`` the norm of all matrices of a group together, ``none`` clips nothing.
        clip_norm: that bound; unused with ``none``.
        adapter: ``lora`` (A random, B = 0) or ``full`` (one dense matrix, zero at the start).
        rank: r of a LoRA fast weight.
        alpha: a LoRA fast weight is scaled by alpha / rank.
        dropout: in [0, 1); probability with which each input of a fast weight is dropped in
            training, in inner steps and outer loss, but not by a distillation teacher.
        layer_fraction: in (0, 1]; the layers from ``int(n_layers * (1 - fraction))`` on adapt.
        target_modules: what adapts inside a layer: paths of matrices, or of modules with all the
            matrices below them, or parts of such paths (``("mlp",)`` with every expert and the
            shared one, ``("attention",)``, ``("up_proj", "down_proj")``). Routers never adapt.
        scope: who shares fast weights: ``example`` (every row has its own), ``global`` (one for
            the whole batch, whatever the devices), or ``device`` (consecutive rows in ``groups``
            equal parts; what the public code does per process).
        groups: memories of an optimiser step's whole batch in ``device`` scope, over all devices
            and micro-batches; 0 in the other scopes.
        meta_gradient: ``first_order`` (the paper: inner gradients are constants of the outer
            loss), ``trunk_stopped`` (exact through fast weights and head layers) or ``exact``; see
            ``memory.meta_gradient``.
        learned: parts of the inner loop that are trained along with theta, any of ``rates`` (a
            learning rate per inner step, matrix and layer, starting at ``learning_rate``) and
            ``start`` (phi_0's A, or the dense matrix); beyond the paper, see ``InnerParameters``.
    """

    masking: str = "pmc"
    steps: int = 2
    passes: int = 1
    deal: Literal["random", "spread"] = "spread"
    epochs: int = 1
    unroll: int = 0
    pre_anchor_scale: float = 1.5
    prompt_mask_ratio: float = 0.2
    prompt_chunk: int = 0
    pieces: Literal["sequence", "parallel"] = "sequence"
    adapt_every: int = 0
    padding: Literal["none", "inner"] = "none"
    loss: str = "ce"
    hidden_distance: Literal["mse", "cosine"] = "mse"
    temperature: float = 1.0
    supervise: Literal["student_masked", "newly_revealed"] = "student_masked"
    weighting: Literal["scheduler", "uniform"] = "scheduler"
    normalisation: Literal["token", "sequence", "batch", "sum"] = "token"
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    clip: Literal["local", "global", "none"] = "local"
    clip_norm: float = 1.0
    adapter: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    layer_fraction: float = 0.1
    target_modules: tuple[str, ...] = FFN_MODULES
    scope: Literal["example", "global", "device"] = "example"
    groups: int = 0
    meta_gradient: str = "first_order"
    learned: tuple[Literal["rates", "start"], ...] = ()

    def __post_init__(self):
        for field, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                self._one_of(field, getattr(self, field), typing.get_args(hint))
        for field, table in _NAMED_PARTS.items():
            table(getattr(self, field), f"memory.{field}")
        for field in ("steps", "passes", "epochs", "rank"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        for field in ("prompt_chunk", "adapt_every", "unroll"):
            self._require(field, getattr(self, field) >= 0, "at least 0")
        for field in ("learning_rate", "clip_norm", "alpha", "temperature"):
            self._require(field, 0 < getattr(self, field) < math.inf, "positive and finite")
        self._require("pre_anchor_scale", 1 <= self.pre_anchor_scale < math.inf, "at least 1")
        for field in ("prompt_mask_ratio", "layer_fraction"):
            self._require(field, 0 < getattr(self, field) <= 1, "in (0, 1]")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        if self.masking in ("pre_only", "no_progressive"):
            self._require("steps", self.steps <= 2, f"1 or 2: masking={self.masking!r} has 1 state")
        if self.masking in ("pmc", "pre_only", "no_progressive", "progressive_memory"):
            self._require("passes", self.passes == 1, f"1 with masking={self.masking!r}")
        self._require("unroll", not self.unroll or not self.distils, "0 with a loss that distils")
        self._require(
            "unroll", self.unroll <= self.inner_steps, f"at most {self.inner_steps} steps"
        )
        self._require("target_modules", bool(self.target_modules), "non-empty")
        if self.scope == "device":
            self._require("groups", self.groups >= 1, "at least 1 with scope='device'")
        else:
            self._require("groups", self.groups == 0, f"0 with scope={self.scope!r}")
        for part in self.learned:
            self._one_of("learned", part, ("rates", "start"))
        self._require("learned", len(set(self.learned)) == len(self.learned), "without repeats")

    @property
    def inner_steps(self) -> int:
        """Steps of the inner loop on one text."""
        one = self.masking in ("pre_only", "no_progressive")
        return self.epochs * (1 if one else self.steps * self.passes)

    @property
    def distils(self) -> bool:
        """Whether the inner loss compares with a teacher."""
        return getattr(registry.INNER_LOSSES(self.loss), "needs_teacher", False)

    def _require(self, field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"memory.{field}={getattr(self, field)!r} must be {right}")

    def _one_of(self, field: str, value: object, choices: tuple) -> None:
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"memory.{field}={value!r} must be one of {listed}")
