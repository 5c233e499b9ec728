"""The decode loop against recorded runs of the published samplers: ids, canvases, commit order."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from memdlm_jax.checkpoints import hugging_face
from memdlm_jax.diffusion import decode
from memdlm_jax.diffusion.samplers import SAMPLERS, DecodeConfig
from memdlm_jax.inference import generation
from memdlm_jax.inference.generation import Generator, Prompts

GOLDEN = Path(__file__).parents[1] / "golden" / "backbones"
load = functools.cache(hugging_face.load)


def recorded(name):
    with np.load(GOLDEN / name / "golden_sampler.npz") as file:
        return dict(file)


def run(name, config, prompts, valid=None, record=False):
    """What the loop decodes, with the mask token that was recorded."""
    denoiser, theta = load(GOLDEN / name)
    denoiser = denoiser.with_config(mask_token_id=int(recorded(name)["mask_id"]))
    valid = np.ones(prompts.shape, bool) if valid is None else valid.astype(bool)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    generator = Generator(denoiser, None, config)
    decoded = generation.generate(generator, theta, Prompts(keys, prompts, valid), record=record)
    return jax.device_get(decoded), denoiser.mask_token_id


def check(golden, prefix, config, decoded, mask, prompt_length):
    """Everything that was recorded under a prefix."""
    rows = slice(prompt_length, prompt_length + config.length)
    np.testing.assert_array_equal(decoded.tokens, golden[f"{prefix}_ids"][:, rows])
    if f"{prefix}_unmask_step" in golden:
        order = golden[f"{prefix}_unmask_step"][:, rows]
        np.testing.assert_array_equal(decoded.commit_step, order)
    if f"{prefix}_history" in golden:
        canvases = golden[f"{prefix}_history"][:, :, rows]
        np.testing.assert_array_equal(decode.history(decoded, mask), canvases)
    if f"{prefix}_nfe" in golden:
        assert decoded.steps.max() == golden[f"{prefix}_nfe"]


LLADA = DecodeConfig(length=16, block_length=8, steps=8)


@pytest.mark.parametrize("cache", ["none"])
@pytest.mark.parametrize("scale", [0, 1.5])
@pytest.mark.parametrize("batch", [1, 2])
def test_llada(batch, scale, cache):
    golden = recorded("llada_dense")
    config = dataclasses.replace(LLADA, guidance=float(scale), cache=cache)
    prompts = golden["prompt"] if batch == 1 else golden["prompt_b2"]
    valid = None if batch == 1 else golden["attention_mask_b2"]
    decoded, mask = run("llada_dense", config, prompts, valid)
    check(golden, f"b{batch}_cfg{scale}", config, decoded, mask, prompts.shape[1])
    assert (decoded.whole, decoded.parts) == (8, 0)


@pytest.mark.parametrize("scale", [0, 1.5])
def test_dllm_pads_on_the_right(scale):
    golden = recorded("llada_dense")
    config = dataclasses.replace(SAMPLERS["dllm"], length=16, block_length=8, steps=8)
    config = dataclasses.replace(config, guidance=float(scale))
    long, short = golden["prompt_b2"][0], golden["p2"]
    width = len(long)
    prompts = np.stack([long, np.r_[short, np.zeros(width - len(short), int)]])
    valid = np.arange(width) < np.array([[width], [len(short)]])
    decoded, mask = run("llada_dense", config, prompts, valid)
    theirs = golden[f"dllm_b2_cfg{scale}_history"]
    ours = decode.history(decoded, mask)
    for row, begin in enumerate((width, len(short))):
        np.testing.assert_array_equal(ours[:, row], theirs[:, row, begin : begin + 16])


@pytest.mark.parametrize("sampler", ["llada", "dllm"])
def test_uneven_quotas(sampler):
    golden = recorded("llada_dense")
    config = dataclasses.replace(SAMPLERS[sampler], length=16, block_length=16, steps=6)
    decoded, mask = run("llada_dense", config, golden["prompt"])
    check(golden, f"uneven_{sampler}", config, decoded, mask, golden["prompt"].shape[1])


# Programs with a cache compile slowly: one threshold of each sampler, that which commits the most.
@pytest.mark.parametrize(("threshold", "cache"), [(0.95, "none"), (0.35, "none"), (0.35, "prefix")])
@pytest.mark.parametrize("name", ["llada2_0", "llada2_1"])
def test_llada2_threshold(name, threshold, cache):
    golden = recorded(name)
    config = dataclasses.replace(
        SAMPLERS["llada2"], length=10, block_length=4, steps=12, threshold=threshold, cache=cache
    )
    decoded, mask = run(name, config, golden["prompt"])
    check(golden, f"memdlm_th{threshold}", config, decoded, mask, golden["prompt"].shape[1])
    passes = golden[f"memdlm_th{threshold}_nfe"]
    assert (decoded.whole, decoded.parts) == ((passes, 0) if cache == "none" else (1, passes - 1))


@pytest.mark.parametrize(
    ("thresholds", "cache"),
    [((0.7, 0.5), "none"), ((0.3, 0.2), "none"), ((0.95, 0.9), "none"), ((0.3, 0.2), "prefix")],
)
@pytest.mark.parametrize("name", ["llada2_0", "llada2_1"])
def test_llada2_editing(name, thresholds, cache):
    golden = recorded(name)
    commit, edit = thresholds
    config = dataclasses.replace(
        SAMPLERS["llada2_1_quality"], length=10, block_length=4, steps=12, threshold=commit,
        editing_threshold=edit, cache=cache, post_steps=4,
    )  # fmt: skip
    decoded, mask = run(name, config, golden["prompt"], record=True)
    check(golden, f"edit_th{commit}_ed{edit}", config, decoded, mask, golden["prompt"].shape[1])


@pytest.mark.parametrize("sampler", ["official", "dllm"])
@pytest.mark.parametrize("order", ["maskgit_plus", "entropy", "topk_margin"])
def test_dream(order, sampler):
    golden = recorded("dream")
    ours = {"maskgit_plus": "confidence", "topk_margin": "margin"}.get(order, order)
    quotas = "timesteps" if sampler == "official" else "scheduler"
    config = dataclasses.replace(
        SAMPLERS["dream"], length=10, block_length=10, steps=5, temperature=0.0, top_p=1.0,
        order=ours, quotas=quotas,
    )  # fmt: skip
    decoded, mask = run("dream", config, golden["prompt"])
    prefix = order if sampler == "official" else f"dllm_{order}"
    check(golden, prefix, config, decoded, mask, golden["prompt"].shape[1])
