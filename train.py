"""Train DOLG: python train.py --cfg FILE [KEY VALUE ...]"""

from core.config import load_cfg_from_args
from core.distributed import launch
from core.environment import entry_point
from core.output import output_folder
from core.trainer import train


@entry_point
def main(argv: list[str] | None = None) -> None:
    cfg = load_cfg_from_args("Train DOLG.", argv)
    with output_folder(cfg):
        launch(train, cfg)


if __name__ == "__main__":
    main()
