"""LoRA on film reviews in one call, with the rank to compare as a flag.

    for rank in 2 4 8 16 32 64; do
        python train_lora_basic.py --rank $rank --output_dir output_r${rank}
    done

Each output folder is an adapter that peft and vLLM load as it is.
"""

import argparse
import sys

import loralab
from loralab.errors import LoralabError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8, help="width of the update")
    parser.add_argument("--alpha", type=float, default=16.0, help="numerator of alpha / rank")
    parser.add_argument("--output_dir", required=True, help="a new folder for the adapter")
    parser.add_argument("--model", default="smollm2-135m", help="short name, folder or hub id")
    parser.add_argument("--data", default="movie-reviews", help="task name or file")
    parser.add_argument("--max_steps", type=int, default=40, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    run = loralab.train(
        model=options.model,
        data=options.data,
        output_dir=options.output_dir,
        method=loralab.LoRA(rank=options.rank, alpha=options.alpha),
        training=loralab.Training(max_steps=options.max_steps, seed=options.seed),
    )
    scores = run.scores["validation"]
    print(
        f"rank {options.rank}: {run.adapter.num_parameters:,} parameters, "
        f"validation {scores.main} {scores.metrics[scores.main]:.3f}, "
        f"loss {scores.metrics['loss']:.4f}, {run.seconds:.0f} s -> {run.output_dir}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoralabError as error:
        sys.exit(f"error: {error}")
