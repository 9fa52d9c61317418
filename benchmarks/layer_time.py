"""What a rounding takes for one linear layer, and which functions: where `block_time.py` says that rounding dominates.

    python benchmarks/layer_time.py --rounding gptq quantease --shape 4096 4096 --scheme w3a16g128

Random weights, and inputs whose channels' sizes span a factor of ten. Figures of an earlier commit: the same file in a
checkout of that commit.
"""

import argparse
import cProfile
import pstats
import time

from children import examples, fix_environment


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--rounding", nargs="+", default=["gptq", "quantease"])
    add("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("OUT", "IN"))
    add("--scheme", default="w3a16g128")
    add("--tokens", type=int, default=2048, help="of which the second moment is made")
    add("--functions", type=int, default=12, help="how many are listed")
    add("--threads", type=int, default=1)
    options = parser.parse_args()
    fix_environment(options.threads)
    for name in options.rounding:
        profile = measure(name, options)
        print(f"{name}, {options.scheme}, {options.shape[0]} x {options.shape[1]}: CPU seconds")
        pstats.Stats(profile).sort_stats("cumulative").print_stats("bitfold", options.functions)


def measure(name: str, options: argparse.Namespace) -> cProfile.Profile:
    """The profile, in CPU seconds, of finding a range and of rounding."""
    import torch

    from bitfold.numerics import Scheme, to_groups
    from bitfold.ranges import RANGES
    from bitfold.rounding import ROUNDINGS, Layer, Rounding
    from bitfold.statistics import InputStatistics

    generator = torch.Generator().manual_seed(0)
    rows, columns = options.shape
    scheme = Scheme.parse(options.scheme).weight
    assert scheme is not None
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    inputs = torch.randn(options.tokens, columns, generator=generator)
    rounding, found = ROUNDINGS[name](), RANGES["output_error"]()
    if not isinstance(rounding, Rounding):
        raise SystemExit(f"{name} rounds by the loss of a block: see block_time.py")
    statistics = InputStatistics(frozenset({"gram"}), options.tokens)
    statistics.update(inputs * torch.logspace(0, 1, columns))
    profile = cProfile.Profile(time.process_time)
    with profile:
        limits = found.limits(to_groups(weight, scheme), scheme, statistics.gram)
        rounding.solve({"layer": Layer(weight, limits, scheme)}, torch.bfloat16, statistics)
    return profile


if __name__ == "__main__":
    main()
