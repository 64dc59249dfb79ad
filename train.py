"""Train DOLG: python train.py --cfg FILE [KEY VALUE ...]"""

from core.base.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> None:
    import functools

    from core.arguments import load_cfg_from_args  # here: a missing package is told in one line
    from core.checkpoints.output import output_folder
    from core.processes.launch import launch
    from core.processes.meeting import told_once
    from core.trainer import train
    from evaler.during_training import check_sets, score_sets

    with told_once():
        cfg = load_cfg_from_args("Train DOLG.", argv)
        check_sets(cfg)
        with output_folder(cfg):
            launch(functools.partial(train, score=score_sets), cfg)


if __name__ == "__main__":
    from core.base.door import run

    run("train")
