"""List the zoo: `python -m tests.zoo [WORD ...]` shows the variants whose id has one of the words in it.

With --run each is built and run, and what ran is shown beside what is expected.
"""

from __future__ import annotations

import argparse
import logging
import time

from tests.zoo import Spec, observe, variants


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of ids")
    parser.add_argument("--run", action="store_true", help="build, run, and show the owners")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = [spec for name, spec in variants() if not options.words or any(word in name for word in options.words)]
    width = max((len(spec.id) for spec in chosen), default=0)
    for spec in chosen:
        print(
            f"{spec.id:{width}}  {spec.cores:5} cores  {spec.others} others  {spec.mask or '-'}  {spec.notes}".rstrip()
        )
        if options.run:
            _run(spec)
    models = {(spec.family, spec.name) for spec in chosen}
    cores, others = sum(spec.cores for spec in chosen), sum(spec.others for spec in chosen)
    print(f"{len(models)} architectures, {len(chosen)} variants, {cores} cores, {others} softmaxes that are none")


def _run(spec: Spec) -> None:
    start = time.perf_counter()
    case = spec.build()
    built = time.perf_counter()
    truth = observe(case.model, case.args, case.kwargs)
    print(f"    built in {built - start:.2f} s, observed in {time.perf_counter() - built:.2f} s")
    for core in truth.cores:
        print(f"    {core.spelling:7}  {core.queries:3} x {core.keys:3}  {core.mask:13}  {core.owner or '(the model)'}")
    for other in truth.others:
        print(f"    -  {other.owner}: {other.reason}")


if __name__ == "__main__":
    main()
