"""What ``experiments.evaluate`` compares: its settings, and the systems that they name."""

import dataclasses
from typing import Literal

from experiments import _memory, _model, _stages
from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.data.corpora import SourceConfig
from memdlm_jax.data.text import Split
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation.exposure_bias import ExposureConfig
from memdlm_jax.evaluation.likelihood import LikelihoodConfig
from memdlm_jax.evaluation.needles import NeedleSuite
from memdlm_jax.evaluation.retrieval import RetrievalConfig
from memdlm_jax.evaluation.systems import System
from memdlm_jax.evaluation.tasks import TaskSuite
from memdlm_jax.memory.config import MemoryConfig
from memdlm_jax.memory.inner_loop import InnerLoop

ONE_BY_ONE = DecodeConfig(length=1, block_length=1)
"""From left to right, see ``needles.left_to_right``."""


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Conversations for the held-out loss and the sampled replies.

    Attributes:
        path: JSON lines as for fine-tuning; empty takes ``source``.
        split: which lines of ``path``; ``all`` is for a file that nothing was trained on, empty is
            the split of everything else.
        rows: one of each conversation, at most this many.
        max_length: tokens of the longest row.
        samples: conversations to show replies to.
    """

    path: str = ""
    split: Literal["", "train", "validation", "test", "all"] = ""
    rows: int = 200
    max_length: int = 256
    samples: int = 3

    def __post_init__(self):
        if self.split and not self.path:
            raise ValueError(f"split={self.split!r} must be empty without path")
        if self.rows < 2:
            raise ValueError(f"rows={self.rows} must be at least 2")
        if not 0 <= self.samples <= self.rows:
            raise ValueError(f"samples={self.samples} must lie in [0, rows={self.rows}]")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """All settings of a comparison.

    Attributes:
        output: folder of ``results.json``, ``report.html`` and ``answers.jsonl``.
        memory: how ``memdlm`` writes prompts; from the command line, as in its training.
        decode: sampler of the needle answers.
        task_decode: sampler of the answers to tasks; each task has a ``length`` of its own.
        reply: sampler of the replies to held-out conversations.
        held_out: those conversations.
        mdlm: model folder trained without memory, or empty.
        memdlm: model folder trained with memory, or empty.
        needles: cells of the needle comparison; ``None`` leaves it out.
        likelihood: held-out loss; ``None`` leaves it out.
        tasks: cells of the benchmark tasks; ``None`` leaves them out.
        exposure: exposure bias on the held-out conversations; ``None`` leaves it out.
        retrieval: the probe of what memory alone knows; ``None`` leaves it out.
        source: corpus of the haystacks and the held-out conversations.
        haystack: folder of text for the haystacks; empty takes ``source``.
        split: held-out split that everything comes from, own conversations aside.
        seed: of memory, sampling noise and the choice of conversations; the tasks' memory and
            noise have those of their questions.
        max_length: longest canvas in tokens; 0 is what the model is meant for.
        batch_size: rows decoded at a time.
        dtype: of the activations, and of the parameters unless ``base`` says otherwise.
        base: how parameters are held; ``int8`` and ``nf4`` hold the layers' matrices as codes.
        under: model folder under folders that hold adapters; empty is the one that they name.
    """

    output: str
    memory: MemoryConfig
    decode: DecodeConfig
    reply: DecodeConfig
    held_out: HeldOutConfig
    task_decode: DecodeConfig = ONE_BY_ONE
    mdlm: str = ""
    memdlm: str = ""
    needles: NeedleSuite | None = None
    likelihood: LikelihoodConfig | None = None
    tasks: TaskSuite | None = None
    exposure: ExposureConfig | None = None
    retrieval: RetrievalConfig | None = None
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    haystack: str = ""
    split: Split = "test"
    seed: int = 0
    max_length: int = 0
    batch_size: int = 8
    dtype: _model.Dtype = "float32"
    base: _model.Base | None = None
    under: str = ""

    def __post_init__(self):
        if not self.output:
            raise ValueError("output='' must name a folder")
        for name, least in (("seed", 0), ("max_length", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("needles", "retrieval"):
            section = getattr(self, name)
            if section and section.task.split != self.split:
                raise ValueError(
                    f"{name}.task.split={section.task.split!r} must be split={self.split!r}"
                )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is compared.

    Attributes:
        systems: of the given folders.
        tokenizer: theirs.
        max_length: longest canvas in tokens.
        weights: system -> digest of its weights and of how they are held, those of a learned inner
            loop included.
    """

    systems: list[System]
    tokenizer: Tokenizer
    max_length: int
    weights: dict[str, str]


def load(config: EvaluateConfig) -> Loaded:
    """Load the systems of the given folders.

    Raises:
        ValueError: no folder is given, or two of them disagree on sizes or tokenizer.
    """
    systems: list[System] = []
    weights: dict[str, str] = {}
    tokenizers, models = {}, []
    for name, folder in (("mdlm", config.mdlm), ("memdlm", config.memdlm)):
        if not folder:
            continue
        under = config.under if hugging_face.is_adapter(folder) else ""
        denoiser, theta, tokenizer = _model.load(folder, config.dtype, config.base, under)
        tokenizers[tokenizer.digest()] = tokenizer
        # What is read, and how it is held and computed.
        held = [dataclasses.asdict(denoiser.config), config.dtype, config.base]
        digest = _stages.digest([hugging_face.weights_digest(folder, under or None), held])
        weights |= dict.fromkeys((name, "memdlm_train_only")[: 1 + (name == "memdlm")], digest)
        models.append(denoiser.config)
        if name == "mdlm":
            systems.append(System("mdlm", denoiser, theta))
        else:
            systems.append(System("memdlm_train_only", denoiser, theta))
            learned = _memory.inner_parameters(folder, denoiser, config.memory)
            inner_loop = InnerLoop(denoiser, config.memory)
            systems.append(System("memdlm", denoiser, theta, inner_loop, learned))
            if learned is not None:
                weights["memdlm"] += _memory.inner_digest(folder)[:12]
    if config.under and not any(map(hugging_face.is_adapter, (config.mdlm, config.memdlm))):
        raise ValueError(f"under={config.under!r} must be empty: no folder holds an adapter")
    if not systems:
        raise ValueError("mdlm='' and memdlm='': at least one must name a model folder")
    if len(tokenizers) > 1:
        raise ValueError(
            f"mdlm={config.mdlm} and memdlm={config.memdlm} differ in their tokenizers"
        )
    first, last = (dataclasses.asdict(model) for model in (models[0], models[-1]))
    if differ := [f"{k}={first[k]!r} and {last[k]!r}" for k in first if first[k] != last[k]]:
        raise ValueError(
            f"mdlm={config.mdlm} and memdlm={config.memdlm} must be models of one kind, they have "
            + ", ".join(differ)
        )
    max_length = config.max_length or models[0].max_length
    return Loaded(systems, next(iter(tokenizers.values())), max_length, weights)
