"""Measure the time of one decoding pass by the number of rows and the quantization of the weights.

python benchmarks/answer_passes.py MODEL [--quantization none,int8,nf4] [--rows 1,4,16,64] [--passes 40]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from strop.engine.decode.batch import Batch
from strop.engine.decode.decoder import CompiledDecoder
from strop.engine.decode.model import load
from strop.engine.decode.sampling import SequenceState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantization", default="none,int8,nf4")
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--passes", type=int, default=40)
    args = parser.parse_args()
    schemes, widths = args.quantization.split(","), [int(rows) for rows in args.rows.split(",")]
    decoders = {
        scheme: CompiledDecoder(load(args.model, dtype="bf16", quantization=scheme).module, max(widths) * 512)
        for scheme in schemes
    }
    random = np.random.default_rng(0)
    for rows in widths:
        batches = {
            scheme: Batch(decoder, rows, prefill_rows=512, speculative=False) for scheme, decoder in decoders.items()
        }
        took: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        for batch in batches.values():
            for _ in range(rows):
                batch.add(
                    SequenceState(
                        random.integers(3, 40_000, 100).astype(np.int32), None, max_new_tokens=args.passes + 100
                    )
                )
            while any(text.length == text.prompt_length for text in batch.sequences):
                batch.step()
        for _ in range(args.passes):
            for scheme, batch in batches.items():
                began = time.perf_counter()
                batch.step()
                took[scheme].append(time.perf_counter() - began)
        for scheme, batch in batches.items():
            fastest, median = (1e3 * of(took[scheme]) for of in (min, statistics.median))
            print(f"{rows:3} rows, {scheme:5} fastest {fastest:7.2f} ms, median {median:7.2f} ms", flush=True)
            for text in list(batch.sequences):
                batch.remove(text)


if __name__ == "__main__":
    main()
