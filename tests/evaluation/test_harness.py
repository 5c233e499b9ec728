"""lm-evaluation-harness itself runs our models; its numbers are those of our own functions."""

import dataclasses
import functools
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from experiments import lm_eval as script  # noqa: E402
from memdlm_jax.data.chat import CHATML, ChatTemplate  # noqa: E402
from memdlm_jax.data.example import Example  # noqa: E402
from memdlm_jax.data.needles import string_match_all  # noqa: E402
from memdlm_jax.data.sft import EncodeConfig, Encoder  # noqa: E402
from memdlm_jax.data.tokenizer import Tokenizer  # noqa: E402
from memdlm_jax.data.tokenizer_files import SpecialTokens  # noqa: E402
from memdlm_jax.diffusion.samplers import SAMPLERS, DecodeConfig  # noqa: E402
from memdlm_jax.evaluation import continuations  # noqa: E402
from memdlm_jax.evaluation.continuations import Question  # noqa: E402
from memdlm_jax.evaluation.harness.model import HarnessModel  # noqa: E402
from memdlm_jax.evaluation.harness.requests import settings_of, windows  # noqa: E402
from memdlm_jax.evaluation.likelihood import LikelihoodConfig  # noqa: E402
from memdlm_jax.evaluation.systems import System, reply  # noqa: E402
from memdlm_jax.inference import generation  # noqa: E402
from memdlm_jax.typing import EVERYTHING  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = "memdlm_jax/assets/tiny"
TOYS = ROOT / "tests" / "golden" / "harness" / "tasks"
TASKS = ["toy_generate", "toy_choice", "toy_rolling"]
SHARED = "the cat sat on"


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ask(lm, *prompts, **given):
    return lm.generate_until([request("generate_until", p, given) for p in prompts], True)


@pytest.fixture(scope="module")
def models(systems, tokenizer):
    """The plain system and that with memory, under the harness; no two guesses are equal."""
    make = functools.partial(HarnessModel, max_length=64, batch_size=2, mc_samples=4, seed=5)
    unsure = [dataclasses.replace(s, theta=jax.tree.map(lambda x: x / 2, s.theta)) for s in systems]
    return [make(unsure[0], tokenizer), make(unsure[2], tokenizer)]


@pytest.fixture(scope="module")
def toys():
    """The toy tasks and their documents."""
    spec = importlib.util.spec_from_file_location("toy", TOYS / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    manager = TaskManager(include_path=str(TOYS), include_defaults=False)
    return manager, list(module.load()["test"])


def evaluated(lm, manager, tasks, **settings):
    found = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings
    )
    return found


def test_the_harness_reports_what_our_functions_say(models, toys, tokenizer):
    manager, docs = toys
    said = {}
    for lm in models:
        system, config = lm.system, LikelihoodConfig(4, 5)
        found = evaluated(lm, manager, TASKS)
        results = found["results"]
        assert found["config"]["memdlm_jax"]["system"] == system.name

        samples = found["samples"]["toy_generate"]
        ids = [tokenizer.encode(doc["text"]) for doc in docs]
        if system.memory is None:  # With it, draws hang on the number of the row there.
            direct = reply(system, tokenizer, ids, DecodeConfig(6, 0), seed=0, max_length=64).texts
            assert [s["resps"][0][0] for s in samples] == [t.split("x")[0] for t in direct]
        said[system.name] = [s["resps"][0][0] for s in samples]

        questions = [Question(doc["text"], tuple(doc["choices"])) for doc in docs]
        settings = {"max_length": 64, "batch_size": 2}  # One program for all.
        for metric, normalise in (("acc", "none"), ("acc_norm", "character")):
            choices = continuations.choose(
                system, tokenizer, questions, config, normalise=normalise, **settings
            )
            right = [c.best == doc["gold"] for c, doc in zip(choices, docs, strict=True)]
            assert results["toy_choice"][f"{metric},none"] == np.mean(right)
        for sample, choice in zip(found["samples"]["toy_choice"], choices, strict=True):
            for (value, greedy), one in zip(sample["filtered_resps"], choice.scores, strict=True):
                assert value == pytest.approx(one.log_likelihood, rel=1e-4)
                assert greedy == one.is_greedy
        said[system.name] += [s["filtered_resps"][0][0] for s in found["samples"]["toy_choice"]]

        texts = [f"{doc['text']} {' '.join(doc['choices'])}" for doc in docs]
        pairs = [pair for text in texts for pair in windows(tokenizer.encode(text), 64)]
        total = sum(
            one.log_likelihood
            for one in continuations.score(
                system, pairs, config, pad_token_id=tokenizer.pad_id, **settings
            )
        )
        words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
        rolling = results["toy_rolling"]
        assert rolling["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)
        assert rolling["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-3)
    plain, memory = said.values()
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain[3:], memory[3:], strict=True))


