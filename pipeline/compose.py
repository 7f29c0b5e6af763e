"""Write params.yaml from conf/: `python -m pipeline.compose [group=option] [key=value]`.

The same composition as `dvc exp run -S ...`, without running anything; follow it with `dvc repro`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException

from pipeline import _params
from pipeline._store import write_text

CONF = Path(__file__).resolve().parent.parent / "conf"

_load = ConfigLoaderImpl.load_configuration
_override = ConfigLoaderImpl._apply_overrides_to_config


def compose(overrides: list[str]) -> dict[str, Any]:
    """The composition of conf/ with these overrides, as nested dictionaries.

    Raises:
        ParamsError: If an override names an unknown group, option or key, or a value that cannot be.
    """
    check_with(_params.ParamsError)
    with initialize_config_dir(str(CONF), version_base=None):
        return _params.plain(hydra_compose("config", overrides=overrides))


def check_with(error: type[Exception]) -> None:
    """From here on, a composition in this process that `_params` would refuse ends in `error`, with its one line.

    Hydra refuses an unknown key before we see it, in four lines that do not say what is allowed. DVC composes by
    itself and Hydra has no hook that comes early enough, so two of its methods are replaced: the one that sets values
    takes any key, and what the other one composes is checked.
    """

    def override(overrides: Any, config: Any) -> None:
        with _params.any_key(config):
            _override(overrides, config)

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            config = _load(self, *args, **kwargs)
            _params.parse(_params.plain(config))
        except (HydraException, ValueError) as problem:  # a group set to null is a ValueError to Hydra
            what, _, _ = str(problem).partition("Config search path")
            raise error(" ".join(what.split())) from None
        return config

    ConfigLoaderImpl._apply_overrides_to_config = override
    ConfigLoaderImpl.load_configuration = load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compose", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for instance data=fashion_mnist train.steps=2000")
    args = parser.parse_args()
    try:
        tree = compose(args.overrides)
    except _params.ParamsError as error:
        sys.exit(f"error: {error}")
    write_text("params.yaml", _params.to_yaml(tree))


if __name__ == "__main__":
    main()
