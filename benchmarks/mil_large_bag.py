"""One bag of many instances: peak memory and seconds of a training step.

python benchmarks/mil_large_bag.py [--instances 100000] [--features 1024] [--aggregator gated_abmil]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from medcl.config.mil import MILFitConfig
from medcl.mil.bags import Features
from medcl.mil.training import train


def main(instances: int, features: int, aggregator: str) -> None:
    rng = np.random.default_rng(0)
    bags = [Features(rng.standard_normal((n, features), dtype=np.float32)) for n in (instances, 100)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    config = MILFitConfig("", "", aggregator=aggregator, epochs=2, batch_size=1, balance="none")
    began = time.monotonic()
    train(config, bags, [0, 1], 2, seed=0)
    seconds = (time.monotonic() - began) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{aggregator}: {instances} x {features}: {peak:.1f} GiB at most ({before:.1f} with the bag alone), "
          f"{seconds:.1f} s a step")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--aggregator", default="gated_abmil")
    arguments = parser.parse_args()
    main(arguments.instances, arguments.features, arguments.aggregator)