def test_long_texts_are_rolled_in_windows(systems, tokenizer):
    lm = HarnessModel(systems[0], tokenizer, max_length=10, mc_samples=4, batch_size=2)
    text = (
        "the cat sat on mats and saw how every green bird flew and sat on mats"
        + " and every cat" * 3
    )
    ids = tokenizer.encode(text)
    assert len(ids) % 10 and len(ids) > 20
    (total,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)], True)
    scores = continuations.score(
        systems[0],
        windows(ids, 10),
        LikelihoodConfig(4, 0),
        pad_token_id=0,
        max_length=10,
        batch_size=2,
    )
    assert total == pytest.approx(sum(one.log_likelihood for one in scores), rel=1e-5)
    with pytest.raises(ValueError, match="request 0 is empty"):
        lm.loglikelihood_rolling([request("loglikelihood_rolling", "")], True)


def test_an_answer_depends_on_its_request_alone(models):
    prompts = [SHARED, "how every green bird flew and saw " * 2, "every", "and saw how", SHARED]
    lm, given = models[1], {"max_gen_toks": 4, "temperature": 1.5, "do_sample": True}
    together = ask(lm, *prompts, **given)
    assert together[0] != together[4], "a repeated request is a sample of its own"
    assert ask(lm, *prompts[3::-1], **given) == together[3::-1]
    assert ask(lm, prompts[2], "green", **given)[0] == together[2]
    other = HarnessModel(lm.system, lm.vocabulary, max_length=64, batch_size=2, seed=6)
    assert ask(other, *prompts, **given) != together


