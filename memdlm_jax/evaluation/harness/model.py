"""A system as a model of lm-evaluation-harness (the extra ``lm-eval``).

``HarnessModel`` answers the three kinds of requests that the harness makes of a model.
``experiments.lm_eval`` registers it as ``memdlm_jax`` and builds it from the harness's
``--model_args``. The harness's own definitions are those of its version 0.4.13.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdlm_jax import processes
from memdlm_jax.data.tokenizer import Tokenizer
from memdlm_jax.diffusion import canvas
from memdlm_jax.diffusion.samplers import DecodeConfig
from memdlm_jax.evaluation import continuations, systems
from memdlm_jax.evaluation.harness.requests import (
    MAX_GEN_TOKS,
    Request,
    before,
    sampler,
    settings_of,
    windows,
)
from memdlm_jax.evaluation.likelihood import LikelihoodConfig, up_to
from memdlm_jax.evaluation.systems import System
from memdlm_jax.inference import data_parallel
from memdlm_jax.inference.generation import Generator, Prompts
from memdlm_jax.progress import Progress
from memdlm_jax.typing import Key

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({error}): pip install 'memdlm_jax[lm-eval]'"
    ) from error

PUBLIC_DECODE: Mapping[str, Any] = {"block_length": 0}
"""As LLaDA's public harness decodes: one block of the task's length, one token a step."""


class HarnessModel(LM):
    """A system under the harness.

    Every answer and score hangs on the seed and its own request alone (and on how often the very
    same request came before), not on the order of requests, their number, or the batch size.
    Several processes, all asked the same, share the requests out and all return the same.
    """

    def __init__(
        self,
        system: System,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        decode: Mapping[str, Any] = PUBLIC_DECODE,
        batch_size: int = 8,
        mc_samples: int = continuations.PUBLIC.samples,
        seed: int = 0,
    ):
        """Keep the system and how it is asked.

        Args:
            system: who answers; with memory every prompt and context is written first.
            tokenizer: text to ids. As in the public harness, the spelling of a special token in a
                text is that token; only the mask is refused.
            max_length: longest canvas in tokens.
            decode: fields of ``DecodeConfig`` but ``length``, which is the task's.
            batch_size: rows at a time.
            mc_samples: masked copies of a continuation for its log-likelihood.
            seed: of masks, memory and sampling noise.

        Raises:
            ValueError: a number is too small, or a field of the sampler wrong.
        """
        super().__init__()
        for name, value, least in (
            ("max_length", max_length, 2), ("batch_size", batch_size, 1), ("seed", seed, 0),
            ("mc_samples", mc_samples, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.system, self.vocabulary = system, tokenizer
        self._placed = data_parallel.replicate((system.theta, system.learned))
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        # Steps are checked with the length of each task.
        sampler({**decode, "steps": 0}, MAX_GEN_TOKS)
        self.decode = dict(decode)
        self.likelihood = LikelihoodConfig(mc_samples, seed)

    # What the harness asks for, by its names.

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests: tokenizer and template by content."""
        return f"memdlm_jax-{self.vocabulary.digest()}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, for the harness's records.

        Raises:
            ValueError: one is asked for by name.
        """
        if isinstance(chat_template, str) and chat_template:
            raise ValueError(
                f"apply_chat_template={chat_template!r} must be without a name: a model folder has "
                "one template"
            )
        chat = self.vocabulary.chat
        return (
            chat.source
            if chat
            else "".join(
                self._turn({"role": role, "content": "..."}) for role in ("user", "assistant")
            )
        )

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text that ends where the model goes on.

        Without a template of its own the model has the turns of our fine-tuning, ``<|user|>`` and
        ``<|assistant|>``; a system turn, which they do not have, opens the first user's turn.

        Args:
            chat_history: oldest first; roles are user and assistant, and a first one system.
            add_generation_prompt: open the model's turn; if not, the last message is the start of
                its answer, and nothing stands behind it.
        """
        messages = list(chat_history)
        start = "" if add_generation_prompt else messages.pop()["content"]
        if self.vocabulary.chat is not None:
            return self.vocabulary.chat.render(messages, True) + start
        if messages and messages[0]["role"] == "system":
            first, *messages = messages
            if not messages or messages[0]["role"] != "user":
                raise ValueError("a system turn must stand before a turn of the user")
            content = f"{first['content'].rstrip()}\n\n{messages[0]['content']}"
            messages[0] = {"role": "user", "content": content}
        opening = self.vocabulary.special.assistant
        return "".join(map(self._turn, messages)) + opening + start

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer the prompts of ``(context, gen_kwargs)``.

        Requests of like length and equal settings share a batch. A text ends before the first end
        of turn or sequence, before each of ``until``, and after ``max_gen_toks`` tokens.

        Raises:
            ValueError: a prompt is empty or leaves no room for its answer, or a setting is unknown
                or wrong; names it. Nothing has been decoded then.
        """
        asked = list(self._asked(requests))
        groups: dict[tuple[DecodeConfig, int, int], list[int]] = {}
        for i, request in enumerate(asked):
            groups.setdefault((request.config, *self._widths(i, request)), []).append(i)
        answers = [""] * len(asked)
        batches = []
        for group in sorted(groups, key=lambda group: (group[1:], group[0].length)):
            members = groups[group]
            size = min(self.batch_size, len(members))
            for start in range(0, len(members), size):
                batches.append((*group, size, members[start : start + size]))

        def answer(batch):
            *how, places = batch
            return places, self._answer([asked[i] for i in places], *how)

        _check_same([request.args for request in requests])
        with Progress("generate_until", len(asked), "request", quiet=disable_tqdm) as bar:
            for places, texts in processes.shared_out(batches, answer):
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                bar.update(len(places))
        return answers

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score the continuations of ``(context, continuation)``: (nats, is greedy).

        The number is the estimate of a lower bound; see ``continuations``.
        """
        pairs = [self._pair(i, *request.args) for i, request in enumerate(requests)]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for place, one in self._scores(pairs, "loglikelihood", disable_tqdm):
            found[place] = one.log_likelihood, one.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score the texts of ``(text,)`` in windows of ``max_length`` tokens; see ``windows``.

        Perplexities made of these sums are upper bounds, in expectation.
        """
        pairs, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            tokens = self._encode(i, text)
            found = windows(tokens, self.max_length)
            pairs += found
            owners += [i] * len(found)
        sums = [0.0] * len(requests)
        for place, one in self._scores(pairs, "loglikelihood_rolling", disable_tqdm):
            sums[owners[place]] += one.log_likelihood
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        memory = self.system.memory
        return {
            "memdlm_jax": {
                "system": self.system.name,
                "memory": None if memory is None else dataclasses.asdict(memory),
                "decode": self.decode,
                "max_length": self.max_length,
                "batch_size": self.batch_size,
                "mc_samples": self.likelihood.samples,
                "seed": self.seed,
            }
        }

    # How.

    def _turn(self, message: Mapping[str, str]) -> str:
        names = self.vocabulary.special
        openings = {"user": names.user, "assistant": names.assistant}
        if not openings.get(message["role"]):
            raise ValueError(
                f"role {message['role']!r} has no turn: this tokenizer has no chat template"
            )
        return openings[message["role"]] + message["content"] + names.eos

    def _encode(self, number: int, text: str) -> list[int]:
        return self._checked(number, self.vocabulary.encode(text, allow_special=True))

    def _pair(self, number: int, context: str, continuation: str) -> continuations.Pair:
        found = continuations.encode_pair(self.vocabulary, context, continuation, True)
        self._checked(number, [*found[0], *found[1]])
        return found

    def _checked(self, number: int, tokens: list[int]) -> list[int]:
        if not tokens:
            raise ValueError(f"request {number} is empty; it must have some text")
        if self.vocabulary.mask_id in tokens:
            raise ValueError(
                f"request {number} spells {self.vocabulary.special.mask!r}, the mask token: what "
                "it stands for would be read as missing"
            )
        return tokens

    def _scores(
        self, pairs: Sequence[continuations.Pair], name: str, quiet: bool
    ) -> Iterator[tuple[int, continuations.Score]]:
        _check_same(pairs)
        # Processes take turns with contexts: what is written into memory is written by one.
        turns = {tuple(context): 0 for context, _ in pairs}
        turns = {context: i % jax.process_count() for i, context in enumerate(turns)}
        mine = [i for i, (c, _) in enumerate(pairs) if turns[tuple(c)] == jax.process_index()]
        found = continuations.scores(
            self.system, [pairs[i] for i in mine], self.likelihood,
            pad_token_id=self.vocabulary.pad_id, max_length=self.max_length,
            batch_size=self.batch_size,
        )  # fmt: skip
        own = self._counted(found, mine, Progress(name, len(mine), "request", quiet=quiet))
        if not processes.several():
            return own
        return itertools.chain.from_iterable(processes.gather(list(own)))

    @staticmethod
    def _counted(
        found: Iterable[tuple[int, continuations.Score]], mine: Sequence[int], bar: Progress
    ) -> Iterator[tuple[int, continuations.Score]]:
        with bar:
            for place, one in found:
                bar.update()
                yield mine[place], one

    def _asked(self, requests: Sequence[Any]) -> Iterator[Request]:
        """The requests, in order."""
        seen: Counter[Request] = Counter()
        for i, request in enumerate(requests):
            context, given = request.args
            config, limit, until = settings_of(self.decode, given)
            config = systems.stopping(config, self.vocabulary)
            asked = Request(tuple(self._encode(i, context)), config, limit, until)
            yield dataclasses.replace(asked, repeat=seen[asked])
            seen[asked] += 1

    def _widths(self, number: int, request: Request) -> tuple[int, int]:
        """Columns of a prompt: as shown, and as written into memory in pieces (0: as shown)."""
        config, length = request.config, len(request.prompt)
        # Blocks that are counted from the row's start are whole at its end.
        whole = config.block_size if config.alignment == "row" else 1
        room = self.max_length // whole * whole - config.length
        chunk = self.system.memory.prompt_chunk if self.system.memory else 0
        if room < 1 or (length > room and not chunk):
            raise ValueError(
                f"request {number} has a prompt of {length} tokens; it must have at most "
                f"{max(room, 0)} (max_length={self.max_length} less {config.length} of the "
                "answer). With memory, memory_prompt_chunk lets longer ones be written in pieces, "
                "and their end be shown"
            )
        if chunk > self.max_length:
            raise ValueError(
                f"memory_prompt_chunk={chunk} must be at most max_length={self.max_length}"
            )
        systems.check_tokens(self.system.denoiser, [request.prompt], config)
        if length > room:
            return room, up_to(64, length)
        return min(room, up_to(64, length)), 0

    def _answer(
        self, asked: list[Request], config: DecodeConfig, shown: int, written: int, size: int
    ) -> list[str]:
        """Answers of one batch, filled up with its last request."""
        rows = [*asked, *[asked[-1]] * (size - len(asked))]
        pad = self.vocabulary.pad_id
        whole = None
        if written:
            whole = canvas.pad_left([row.prompt for row in rows], written, pad)
        ends = canvas.pad_left([row.prompt[-shown:] for row in rows], shown, pad)
        generator = Generator(self.system.denoiser, self.system.inner_loop, config)
        theta, learned = self._placed
        prompts = Prompts(self._keys(rows), *ends, written=whole)
        decoded = jax.device_get(data_parallel.generate(generator, theta, prompts, learned))
        if not np.isfinite(decoded.confidence).all():
            raise FloatingPointError(
                f"{self.system.name}: logits are not finite: the weights are damaged"
                + (", or memory_learning_rate is too large" if self.system.memory else "")
            )
        texts = []
        for i, row in enumerate(asked):
            own = dataclasses.replace(decoded, tokens=decoded.tokens[i : i + 1, : row.limit])
            (text,) = systems.replies(self.vocabulary, own, config.stop).texts
            texts.append(before(text, row.until))
        return texts

    def _keys(self, rows: Sequence[Request]) -> Key:
        keys, _ = continuations.context_keys([row.prompt for row in rows], self.seed)
        repeats = np.array([row.repeat for row in rows], np.uint32)
        again = jax.vmap(jax.random.fold_in)(keys, repeats)
        # The first has the keys of ``continuations``: a prompt is written as a context is there.
        return jnp.where(repeats == 0, keys, again)


def _check_same(asked: Sequence[Any]) -> None:
    """Raise ValueError unless all processes are asked the same."""
    if len(set(processes.gather(hashlib.sha256(repr(asked).encode()).hexdigest()))) > 1:
        raise ValueError(
            "the processes are asked different things: they read different tasks, or different "
            "caches of answers (--use_cache), which must then be removed"
        )
