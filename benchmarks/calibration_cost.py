"""What calibration costs: wall time and peak memory of a walk through random models of growing depth.

    python benchmarks/calibration_cost.py

Every product's Gram matrix is taken on ROWS x LENGTH tokens, one transformer block at a time. Memory must not grow with
depth: it is one block, its statistics and 64 MB of hidden states; the rest of them go to files.
"""

from __future__ import annotations

import shutil
import sys

import common
from common import CACHE, PEERS, Row

DEPTHS = (12, 24, 48)
WIDTH, INNER = 1024, 2816
ROWS, LENGTH = 64, 256
SCRATCH = CACHE / "scratch"


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    for depth in arguments.depths:
        checkpoint = CACHE / "random" / f"{depth}-{WIDTH}-{INNER}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(SCRATCH, ignore_errors=True)
        common.measured(
            [sys.executable, PEERS / "random_checkpoint.py", checkpoint, str(depth), str(WIDTH), str(INNER)]
        )
        common.measured([sys.executable, PEERS / "export_onnxpress.py", checkpoint, SCRATCH, "float32"])
        walk = [sys.executable, PEERS / "calibrate_onnxpress.py", SCRATCH, str(arguments.rows), str(LENGTH)]
        runs = [common.measured(walk) for _ in range(arguments.repeats)]
        rows.append(
            {
                "layers": depth,
                "graph MB": common.file_bytes(SCRATCH) / 1e6,
                "wall s": common.median([run.seconds for run in runs]),
                "peak RSS MB": max(run.peak_rss_bytes for run in runs) / 1e6,
            }
        )
        shutil.rmtree(checkpoint)
        shutil.rmtree(SCRATCH)
    common.report("Cost of a calibration", {f"{arguments.rows} x {LENGTH} tokens": rows}, arguments)


if __name__ == "__main__":
    main()
