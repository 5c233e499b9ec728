"""The ``decode`` section of scripts: all settings of the sampler, from a published one's."""

import dataclasses

from ml_collections import config_dict

from memdlm_jax.diffusion.samplers import SAMPLERS

_OPTIONAL = ("threshold", "editing_threshold")


def settings(sampler: str = "llada", **changes) -> config_dict.ConfigDict:
    """All fields of ``DecodeConfig``.

    Args:
        sampler: whose settings to start from, a name of ``SAMPLERS``.
        **changes: fields that differ from it.

    Raises:
        ValueError: there is no such sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} must be one of {', '.join(map(repr, SAMPLERS))}")
    fields = dataclasses.asdict(SAMPLERS[sampler]) | changes
    config = config_dict.ConfigDict()
    for name, value in fields.items():
        # A number or None; what it is otherwise is found out when the settings are built.
        config[name] = config_dict.FieldReference(value, object) if name in _OPTIONAL else value
    return config
