"""The command line, cut off as by a kill right after the checkpoint of step 2: for tests/runtime/test_scale.py."""

from __future__ import annotations

import os
from typing import Any

from medcl.cli import main
from medcl.runtime.training import Checkpoints


class CutOff(Checkpoints):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == 2:
            trainer.strategy.barrier()  # it is written by the first process
            os._exit(9)


if __name__ == "__main__":
    import medcl.runtime.training

    medcl.runtime.training.Checkpoints = CutOff  # type: ignore[misc]
    main()
