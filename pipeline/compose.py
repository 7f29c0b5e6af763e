"""Write params.yaml from conf/: `python -m pipeline.compose [group=option] [key=value]`.

The same composition as `dvc exp run -S ...`, without running anything; follow it with `dvc repro`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException

from pipeline import _params
from pipeline._store import write_text

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(overrides: list[str]) -> dict[str, Any]:
    """The composition of conf/ with these overrides, as nested dictionaries.

    Raises:
        ParamsError: If an override names an unknown group, option or key.
    """
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            return _params.plain(hydra_compose("config", overrides=overrides))
    except (HydraException, ValueError) as error:  # a group set to null is a ValueError to Hydra
        raise _params.ParamsError(" ".join(str(error).split())) from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compose", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="for instance data=fashion_mnist train.steps=2000")
    args = parser.parse_args()
    try:
        tree = compose(args.overrides)
        _params.parse(tree)
    except _params.ParamsError as error:
        sys.exit(f"error: {error}")
    write_text("params.yaml", _params.to_yaml(tree))


if __name__ == "__main__":
    main()
