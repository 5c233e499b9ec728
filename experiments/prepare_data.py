"""Write a data set as sharded ArrayRecord files, once, and print what is in it.

    python -m experiments.prepare_data --config=experiments/configs/prepare_data.py

Training scripts do this by themselves; run it apart where many machines will read the files.
"""

from ml_collections import config_dict

from experiments import _cli
from memdlm_jax.data.prepare import DataConfig, prepare


def from_config_dict(config: config_dict.ConfigDict) -> DataConfig:
    """Build the settings.

    Raises:
        KeyError, TypeError, ValueError: naming the field, see ``_cli.build``.
    """
    return _cli.build(DataConfig, config.to_dict())


def main(config: DataConfig) -> None:
    """Run from the command line."""
    print(prepare(config).describe())


if __name__ == "__main__":
    _cli.run(from_config_dict, main, "experiments/configs/prepare_data.py")
