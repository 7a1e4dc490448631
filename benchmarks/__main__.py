"""All benchmarks, with their defaults: python -m benchmarks [OPTIONS that all of them have]"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

for name in ("export_cost.py", "calibration_cost.py", "decoder.py", "encoder.py"):
    subprocess.run([sys.executable, Path(__file__).with_name(name), *sys.argv[1:]], check=True)
