"""Which layout of GPUs trains a stage of Video Pro, and why that one.

python examples/plan_cluster.py --stage video_pro_mr --gpus 128
"""

import argparse

from k5kernels.planner.candidates import Problem
from k5kernels.planner.explain import alternatives, why_best
from k5kernels.planner.search import search
from k5kernels.planner.stages import stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="video_pro_mr", help="a row of the report's Table 4")
    parser.add_argument("--gpus", type=int, default=128, help="how many there are")
    parser.add_argument("--gib", type=float, default=80.0, help="memory of one")
    options = parser.parse_args()

    problem = Problem(stage(options.stage), gpus=options.gpus, memory_bytes=options.gib * 2**30)
    result = search(problem, goal="wall-time")
    print(result.best.layout)
    print(why_best(result))
    for alternative in alternatives(result):
        print(f"{alternative.name}: {alternative.verdict}")


if __name__ == "__main__":
    main()