def test_an_answer_is_greedy_under_the_memory_of_its_prompt(models, tokenizer, monkeypatch):
    """What the harness is answered is what ``continuations`` calls greedy; not without memory."""
    lm, seen, prompts = models[1], [], (SHARED, "every")
    generate = generation.generate

    def spy(*arguments, **settings):
        seen.append(generate(*arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(generation, "generate", spy)
    ask(lm, *prompts, max_gen_toks=6)
    answers = np.asarray(seen[0].tokens).tolist()
    pairs = [(tokenizer.encode(text), ids) for text, ids in zip(prompts, answers, strict=True)]
    settings = {"pad_token_id": 0, "max_length": 64, "batch_size": 2}
    for system, greedy in ((lm.system, True), (lm.system.with_memory(None), False)):
        found = continuations.score(system, pairs, LikelihoodConfig(4, lm.seed), **settings)
        assert all(one.is_greedy for one in found) == greedy


def test_prompts_are_never_cut_in_silence(models):
    plain, full = models
    long = "the cat sat on mats and " * 12
    with pytest.raises(ValueError, match="request 1 has a prompt of 74 tokens; it must have at mo"):
        ask(plain, SHARED, long, max_gen_toks=4)
    with pytest.raises(ValueError, match="context 0 has"):
        plain.loglikelihood([request("loglikelihood", long, " cat")], True)
    memory = dataclasses.replace(full.system.memory, prompt_chunk=32)
    pieces = full.system.with_memory(memory)
    lm = HarnessModel(pieces, full.vocabulary, max_length=64)
    # Only memory has seen where these two differ.
    given = {"max_gen_toks": 8}
    assert len(set(ask(lm, "bird " + long, "flew how " + long, **given))) == 2
    with pytest.raises(ValueError, match=r"request 0 spells .*, the mask token"):
        ask(plain, "a <|mask|>")


class Knowing:
    """A denoiser that knows the answers to some prompts, which it must see to the last token."""

    num_layers = 1
    mask_token_id = 1

    def __init__(self, answers, window, end):
        longest = max(len(answer) for _, answer in answers) + 1
        self.prompts = np.array([self.digest(np.array(prompt)) for prompt, _ in answers])
        self.answers = np.array([[*a, *[end] * (longest - len(a))] for _, a in answers])
        self.window, self.end = window, end

    def digest(self, tokens):
        """Of the tokens and their order; padding, 0, does not count."""
        xp = jnp if isinstance(tokens, jax.Array) else np
        place = xp.cumsum(tokens != 0, -1)
        return (tokens.astype(np.int32) * (place * place % 9973 + 7) % 1_000_003).sum(-1)

    def trunk(self, theta, tokens, context=EVERYTHING, *, split):
        start = tokens.shape[1] - self.window
        known = self.digest(tokens[:, :start])[:, None] == self.prompts
        at = np.clip(np.arange(tokens.shape[1]) - start, 0, self.answers.shape[1] - 1)
        said = jnp.asarray(self.answers)[jnp.argmax(known, -1)][:, at]
        return jnp.where(known.any(-1)[:, None], said, self.end)[..., None].astype(jnp.float32)

    def head(self, theta, phi, hidden, context=EVERYTHING, *, split):
        return hidden

    def readout(self, theta, last):
        return 20.0 * (jnp.arange(4096) == last)


@pytest.mark.parametrize(
    ("task", "window", "shares"), [("ruler_vt", 30, (5, 2, 0)), ("ruler_cwe", 120, (3, 0))]
)
def test_stock_ruler_tasks_reach_the_model_whole_and_are_scored_as_ours(
    task, window, shares, monkeypatch
):
    """The harness's own generators and scores; the model knows a share of each answer."""
    # Of the tasks with needles, from which these inherit; its import sorts millions of keys.
    unused = types.SimpleNamespace(generate_samples=None, get_haystack=None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ruler.prepare_niah", unused)
    tokenizer = Tokenizer.load(ROOT / MODEL / "tokenizer.json")
    manager = TaskManager(
        include_path=str(Path(lm_eval.__file__).parent / "tasks" / "ruler"),
        include_defaults=False,
        metadata={"max_seq_lengths": [2048], "pretrained": str(ROOT / MODEL)},
    )
    loaded, asked = manager.load([task]), []

    class Reader(HarnessModel):
        def generate_until(self, requests, disable_tqdm=False):
            asked.extend(requests)
            return [""] * len(requests)

    def score_of(kind, denoiser):
        lm = kind(System("mdlm", denoiser, {}), tokenizer, max_length=2048, batch_size=3)
        found = lm_eval.evaluate(lm, loaded, limit=len(shares), bootstrap_iters=0)
        said = [one["resps"][0][0].strip() for one in found["samples"][task]]
        return found["results"][task]["2048,none"], said

    assert score_of(Reader, None) == (0, [""] * len(shares))
    references = [one.doc["outputs"] for one in asked]
    answers = [" ".join(r[:n]) for r, n in zip(references, shares, strict=True)]
    prompts = [tokenizer.encode(one.args[0]) for one in asked]
    assert min(map(len, prompts)) > 1000
    # Of the last prompt it knows all but the first token, which must not be enough.
    table = [(p, tokenizer.encode(f" {a}")) for p, a in zip(prompts, answers, strict=True)]
    table[-1] = prompts[-1][1:], tokenizer.encode(" ".join(references[-1]))
    score, said = score_of(HarnessModel, Knowing(table, window, tokenizer.eos_id))
    assert said == answers
    ours = [string_match_all(*pair) for pair in zip(said, references, strict=True)]
    assert score == pytest.approx(np.mean(ours))
    assert np.mean(ours) == pytest.approx(np.mean(shares) / len(references[0]))


def test_chat_turns_are_those_of_fine_tuning(models, tokenizer):
    lm = models[0]
    turns = [
        {"role": "system", "content": "be short\n"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "on"},
    ]
    text = lm.apply_chat_template(turns)
    ours = Example(
        (("user", "be short\n\nthe cat"), ("assistant", "sat"), ("user", "on")), "x", "g", "s"
    )
    row = Encoder(tokenizer, EncodeConfig(64)).encode(ours)
    assert tokenizer.encode(text, allow_special=True) == row.tokens[: row.prompt_length].tolist()
    started = [*turns, {"role": "assistant", "content": "green"}]
    assert lm.apply_chat_template(started, add_generation_prompt=False) == text + "green"
    assert lm.tokenizer_name.startswith("memdlm_jax-") and "<|user|>" in lm.chat_template(True)
    with pytest.raises(ValueError, match="a system turn must stand before a turn of the user"):
        lm.apply_chat_template(turns[:1])
    with pytest.raises(ValueError, match="apply_chat_template='tools' must be without a name"):
        lm.chat_template("tools")
    special = SpecialTokens("<|pad|>", "<|mask|>", "<|eos|>", end_of_turn="<|user|>")
    chat = ChatTemplate(CHATML, {})
    other = HarnessModel(lm.system, Tokenizer(tokenizer._backend, special, chat), max_length=64)
    assert other.chat_template(True) == CHATML
    opened = "<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n"
    assert other.apply_chat_template(turns[3:]) == opened
    assert other.apply_chat_template([turns[3], turns[2]], False) == opened + "sat"


def test_the_harness_uses_the_template(models, toys):
    manager, docs = toys
    found = evaluated(
        models[0], manager, ["toy_generate"], apply_chat_template=True, fewshot_as_multiturn=True,
        system_instruction="be short",
    )  # fmt: skip
    (asked, _), *_ = found["samples"]["toy_generate"][0]["arguments"]
    assert asked == f"<|user|>be short\n\n{docs[0]['text']}<|eos|><|assistant|>"


def test_the_command_line(monkeypatch, capsys, tmp_path, toys):
    """The harness's own options, with a shipped model, memory on and off."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # As the script does, for this test alone.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    small = "memory_layer_fraction=0.2,memory_rank=2,memory_steps=1"
    for task, more in (("toy_generate", ""), ("toy_choice", f",memory=True,{small}")):
        arguments = [
            "run", "--model", "memdlm_jax", "--model_args",
            f"pretrained={MODEL},max_length=128,batch_size=3,mc_samples=2{more}",
            "--tasks", task, "--include_path", str(TOYS),
            "--output_path", str(tmp_path), "--log_samples",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        script.main()
        assert f"|{task}" in capsys.readouterr().out
    results = [json.loads(file.read_text()) for file in tmp_path.rglob("results_*.json")]
    names = {found["config"]["memdlm_jax"]["system"] for found in results}
    assert names == {"mdlm", "memdlm"}
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments[:4], "treshold=1", *arguments[5:]])
    with pytest.raises(SystemExit, match="error: model_args: treshold=1 is unknown: did you mean"):
        script.main()


def test_the_section_of_several_processes_is_taken_out_of_the_command_line():
    options = ["run", "--config.distributed.num_processes=2", "--tasks", "a",
        "--config.distributed.coordinator=h:1", "--config.distributed.process_id=1"]  # fmt: skip
    found, rest = script.distributed(options)
    assert rest == ["run", "--tasks", "a"] and (found.coordinator, found.process_id) == ("h:1", 1)
    assert script.distributed(["--config.distributed.auto=True"])[0].auto
    for wrong, said in (("port=1", "port is no field"), ("process_id=x", "process_id='x' is str")):
        with pytest.raises(ValueError, match=rf"config\.distributed\.{said}"):
            script.distributed([f"--config.distributed.{wrong}"])


def test_model_arguments():
    given = {"pretrained": "m", "threshold": 0.9, "memory": True, "memory_steps": 4, "seed": 3}
    config, decode, memory = script.parse(given)
    assert (config.pretrained, config.memory, config.seed, config.mc_samples) == ("m", True, 3, 128)
    assert decode == {"block_length": 0, "threshold": 0.9} and memory == {"steps": 4}
    _, fast, _ = script.parse({"pretrained": "m", "sampler": "fast", "block_length": 16})
    config = settings_of(fast, {"max_gen_toks": 40})[0]
    assert config == dataclasses.replace(SAMPLERS["fast"], length=48, block_length=16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "model_args.pretrained is missing"),
        ({"pretrained": ""}, "pretrained='' must name"),
        ({"treshold": 1}, "treshold=1 is unknown: did you mean 'threshold'"),
        ({"memory": True, "memory_stepz": 1}, "memory_stepz=1 is unknown: did you mean 'memory_st"),
        ({"zzz": 1}, "zzz=1 is unknown: known are base, batch_size"),
        ({"length": 8}, "length=8 is unknown: it is the task's max_gen_toks"),
        ({"memory_steps": 1}, "memory_steps needs memory=True"),
        ({"seed": "x"}, "model_args.seed='x' is str, must be int"),
        ({"mc_samples": 0}, "mc_samples=0 must be at least 1"),
        ({"sampler": "best"}, "sampler='best' must be one of llada, dllm"),
        ({"dtype": "int4"}, "dtype='int4' must be one of 'float32', 'bfloat16'"),
        ({"system": "mdlm", "memory": True}, "system='mdlm' with memory=True"),
        ({"system": "memdlm"}, "system='memdlm' with memory=False"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(given, said):
    with pytest.raises(ValueError, match=said) as raised:
        script.parse({"pretrained": "m"} | given if given else given)
    assert "\n" not in str(raised.value)


def test_what_the_model_folder_refuses_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    for changed, said in (
        ("memory_rank=0", r"model_args: memory_rank=0 must be at least 1"),
        ("memory_rank=x", r"model_args: memory_rank='x' is str, must be int"),
        ("threshold=2", r"decode\.threshold=2 must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=said):
            script.MemDLM.create_from_arg_string(f"pretrained={MODEL},memory=True,{changed}")
